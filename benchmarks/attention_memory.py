"""What attention of the learner's case takes, `xla` beside `blocked`, without running it.

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/attention_memory.py [--completion 512 1824 4096]

One layer's attention of 16 completions over a shared prompt of 320 tokens and their own tokens, with its gradient, at
the heads of Qwen2.5-VL 3B in bfloat16. Temporary memory is the compiler's, for CPUs, with plain attention (see
`cxr_jax/plan.py`); FLOPs are counted from the jaxpr (`cxr_jax/planning/costs.py`). `blocked` computes the scores once
more in the backward pass (7 products in place of 6), of half of the own part.

2026-11-30, jax 0.10.2, the command above:

                  temporary, GiB              TFLOP with the gradient     TFLOP, forward
    completion    xla     blocked             xla     blocked             xla     blocked
           512     1.44      0.51  2.8 x      0.17       0.15  0.90       0.06       0.04  0.77
         1,824    13.34      1.76  7.6 x      1.54       1.18  0.77       0.51       0.34  0.66
         4,096    61.51      3.76 16.4 x      7.11       4.81  0.68       2.37       1.37  0.58
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cxr_jax.models import attention
from cxr_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B
from cxr_jax.plan import WITHOUT_HIDDEN_MEMORY
from cxr_jax.planning import costs

PROMPT = 320  # tokens: a film of 476 px and its question
COMPLETIONS = 16
TEXT = QWEN2_5_VL_3B.text


def attend_fn(kind: str, completion: int) -> Callable:
    """Attention of the completions: (queries, prompt keys, prompt values, own keys, own values) -> output."""
    attend = attention.following_attention(
        jnp.array([PROMPT]),
        slots=PROMPT,
        own_slots=completion,
        rows=COMPLETIONS * TEXT.num_attention_heads,
        kind=kind,
    )
    return lambda queries, *keys: attend(queries, keys[:2], keys[2:])


def gradient_fn(kind: str, completion: int) -> Callable:
    """The gradient of everything, for a cotangent that is given."""
    attend = attend_fn(kind, completion)

    def loss(cotangent: jax.Array, *arrays: jax.Array) -> jax.Array:
        return jnp.vdot(attend(*arrays), cotangent).astype(jnp.float32)

    return jax.value_and_grad(loss, (1, 2, 3, 4, 5))


def shapes(completion: int) -> list[Any]:
    """The arrays, abstract."""
    rows, heads, head_dim = COMPLETIONS, TEXT.num_attention_heads, TEXT.head_dim
    key_heads = TEXT.num_key_value_heads
    queries = (rows, completion, heads, head_dim)
    prompt, own = (1, key_heads, PROMPT, head_dim), (rows, key_heads, completion, head_dim)
    return [
        jax.ShapeDtypeStruct(shape, "bfloat16") for shape in (queries, prompt, prompt, own, own)
    ]


def main() -> None:
    """Print a row a length, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--completion", type=int, nargs="+", default=[512, 1824, 4096])
    for completion in parser.parse_args().completion:
        arrays = shapes(completion)
        memory, gradient, forward = {}, {}, {}
        for kind in ("xla", "blocked"):
            function = gradient_fn(kind, completion)
            lowered = jax.jit(function).lower(arrays[0], *arrays)
            analysis = lowered.compile(compiler_options=WITHOUT_HIDDEN_MEMORY).memory_analysis()
            memory[kind] = analysis.temp_size_in_bytes / 2**30
            gradient[kind] = costs.flops(function, arrays[0], *arrays) / 1e12
            forward[kind] = costs.flops(attend_fn(kind, completion), *arrays) / 1e12
        print(
            f"{completion:8,} tokens: temporary {memory['xla']:6.2f} -> {memory['blocked']:5.2f} GiB"
            f" ({memory['xla'] / memory['blocked']:4.1f} x less); TFLOP with the gradient"
            f" {gradient['xla']:5.2f} -> {gradient['blocked']:5.2f}"
            f" ({gradient['blocked'] / gradient['xla']:.2f}), forward {forward['xla']:5.2f} ->"
            f" {forward['blocked']:5.2f} ({forward['blocked'] / forward['xla']:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
