"""LoRA: the forward with adapters equals that of merged weights, trains adapters only, and speaks PEFT's format."""

import dataclasses
import functools
import json
import re
import subprocess

import cases
import golden_cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from places import ORACLE, ORACLE_PYTHON

import cxr_jax
from cxr_jax import convert
from cxr_jax.errors import UserError
from cxr_jax.inference import model as inference_model
from cxr_jax.inference import sampling
from cxr_jax.models import layers, lora, network, registry
from cxr_jax.models.lora import Lora
from cxr_jax.models.network import decoder_layers
from cxr_jax.models.network.config import Config, TextConfig, VisionConfig
from cxr_jax.models.qwen2_5_vl import hf_table
from cxr_jax.runtime import trees
from cxr_jax.weights import hf_folder, peft_folder
from cxr_jax.weights.safetensors_file import Tensors, write_safetensors

CFG = Config(
    vision=VisionConfig(
        depth=2,
        hidden_size=16,
        num_heads=2,
        intermediate_size=20,
        out_hidden_size=32,
        fullatt_block_indexes=(1,),
        patch_size=2,
        window_size=8,
    ),
    text=TextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(1, 1, 2),
        rope_theta=1e4,
    ),
    image_token_id=5,
    video_token_id=6,
    vision_start_token_id=3,
    vision_end_token_id=4,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=(2,),
    tie_word_embeddings=True,
)
GRID = (1, 4, 8)
IDS = np.array([[3, *[5] * 8, 4, 9, 10, 11, 12], [3, *[5] * 8, 4, 20, 21, 0, 0]])
LENGTHS = np.array([14, 12])
ALL = Lora(3, 6.0, ("decoder", "vision", "merger"))
OWN = lora.PATHS[:14]  # Qwen2.5-VL's
# Programs run once: unoptimised code is reached sooner.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def noise(shapes, seed: int, size=lambda path, shape: 0.2):
    """Arrays of these shapes, none zero. Drawn with numpy: nothing is compiled."""
    rng = np.random.default_rng(seed)
    draw = lambda path, x: (
        size([k.key for k in path], x.shape) * rng.standard_normal(x.shape, np.float32)
    )
    return jax.tree_util.tree_map_with_path(draw, shapes)


def shapes_of(model_config, own):
    params = jax.eval_shape(lambda: network.init_params(model_config, jax.random.key(0)))
    return params, jax.eval_shape(lambda: lora.init(params, own, jax.random.key(0)))


@pytest.fixture(scope="module")
def params():
    size = lambda path, shape: {"kernel": shape[-2:][0] ** -0.5, "embedding": 0.3}.get(
        path[-1], 0.3
    )
    return noise(shapes_of(CFG, ALL)[0], 0, size)


@pytest.fixture(scope="module")
def adapters():
    return noise(shapes_of(CFG, ALL)[1], 1)


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


def flat(tree) -> dict:
    return {"/".join(path): np.asarray(x) for path, x in trees.flatten(tree)}


def same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


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
        f = jax.jit(jax.value_and_grad(loss), compiler_options=FAST)
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
    value, got = jax.jit(f, compiler_options=FAST)(adapters, params)
    got, (want_value, want) = flat(got), by_chain_rule
    assert abs(value - want_value) <= 1e-5
    assert got.keys() == want.keys() and len(got) == 28
    for name in got:
        assert np.abs(got[name] - want[name]).max() <= 2e-5 * np.abs(want[name]).max() > 0, name


def test_hidden_states(params, adapters, pixels):
    f = jax.jit(hidden, compiler_options=FAST)
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


# --- PEFT's format -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "ours"
    peft_folder.save(folder, CFG, adapters, ALL, "nvidia/some-model")
    return folder


def stored(folder) -> dict:
    path = folder / "adapter_model.safetensors"
    return {k: np.array(x) for k, x in _tensors(path).items()}


def _tensors(path) -> dict:
    found = Tensors(path.parent, file_name=path.name)
    return {k: found[k] for k in found.stored}


