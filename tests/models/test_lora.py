"""LoRA: the forward with adapters equals that of merged weights, and trains adapters only."""

import dataclasses
import functools

import fast_compile
import jax
import jax.numpy as jnp
import lora_model
import ml_dtypes
import numpy as np
import pytest
from lora_model import ALL, CFG, OWN, flat, same, shapes_of

from cxr_jax.errors import UserError
from cxr_jax.inference import sampling
from cxr_jax.models import layers, lora, network
from cxr_jax.models.lora import Lora
from cxr_jax.models.network import decoder, decoder_layers

GRID = (1, 4, 8)
IDS = np.array([[3, *[5] * 8, 4, 9, 10, 11, 12], [3, *[5] * 8, 4, 20, 21, 0, 0]])
LENGTHS = np.array([14, 12])


@pytest.fixture(scope="module")
def params():
    return lora_model.params()


@pytest.fixture(scope="module")
def adapters():
    return lora_model.adapters()


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(2).standard_normal(
        (2, GRID[1] * GRID[2], CFG.vision.patch_dim), np.float32
    )


def hidden(params, pixels, remat="none"):
    mask = np.arange(IDS.shape[1]) < LENGTHS[:, None]
    return network.hidden_states(
        params,
        CFG,
        IDS,
        mask,
        network.positions(CFG, IDS, GRID, mask),
        pixels,
        grid=GRID,
        remat=remat,
    )


def loss(params, pixels, remat="none"):
    h = hidden(params, pixels, remat)
    return jnp.vdot(h, np.random.default_rng(3).standard_normal(h.shape, np.float32)) / h.size


# --- the table and the settings ------------------------------------------------------------------------


def test_the_table_holds_every_linear_module_but_the_patch_embedding(params):
    linear = {name.removesuffix("/kernel") for name in flat(params) if name.endswith("/kernel")}
    assert linear - set(lora.PATHS) == {"vision/patch_embed/proj"}
    # In this order, by which fresh adapters are drawn.
    assert OWN == lora.PATHS[:14] == ALL.paths_in(lora.modules_of(params))
    assert set(OWN) < linear
    assert len(set(lora.PATHS)) == len(lora.PATHS)
    assert {path for group in lora.TARGETS.values() for path in group} == set(lora.PATHS)
    with pytest.raises(UserError, match="'vision/taps/fc1': this model has no such module"):
        Lora(3, 6.0, ("vision/taps/fc1",)).paths_in(lora.modules_of(params))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 1.0), "rank"),
        ((2.0, 1.0), "rank"),
        ((True, 1.0), "rank"),
        ((2, 0), "alpha"),
        ((2, float("nan")), "alpha"),
        ((2, float("inf")), "alpha"),
        ((2, 10**400), "alpha"),
        ((2, "4"), "alpha"),
        ((2, 1.0, ()), "at least one"),
        ((2, 1.0, "decoder"), "tuple"),
        ((2, 1.0, ("head",)), "'head' is unknown"),
        ((2, 1.0, ("text/layers/attn/q", "decoder")), "text/layers/attn/q twice"),
    ],
)
def test_settings_out_of_range(args, message):
    with pytest.raises(UserError, match=message) as e:
        Lora(*args)
    assert "\n" not in str(e.value)


def test_init_is_that_of_peft(params):
    one = Lora(4, 8.0, ("vision/merger/fc1", "text/layers/mlp/down"))
    init = jax.jit(lora.init, static_argnums=1)
    found = flat(init(params, one, jax.random.key(0)))
    assert {k: x.shape for k, x in found.items()} == {
        "vision/merger/fc1/a": (64, 4),
        "vision/merger/fc1/b": (4, 64),
        "text/layers/mlp/down/a": (2, 48, 4),
        "text/layers/mlp/down/b": (2, 4, 32),
    }
    for name, x in found.items():
        assert x.dtype == np.float32
        if name.endswith("b"):
            assert not x.any()
        else:  # kaiming_uniform(a=sqrt(5)) of [r, din]
            bound = x.shape[-2] ** -0.5
            assert (
                0.95 * bound < np.abs(x).max() <= bound and abs(x.std() * 3**0.5 / bound - 1) < 0.1
            )
    again = init(
        params, Lora(4, 1.0, ("text/layers/mlp/down",)), jax.random.key(0)
    )  # whatever the other targets
    assert (flat(again)["text/layers/mlp/down/a"] == found["text/layers/mlp/down/a"]).all()
    assert hash(one) == hash(dataclasses.replace(one)) and one.scale == 2.0


