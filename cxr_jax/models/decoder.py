"""The Qwen2.5 decoder: grouped-query attention with qkv bias, SwiGLU, M-RoPE; full pass and KV cache.

Right padding everywhere: row b's tokens are the first lengths[b].
"""

import jax
import jax.numpy as jnp
from flax import nnx

from cxr_jax.models import rope
from cxr_jax.models.config import TextConfig
from cxr_jax.models.layers import (
    MLP,
    NEG,
    Linear,
    RMSNorm,
    apply,
    attention,
    graph,
    init_stacked,
    run_layers,
)


class Attention(nnx.Module):
    """Projections around `attend`; `attend(q [B,T,H,d], k, v [B,T,K,d]) -> [B,T,H,d]` picks the keys."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        D, hd = cfg.hidden_size, cfg.head_dim
        self.q = Linear(D, cfg.num_attention_heads * hd, bias=True, rngs=rngs)
        self.k = Linear(D, cfg.num_key_value_heads * hd, bias=True, rngs=rngs)
        self.v = Linear(D, cfg.num_key_value_heads * hd, bias=True, rngs=rngs)
        self.o = Linear(cfg.num_attention_heads * hd, D, bias=False, rngs=rngs,
                        scale=(2 * cfg.num_hidden_layers) ** -0.5)
        self.head_dim = hd

    def __call__(self, x, cos, sin, attend):
        B, T, _ = x.shape
        q, k, v = (f(x).reshape(B, T, -1, self.head_dim) for f in (self.q, self.k, self.v))
        o = attend(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v)
        return self.o(o.reshape(B, T, -1))


class Block(nnx.Module):
    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attn = Attention(cfg, rngs=rngs)
        self.norm2 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, bias=False, rngs=rngs,
                       out_scale=(2 * cfg.num_hidden_layers) ** -0.5)

    def __call__(self, x, cos, sin, attend):
        x = x + self.attn(self.norm1(x), cos, sin, attend)
        return x + self.mlp(self.norm2(x))


class Final(nnx.Module):
    """The last normalisation."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        del rngs
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def __call__(self, x):
        return self.norm(x)


def init_params(cfg: TextConfig, key, tied: bool) -> dict:
    """Fresh parameters: {"embed": {"embedding" [V, D]}, "layers" (stacked), "final", "head" if untied}."""
    a, b, c = jax.random.split(key, 3)
    normal = lambda k, shape: 0.02 * jax.random.normal(k, shape, jnp.float32)
    params = {
        "embed": {"embedding": normal(a, (cfg.vocab_size, cfg.hidden_size))},
        "layers": init_stacked(Block, cfg, key=b, n=cfg.num_hidden_layers),
        "final": {"norm": {"scale": jnp.ones((cfg.hidden_size,), jnp.float32)}},
    }
    if not tied:
        params["head"] = {"kernel": normal(c, (cfg.hidden_size, cfg.vocab_size))}
    return params


def causal_bias(mask):
    """float32 [B, 1, 1, T, T]: 0 where query t may see key s (s <= t and mask[b, s]), else very negative."""
    T = mask.shape[1]
    allowed = jnp.tril(jnp.ones((T, T), bool))[None] & mask.astype(bool)[:, None, :]
    return jnp.where(allowed, 0.0, NEG).astype(jnp.float32)[:, None, None]


def final_norm(params: dict, cfg: TextConfig, h):
    return apply(graph(Final, cfg), params["final"], h)


def forward(params: dict, cfg: TextConfig, h, positions, mask, *, remat: str = "none"):
    """h [B, T, D], positions int [3, B, T], mask bool [B, T] -> hidden [B, T, D] after the final norm."""
    cos, sin = rope.text_cos_sin(cfg, positions)
    bias = causal_bias(mask)
    block = graph(Block, cfg)
    attend = lambda q, k, v: attention(q, k, v, bias)
    layer = lambda p, x: apply(block, p, x, cos, sin, attend)
    h = run_layers(layer, params["layers"], h, cfg.num_hidden_layers, remat)
    return final_norm(params, cfg, h)