def written(folder, tensors: dict, settings: dict):
    """A PEFT folder of these."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_safetensors(folder / "adapter_model.safetensors", golden_cases.entries(tensors))
    return folder


def settings_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def test_export_and_import_bit_for_bit(adapters, exported, tmp_path):
    found, same_lora = peft_folder.load(exported, CFG)
    same(found, adapters)
    assert same_lora == ALL
    one = Lora(3, 1.5, ("text/layers/mlp/gate", "vision/merger/fc1"))
    own = {
        "text": {"layers": {"mlp": {"gate": adapters["text"]["layers"]["mlp"]["gate"]}}},
        "vision": {"merger": {"fc1": adapters["vision"]["merger"]["fc1"]}},
    }
    own = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), own)
    peft_folder.save(tmp_path / "one", CFG, own, one, "x")
    assert {x.dtype for x in stored(tmp_path / "one").values()} == {np.dtype(ml_dtypes.bfloat16)}
    found, same_lora = peft_folder.load(tmp_path / "one", CFG)
    same(found, jax.tree.map(lambda x: x.astype(np.float32), own))
    assert same_lora == one
    with pytest.raises(ValueError, match="not those of"):
        peft_folder.save(tmp_path / "bad", CFG, own, ALL, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_a_model_with_an_adapter_folder(params, adapters, exported, tmp_path, capsys):
    """Read with adapters, and converted with them: both are the merged model. A foreign folder is one line."""
    base = tmp_path / "base"
    hf_folder.save(base, CFG, params)
    want = lora.merge(params, adapters, ALL)
    same(cxr_jax.load(base, adapter=exported).params, want)
    assert (
        convert.main(["from-hf", str(base), str(tmp_path / "merged"), "--adapter", str(exported)])
        == 0
    )
    same(cxr_jax.load(tmp_path / "merged").params, want)
    capsys.readouterr()
    huge = tmp_path / "huge"
    peft_folder.save(huge, CFG, adapters, dataclasses.replace(ALL, alpha=1e300), "base")
    for args, line in (
        (["from-hf", base, tmp_path / "x", "--adapter", tmp_path / "none"], "none"),
        (["from-hf", base, tmp_path / "x", "--adapter", huge], "is infinite or NaN with them"),
        (["to-hf", tmp_path / "merged", tmp_path / "x", "--adapter", exported], "--adapter is for"),
    ):
        assert convert.main([str(a) for a in args]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and line in err
        assert not (tmp_path / "x").exists()


def test_names_are_those_of_transformers(exported):
    tensors, pattern = stored(exported), settings_of(exported)["target_modules"]
    q = tensors["base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"]
    assert q.shape == (3, 32)
    assert tensors["base_model.model.model.visual.merger.mlp.2.lora_B.weight"].shape == (32, 3)
    assert len(tensors) == 2 * (2 * 7 + 2 * 5 + 2)
    targeted = {k.split(".lora_")[0].removeprefix("base_model.model.") for k in tensors}
    parts = [cases.nested_key(r.key).split(".") for r in hf_table.rules(CFG)]
    modules = {".".join(x[:n]) for x in parts for n in range(1, len(x))} | {
        "lm_head",
        "model.visual.merger.mlp.1",
    }
    assert {name for name in modules if re.fullmatch(pattern, name)} == targeted


def old_names(key: str) -> str:
    return key.replace("model.model.visual.", "model.visual.").replace(
        "model.language_model.", "model."
    )


LIST = ["q_proj", "v_proj", "mlp.0"]


@pytest.mark.parametrize("rename", [str, old_names], ids=["new", "old"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_others_write(adapters, exported, tmp_path, rename, dtype):
    """Targets by suffix, one layer only, rsLoRA, either naming, any stored type."""
    layered = lambda k: "layers.1." in k and any(f".{x}.lora" in k for x in LIST)
    kept = {rename(k): x.astype(dtype) for k, x in stored(exported).items() if layered(k)}
    folder = written(
        tmp_path / "theirs",
        kept,
        settings_of(exported)
        | {
            "target_modules": LIST,
            "layers_to_transform": [1],
            "use_rslora": True,
            "loftq_config": {},
            "exclude_modules": r".*visual.*",
            "qalora_group_size": 16,
            "megatron_core": "megatron.core",
        },
    )
    found, own = peft_folder.load(folder, CFG)
    assert own.targets == ("text/layers/attn/q", "text/layers/attn/v") and own.rank == 3
    assert own.scale == pytest.approx(6.0 / 3**0.5, rel=1e-12)
    assert flat(found).keys() == {f"text/layers/attn/{x}/{half}" for x in "qv" for half in "ab"}
    for name, x in flat(found).items():
        want = flat(adapters)[name].astype(dtype).astype(np.float32)
        assert x.dtype == np.float32 and not x[0].any()
        np.testing.assert_array_equal(x[1], want[1])


Q = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"


REFUSED = {
    "another method": (lambda s, t: s.update(peft_type="IA3"), "peft_type is IA3"),
    "DoRA": (lambda s, t: s.update(use_dora=True), "use_dora is not supported"),
    "ranks by pattern": (lambda s, t: s.update(rank_pattern={"q_proj": 8}), "rank_pattern"),
    "alphas by pattern": (lambda s, t: s.update(alpha_pattern={"q_proj": 8}), "alpha_pattern"),
    "whole modules": (lambda s, t: s.update(modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (lambda s, t: s.update(bias="all"), "bias is all"),
    "transposed": (lambda s, t: s.update(fan_in_fan_out=True), "fan_in_fan_out"),
    "a feature to come": (lambda s, t: s.update(new_trick={"x": 1}), "new_trick is not supported"),
    "another base": (lambda s, t: s.update(init_lora_weights="pissa"), "pissa changes the base"),
    "rank 0": (lambda s, t: s.update(r=0), "rank must be"),
    "no rank": (lambda s, t: s.pop("r"), "rank must be"),
    "another rank": (lambda s, t: s.update(r=4), r"is \[3, 16\]; model and rank need \[4, 16\]"),
    "no alpha": (lambda s, t: s.update(lora_alpha=None), "alpha must be"),
    "no targets": (lambda s, t: s.pop("target_modules"), "target_modules is not of its type"),
    "layers of no type": (
        lambda s, t: s.update(layers_to_transform=[1.5]),
        "layers_to_transform is not of its type",
    ),
    "no match": (lambda s, t: s.update(target_modules=["query"]), "match no module"),
    "no pattern": (lambda s, t: s.update(target_modules="(q_proj"), "not a regular expression"),
    "outside the table": (
        lambda s, t: s.update(target_modules=["q_proj", "embed_tokens"]),
        "embed_tokens cannot",
    ),
    "fewer targets": (
        lambda s, t: s.update(target_modules=["q_proj"]),
        "unexpected: .* and [0-9]+ more",
    ),
    "a tensor missing": (
        lambda s, t: t.pop(Q),
        "missing: model.layers.1.self_attn.q_proj.lora_A.weight",
    ),
    "a tensor too many": (lambda s, t: t.update({Q + "s": t[Q]}), "unexpected: .*weights"),
    "a foreign name": (
        lambda s, t: t.update(extra=t[Q]),
        "extra does not begin with base_model.model.",
    ),
    "a shape": (lambda s, t: t.update({Q: t[Q][:, :-1]}), "q_proj.lora_A.weight is"),
    "a type": (lambda s, t: t.update({Q: t[Q].astype(np.int8)}), "is I8"),
    "not a number": (lambda s, t: t.update({Q: t[Q] * np.float32(np.nan)}), "NaN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(exported, tmp_path, name):
    change, message = REFUSED[name]
    settings, tensors = settings_of(exported), stored(exported)
    change(settings, tensors)
    with pytest.raises(UserError, match=message) as e:
        peft_folder.load(written(tmp_path / "bad", tensors, settings), CFG)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_damaged_files(exported, tmp_path):
    folder = written(tmp_path / "bad", stored(exported), settings_of(exported))
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    for bad in (b"", data[:100], data[:-1], data + b"x"):
        weights.write_bytes(bad)
        with pytest.raises(UserError, match="adapter_model.safetensors"):
            peft_folder.load(folder, CFG)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle file"):
        peft_folder.load(folder, CFG)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors is missing"):
        peft_folder.load(folder, CFG)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        peft_folder.load(folder, CFG)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="no adapter_config.json"):
        peft_folder.load(folder, CFG)


# Several images and padding, several layers in both parts, an untied head; of Qwen3-VL, two taps.
@pytest.mark.parametrize("family, seed", [("qwen2_5_vl", 342), ("qwen3_vl", 83)])
def test_peft_and_we_read_each_other(tmp_path, family, seed):
    if not ORACLE_PYTHON.exists():
        pytest.skip(
            "no .venv-oracle (torch, transformers and peft): `bash launch/test.sh` makes it"
        )
    case, model = cases.draw(seed, family), tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(case.config))
    write_safetensors(model / "model.safetensors", golden_cases.entries(cases.weights(case)))
    model_config, params = hf_folder.load(model)
    own = Lora(4, 6.0, ("decoder", "vision", "merger"))
    adapters = noise(shapes_of(model_config, own)[1], 0)
    peft_folder.save(tmp_path / "ours", model_config, adapters, own, "base")
    command = [
        ORACLE_PYTHON,
        ORACLE / "peft_check.py",
        str(seed),
        tmp_path / "ours",
        tmp_path / "out",
        family,
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        args = (case.input_ids, case.pixel_values, case.grids, case.attention_mask)
        with_ours = inference_model.Model(model_config, lora.join(params, adapters, own)).logits(
            *args
        )
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert json.loads(out) == {"lacked": [], "not_taken": [], "warned": []}
    theirs, shown = (
        np.load(tmp_path / "out" / "ours.npz")["logits"],
        case.attention_mask.astype(bool),
    )
    assert np.abs(with_ours - theirs)[shown].max() <= 1e-4 * theirs[shown].std()

    found, their_lora = peft_folder.load(tmp_path / "out" / "theirs", model_config)
    assert their_lora == Lora(3, 5, ("text/layers/attn/q", "text/layers/attn/v"))
    merged = flat(lora.merge(params, found, their_lora))
    want = np.load(tmp_path / "out" / "theirs.npz")
    for rule in registry.family_of(model_config).tensor_rules(model_config):
        x = merged["/".join(rule.path)]
        np.testing.assert_allclose(
            rule.to_hf(x if rule.layer is None else x[rule.layer]),
            want[rule.key],
            atol=1e-6,
            rtol=1e-6,
        )
    before = flat(params)
    changed = {name for name in merged if (merged[name] != before[name]).any()}
    assert changed == {f"text/layers/attn/{x}/kernel" for x in "qv"}
