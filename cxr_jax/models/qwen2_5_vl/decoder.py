"""The Qwen2.5 decoder: grouped-query attention with qkv bias, SwiGLU, M-RoPE; full pass and KV cache.

Right padding everywhere: row b's tokens are the first lengths[b]. A prompt's keys are computed and stored
once, however many completions share it.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from cxr_jax.models.attention import NEG, attention, two_part_attention
from cxr_jax.models.layers import (
    MLP,
    FusedMLP,
    Linear,
    RMSNorm,
    apply,
    graph,
    init_stacked,
    merge_adapters,
    run_layers,
    split_adapters,
    unstack,
)
from cxr_jax.models.qwen2_5_vl import rope
from cxr_jax.models.qwen2_5_vl.config import TextConfig


class Attention(nnx.Module):
    """Projections around `attend(q [B,T,H,d], k, v [B,T,K,d]) -> ([B,T,H,d], aux)`, which picks the keys."""

    def __init__(self, model_config: TextConfig, *, rngs: nnx.Rngs, fused: bool = False):
        D, hd = model_config.hidden_size, model_config.head_dim
        self.widths = [
            n * hd
            for n in (model_config.num_attention_heads, *[model_config.num_key_value_heads] * 2)
        ]
        if fused:
            self.qkv = Linear(D, sum(self.widths), bias=True, rngs=rngs)
        else:
            self.q, self.k, self.v = (Linear(D, w, bias=True, rngs=rngs) for w in self.widths)
        self.o = Linear(
            self.widths[0],
            D,
            bias=False,
            rngs=rngs,
            scale=(2 * model_config.num_hidden_layers) ** -0.5,
        )
        self.head_dim, self.fused = hd, fused

    def __call__(self, x, cos, sin, attend):
        B, T, _ = x.shape
        a, b = self.widths[0], sum(self.widths[:2])
        parts = (
            jnp.split(self.qkv(x), (a, b), -1)
            if self.fused
            else [f(x) for f in (self.q, self.k, self.v)]
        )
        q, k, v = (y.reshape(B, T, -1, self.head_dim) for y in parts)
        o, aux = attend(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v)
        return self.o(o.reshape(B, T, -1)), aux


class Block(nnx.Module):
    """One layer. `fused`: for parameters from `fuse`, with q, k, v and gate, up in one kernel each."""

    def __init__(self, model_config: TextConfig, fused: bool = False, *, rngs: nnx.Rngs):
        D, F = model_config.hidden_size, model_config.intermediate_size
        self.norm1 = RMSNorm(D, model_config.rms_norm_eps)
        self.attn = Attention(model_config, rngs=rngs, fused=fused)
        self.norm2 = RMSNorm(D, model_config.rms_norm_eps)
        if fused:
            self.mlp = FusedMLP(D, F, rngs=rngs)
        else:
            self.mlp = MLP(
                D, F, bias=False, rngs=rngs, out_scale=(2 * model_config.num_hidden_layers) ** -0.5
            )

    def __call__(self, x, cos, sin, attend):
        y, aux = self.attn(self.norm1(x), cos, sin, attend)
        x = x + y
        return x + self.mlp(self.norm2(x)), aux


class Final(nnx.Module):
    """The last normalisation."""

    def __init__(self, model_config: TextConfig, *, rngs: nnx.Rngs):
        del rngs
        self.norm = RMSNorm(model_config.hidden_size, model_config.rms_norm_eps)

    def __call__(self, x):
        return self.norm(x)


def init_params(model_config: TextConfig, key, tied: bool) -> dict:
    """Fresh parameters: {"embed": {"embedding" [V, D]}, "layers" (stacked), "final", "head" if untied}."""
    a, b, c = jax.random.split(key, 3)
    normal = lambda k, shape: 0.02 * jax.random.normal(k, shape, jnp.float32)
    params = {
        "embed": {"embedding": normal(a, (model_config.vocab_size, model_config.hidden_size))},
        "layers": init_stacked(Block, model_config, key=b, n=model_config.num_hidden_layers),
        "final": {"norm": {"scale": jnp.ones((model_config.hidden_size,), jnp.float32)}},
    }
    if not tied:
        params["head"] = {"kernel": normal(c, (model_config.hidden_size, model_config.vocab_size))}
    return params


def fuse(layers: dict) -> dict:
    """Layer parameters with q, k, v and gate, up concatenated: fewer, larger products in the decode loop.

    Adapters are added to their kernels: a step then costs what it costs without them.
    """
    attn, mlp = (
        {name: merge_adapters(p) for name, p in layers[part].items()} for part in ("attn", "mlp")
    )
    join = lambda *parts: jax.tree.map(lambda *x: jnp.concatenate(x, -1), *parts)
    return {
        **layers,
        "attn": {"qkv": join(attn["q"], attn["k"], attn["v"]), "o": attn["o"]},
        "mlp": {"gate_up": join(mlp["gate"], mlp["up"]), "down": mlp["down"]},
    }


def key_bias(mask):
    """float32: 0 where a key may be seen, else very negative; shape as mask."""
    return jnp.where(mask, 0.0, NEG).astype(jnp.float32)


def causal_bias(mask):
    """[B, 1, 1, T, T] bias: query t sees key s if s <= t and mask[b, s]."""
    T = mask.shape[1]
    return key_bias(jnp.tril(jnp.ones((T, T), bool)) & mask.astype(bool)[:, None, :])[:, None, None]


def final_norm(params: dict, model_config: TextConfig, h):
    return apply(graph(Final, model_config), params["final"], h)


def forward(params: dict, model_config: TextConfig, h, positions, mask, *, remat: str = "none"):
    """h [B, T, D], positions int [3, B, T], mask bool [B, T] -> hidden [B, T, D] after the final norm."""
    cos, sin = rope.text_cos_sin(model_config, positions)
    bias = causal_bias(mask)
    block = graph(Block, model_config)
    attend = lambda q, k, v: (attention(q, k, v, bias), None)
    layer = lambda p, x: apply(block, p, x, cos, sin, attend)
    h, _ = run_layers(layer, params["layers"], h, model_config.num_hidden_layers, remat)
    return final_norm(params, model_config, h)


def forward_group(
    params: dict,
    model_config: TextConfig,
    h_prompt,
    positions,
    lengths,
    h_own,
    own_positions,
    *,
    remat: str = "none",
):
    """`forward` for prompts that several completions share: each prompt is computed once.

    h_prompt [B, S, D], positions int [3, B, S], lengths int [B]; completions h_own [B*n, C, D] in prompt order
    with own_positions int [3, B*n, C], right-padded (causality hides the padding). Returns the hidden states
    after the final norm of both, [B, S, D] and [B*n, C, D]; the gradient of a prompt sums over its n.
    """
    S, C = h_prompt.shape[1], h_own.shape[1]
    mask = jnp.arange(S) < lengths[:, None]
    angles, own_angles = (
        rope.text_cos_sin(model_config, positions),
        rope.text_cos_sin(model_config, own_positions),
    )
    bias, seen = causal_bias(mask), key_bias(mask)[:, None, None, None, None]
    causal = key_bias(jnp.tril(jnp.ones((C, C), bool)))
    block = graph(Block, model_config)

    def layer(p, x):
        attend = lambda q, k, v: (
            attention(q, k, v, bias),
            (k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)),
        )
        prompt, shared = apply(block, p, x[0], *angles, attend)

        def attend_own(q, k, v):
            kv = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
            return two_part_attention(q, shared, kv, seen, causal), None

        return (prompt, apply(block, p, x[1], *own_angles, attend_own)[0]), None

    x, _ = run_layers(
        layer, params["layers"], (h_prompt, h_own), model_config.num_hidden_layers, remat
    )
    return final_norm(params, model_config, x[0]), final_norm(params, model_config, x[1])


def prefill(params: dict, model_config: TextConfig, h, positions, lengths):
    """Run prompts h [B, S, D] once.

    Returns (hidden [B, D] of each prompt's last token after the final norm, cache {"k", "v"}: [L, B, S, K, d]
    each).
    """
    mask = jnp.arange(h.shape[1]) < lengths[:, None]
    cos, sin = rope.text_cos_sin(model_config, positions)
    bias = causal_bias(mask)
    block = graph(Block, model_config)
    attend = lambda q, k, v: (attention(q, k, v, bias), {"k": k, "v": v})
    layer = lambda p, x: apply(block, p, x, cos, sin, attend)
    h, cache = run_layers(layer, params["layers"], h, model_config.num_hidden_layers)
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1, mode="clip")[:, 0]
    return final_norm(params, model_config, last), cache


def extend(params: dict, model_config: TextConfig, h, positions, lengths, keys: list[tuple], used):
    """`prefill` of h [B, E, D] on top of keys that are kept: `prompt_keys` of S slots, the first used [B] filled.

    positions int [3, B, E], lengths int [B] of the new tokens. Returns (hidden [B, D] of each last token after
    the final norm, the new tokens' [(k, v)] a layer, [B, K, E, d]).
    """
    seen = key_bias(jnp.arange(keys[0][0].shape[2]) < used[:, None])[:, None, None, None, None]
    causal = key_bias(jnp.tril(jnp.ones((h.shape[1], h.shape[1]), bool)))
    angles = rope.text_cos_sin(model_config, positions)
    block = graph(Block, model_config)

    def layer(x, h):
        def attend(q, k, v):
            new = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
            return two_part_attention(q, x["kept"], new, seen, causal), new

        return apply(block, x["params"], h, *angles, attend)

    if isinstance(params["layers"], list):
        both = [{"params": p, "kept": k} for p, k in zip(params["layers"], keys, strict=True)]
    else:
        both = {"params": params["layers"], "kept": jax.tree.map(lambda *k: jnp.stack(k), *keys)}
    h, new = run_layers(layer, both, h, model_config.num_hidden_layers)
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1, mode="clip")[:, 0]
    return final_norm(params, model_config, last), [
        tuple(x[i] for x in new) for i in range(len(keys))
    ]


def decode_layers(params: dict, model_config: TextConfig) -> list[dict]:
    """The unstacked layers that `decode_step` takes, fused: made once, outside the loop, layer by layer, so that there
    is no second whole copy. A list is taken as it is.

    Adapters on kernels narrower than float32 stay beside them: their sum would be rounded to the kernel's type, and
    what adapters add in their first steps is less than that. The learner, which keeps them apart, would then not be
    the sampler.
    """
    layers = params["layers"]
    if isinstance(layers, list):
        return layers
    apart = unstack(layers, model_config.num_hidden_layers)
    q = layers["attn"]["q"]["kernel"]
    return (
        apart if q.dtype != jnp.float32 and split_adapters(layers)[1] else [fuse(p) for p in apart]
    )


def prompt_keys(cache: dict) -> list[tuple]:
    """[(k, v)] a layer, [B, K, S, d]: the layout in which keys are read, made once, outside the loop."""
    return [tuple(cache[x][i].transpose(0, 2, 1, 3) for x in "kv") for i in range(len(cache["k"]))]


def empty_own(model_config: TextConfig, rows: int, length: int, dtype) -> list[tuple]:
    """[(k, v)] a layer, zeros [R, K, length, d]: room for the keys of generated tokens."""
    shape = (rows, model_config.num_key_value_heads, length, model_config.head_dim)
    return [
        (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for _ in range(model_config.num_hidden_layers)
    ]


def decode_step(
    layers: list[dict],
    final: dict,
    model_config: TextConfig,
    h,
    positions,
    prompt: list[tuple],
    prompt_lengths,
    own: list[tuple],
    step,
    place=None,
):
    """One token for each row. h [R, 1, D], positions int [3, R, 1], rows in prompt order (R = B * n).

    layers from `decode_layers`, final = params["final"], prompt from `prompt_keys`, own from `empty_own` with
    slots < step filled. Each row attends to its prompt's keys and its own in one softmax. place: where these rows are
    not all of the prompts' rows, see `two_part_attention`.
    Returns (hidden [R, D] after the final norm, own with slot `step` filled).
    """
    cos, sin = rope.text_cos_sin(model_config, positions)
    seen = key_bias(jnp.arange(prompt[0][0].shape[2]) < prompt_lengths[:, None])[
        :, None, None, None, None
    ]
    mine = key_bias(jnp.arange(own[0][0].shape[2]) <= step)
    block = graph(Block, model_config, "qkv" in layers[0]["attn"])
    out = []
    for p, shared, (ko, vo) in zip(layers, prompt, own, strict=True):

        def attend(q, k, v, shared=shared, ko=ko, vo=vo):
            kv = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new.transpose(0, 2, 1, 3), step, 2)
                for old, new in ((ko, k), (vo, v))
            )
            return two_part_attention(q, shared, kv, seen, mine, place), kv

        h, kv = apply(block, p, h, cos, sin, attend)
        out.append(kv)
    return apply(graph(Final, model_config), final, h[:, 0]), out
