"""A tiny random model with the phantom tokenizer, its images and constraints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import cxr_jax
from cxr_jax.data import prompts as data_prompts
from cxr_jax.models import tokenizer
from cxr_jax.models.qwen2_5_vl.config import PHANTOM, TextConfig, VisionConfig

V, N_IMAGE = 960, 64  # more ids than the tokenizer has; 224 px are 8 x 8 image tokens
TOKENIZER = tokenizer.load(str(cxr_jax.asset("phantom")))
CFG = dataclasses.replace(
    PHANTOM,
    **tokenizer.config_ids(TOKENIZER),
    vision=VisionConfig(
        depth=1,
        hidden_size=16,
        num_heads=2,
        intermediate_size=16,
        out_hidden_size=32,
        fullatt_block_indexes=(0,),
    ),
    text=TextConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(1, 1, 2),
        rope_theta=1e4,
        max_position_embeddings=400,
    ),
)
FIND = data_prompts.FIND_PROMPT
STOP = CFG.eos_token_id[0]


def image(i: int) -> np.ndarray:
    return np.random.default_rng(i).random((224, 224), np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Words:
    """A constraint: `first` holds the tokens that may come at even steps, `second` those at odd ones."""

    first: jax.Array  # bool [V]
    second: jax.Array

    def init(self, rows):
        return jnp.zeros(rows, jnp.int32)

    def allowed(self, state):
        return jnp.where((state % 2 == 0)[:, None], self.first, self.second)

    def advance(self, state, token):
        return state + 1


def words(first, second):
    """The constraint that alternates between words of one token each."""
    ids = lambda texts: [
        i for t in texts for i in TOKENIZER(t, add_special_tokens=False)["input_ids"]
    ]
    assert len(ids(first)) == len(first) and len(ids(second)) == len(second)
    return Words(
        *(jnp.zeros(V, bool).at[jnp.array(ids(texts))].set(True) for texts in (first, second))
    )


def close(a, b):
    """Equal completions, but for the rounding of log-probs."""
    assert a.token_ids == b.token_ids and a.text == b.text and a.finish_reason == b.finish_reason
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