# --- the forward ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_chain_rule(params, adapters, pixels):
    """Loss and gradients of the adapters, from the gradient of the merged kernels: W + s a b."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "UNROLL_UP_TO", 0)  # compiles faster
        f = jax.jit(jax.value_and_grad(loss), compiler_options=fast_compile.OPTIONS)
        value, full = f(lora.merge(params, adapters, ALL), pixels)
    full, want = flat(full), {}
    for path in OWN:
        node = functools.reduce(lambda tree, name: tree[name], path.split("/"), adapters)
        g = full[f"{path}/kernel"]
        want[f"{path}/a"] = ALL.scale * g @ node["b"].swapaxes(-1, -2)
        want[f"{path}/b"] = ALL.scale * node["a"].swapaxes(-1, -2) @ g
    return value, want


@pytest.mark.parametrize(("unroll", "remat"), [(8, "none"), (0, "full"), (0, "dots")])
def test_loss_and_gradients_equal_those_of_merged_kernels(
    params, adapters, pixels, by_chain_rule, monkeypatch, unroll, remat
):
    monkeypatch.setattr(layers, "UNROLL_UP_TO", unroll)
    f = jax.value_and_grad(lambda a, p: loss(lora.join(p, a, ALL), pixels, remat))
    value, got = jax.jit(f, compiler_options=fast_compile.OPTIONS)(adapters, params)
    got, (want_value, want) = flat(got), by_chain_rule
    assert abs(value - want_value) <= 1e-5
    assert got.keys() == want.keys() and len(got) == 28
    for name in got:
        assert np.abs(got[name] - want[name]).max() <= 2e-5 * np.abs(want[name]).max() > 0, name


def test_hidden_states(params, adapters, pixels):
    f = jax.jit(hidden, compiler_options=fast_compile.OPTIONS)
    base, joined, merged = (
        f(p, pixels)
        for p in (params, lora.join(params, adapters, ALL), lora.merge(params, adapters, ALL))
    )
    np.testing.assert_allclose(joined, merged, rtol=0, atol=1e-5 * float(base.std()))
    assert np.abs(joined - base).max() > base.std() / 2
    fresh = jax.tree_util.tree_map_with_path(lambda path, x: x * (path[-1].key == "a"), adapters)
    np.testing.assert_array_equal(f(lora.join(params, fresh, ALL), pixels), base)
    same(lora.merge(params, fresh, ALL), params)


@pytest.mark.parametrize(
    "path", ["text/layers/attn/k", "vision/blocks/mlp/up", "vision/merger/fc2"]
)
def test_merge_by_hand(params, adapters, path):
    one = Lora(3, 6.0, (path,))
    part = functools.reduce(lambda tree, name: tree[name], path.split("/"), adapters)
    own = functools.reduce(lambda tree, name: {name: tree}, reversed(path.split("/")), part)
    low = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    merged, before = flat(lora.merge(low, own, one)), flat(low)
    delta = 2.0 * np.asarray(part["a"], np.float64) @ np.asarray(part["b"], np.float64)
    want = before[f"{path}/kernel"].astype(np.float64) + delta
    assert merged.keys() == before.keys()
    for name, x in merged.items():
        assert x.dtype == ml_dtypes.bfloat16
        if name == f"{path}/kernel":  # rounded once
            assert np.abs(x.astype(np.float64) - want).max() <= 2**-8 * np.abs(want).max()
            assert (x == want.astype(np.float32).astype(ml_dtypes.bfloat16)).mean() > 0.99
        else:
            np.testing.assert_array_equal(x, before[name])


def products(jaxpr):
    """Output shapes of all matrix products, inner programs included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.shape
        for inner in jax.tree.leaves(
            eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("unroll", [8, 0])
def test_gradients_of_frozen_kernels_are_not_formed(params, adapters, pixels, monkeypatch, unroll):
    monkeypatch.setattr(layers, "UNROLL_UP_TO", unroll)
    kernels = {
        x.shape[-2:] for k, x in flat(params).items() if k.removesuffix("/kernel") in lora.PATHS
    }

    def formed(give, a):
        f = jax.grad(lambda a: loss(give(params, a, ALL), pixels))
        return [
            s for s in products(jax.make_jaxpr(f)(a).jaxpr) if s in kernels or s[::-1] in kernels
        ]

    assert not formed(lora.join, adapters)
    assert formed(lora.merge, adapters)


def test_adapters_of_one_module_train_at_the_price_of_activations(params, pixels):
    """The modules without adapters are frozen as well: the compiled program holds none of their gradients."""
    one = Lora(3, 6.0, ("text/layers/attn/q",))
    adapters = shapes_of(CFG, one)[1]
    flops = lambda f, *a: jax.jit(f).lower(*a).compile().cost_analysis()["flops"]
    text = lambda p: loss(p, None)
    full = flops(jax.grad(lambda t, p: text({**p, "text": t})), params["text"], params)
    assert flops(jax.grad(lambda a, p: text(lora.join(p, a, one))), adapters, params) < 0.8 * full


def test_decoding_with_adapters(params, adapters):
    some = Lora(3, 6.0, ("text/layers/attn/q", "text/layers/attn/o", "text/layers/mlp/up"))
    every = adapters["text"]["layers"]  # of q, k, v only q has an adapter, and of gate, up only up
    part = {
        "text": {
            "layers": {
                "attn": {x: every["attn"][x] for x in "qo"},
                "mlp": {"up": every["mlp"]["up"]},
            }
        }
    }
    mask = np.arange(IDS.shape[1]) < LENGTHS[:, None]
    positions = network.positions(CFG, IDS, GRID, mask)
    features = np.random.default_rng(0).standard_normal((2, 8, 32)).astype(np.float32)
    run = lambda p: sampling.generate(
        p,
        CFG,
        sampling.PromptBatch(IDS, LENGTHS, positions, network.Seen(features)),
        sampling.SamplingSettings(max_new_tokens=8, temperature=0),
    )
    joined = lora.join(params, part, some)
    out, merged, base = run(joined), run(lora.merge(params, part, some)), run(params)
    np.testing.assert_array_equal(out["tokens"], merged["tokens"])
    np.testing.assert_allclose(out["logprobs"], merged["logprobs"], atol=1e-4)
    assert (np.asarray(out["tokens"]) != base["tokens"]).any()


def test_decoding_does_not_round_adapters_into_narrow_kernels(params, adapters):
    """A step of 1e-6 would vanish in a bfloat16 kernel: the sampler would not be the learner."""
    tiny = jax.tree.map(lambda x: 1e-3 * x, adapters)
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    layers_ = decoder_layers.decode_layers(lora.join(narrow, tiny, ALL)["text"], CFG.text)
    assert "lora_b" in layers_[0]["attn"]["q"] and "lora_b" in layers_[-1]["mlp"]["down"]
    assert "qkv" in decoder_layers.decode_layers(narrow["text"], CFG.text)[0]["attn"]
    assert (
        "qkv"
        in decoder_layers.decode_layers(lora.join(params, tiny, ALL)["text"], CFG.text)[0]["attn"]
    )
    # Where the computation rounds adapters to the kernels' type anyway, they go along with them.
    fused = decoder_layers.decode_layers(
        lora.join(narrow, tiny, ALL)["text"], CFG.text, jnp.bfloat16
    )
    assert "qkv" in fused[0]["attn"] and "lora_b" in fused[-1]["mlp"]["down"]
    assert (
        "lora_b"
        in decoder_layers.decode_layers(
            lora.join(narrow, tiny, ALL)["text"], CFG.text, jnp.float32
        )[0]["attn"]["q"]
    )


@pytest.mark.parametrize("modules", ["attn/q mlp/up", "attn/v attn/o mlp/down", ""])
def test_fused_adapters_decode_as_those_beside_each_kernel(params, adapters, modules):
    chosen = tuple(f"text/layers/{module}" for module in modules.split())
    some = Lora(3, 6.0, chosen or ("decoder",))
    every, part = adapters["text"]["layers"], {}
    for path in chosen or some.paths_in(lora.modules_of(params)):
        *_, block, module = path.split("/")
        part.setdefault(block, {})[module] = every[block][module]
    joined = lora.join(params["text"], {"layers": part}, some)
    apart = layers.unstack(joined["layers"], CFG.text.num_hidden_layers)
    fused = [decoder_layers.fuse_with_adapters(layer) for layer in apart]
    rng = np.random.default_rng(1)
    text, rows = CFG.text, 3
    shape = (rows, text.num_key_value_heads, 4, text.head_dim)
    prompt_keys = [
        tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in "kv")
        for _ in range(text.num_hidden_layers)
    ]
    embedded = jnp.asarray(rng.standard_normal((rows, 1, text.hidden_size)), jnp.float32)

    @jax.jit
    def decode(layers_):
        return decoder.decode_step(
            layers_,
            params["text"]["final"],
            text,
            embedded,
            np.full((text.position_axes, rows, 1), 4),
            prompt_keys,
            np.array([4, 3, 2]),
            decoder.empty_own(text, rows, 2, jnp.float32),
            jnp.int32(0),
        )[0]

    want = decode(apart)
    np.testing.assert_allclose(decode(fused), want, atol=1e-6, rtol=1e-6)
    # Adapters that matter, and 8 products for 21 where every module has one.
    assert np.abs(decode(layers.unstack(params["text"]["layers"], 2)) - want).max() > 1e-2
    count = lambda layers_: str(jax.make_jaxpr(decode)(layers_)).count("dot_general")
    attention = count(layers.unstack(params["text"]["layers"], 2)) - 2 * 7
    if not modules:
        assert (count(apart) - attention, count(fused) - attention) == (2 * 21, 2 * 8)
