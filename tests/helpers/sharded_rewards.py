"""A program for 4 made CPU devices: do rewards of rows that are spread over them equal those on one? Prints a line."""

import os

import fast_compile

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {fast_compile.FLAGS}"

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cxr_jax import rewards
from cxr_jax.labels import answers, phrase_reading
from cxr_jax.labels.phrase_bank import load_phrase_bank

TEXTS = [
    "<think>Small left effusion. No pneumothorax. Possible edema.</think><answer>Pleural Effusion</answer>",
    "<think>Right lung: dense consolidation.\n\n- Heart is enlarged</think>\n<answer>Cardiomegaly, x</answer>\n",
    "",
    "<think>" + "no effusion is seen. " * 12 + "</think><answer>No Finding, Edema</answer>",
] * 4


def main() -> None:
    table = answers.TokenBytes.from_pieces([bytes([b]) for b in range(256)])
    tokens = np.zeros((len(TEXTS), 320), np.int32)
    lengths = np.array([len(t) for t in TEXTS], np.int32)
    for row, text in zip(tokens, TEXTS, strict=True):
        row[: len(text)] = list(text.encode())
    solution = np.zeros((len(TEXTS), 14), bool)
    solution[:, 10] = True
    truth = phrase_reading.Truth.from_arrays(
        solution, ~solution, np.ones((*solution.shape, 2), bool)
    )

    @jax.jit
    def terms(tokens, lengths, solution, truth):
        parsed = rewards.read_tokens(tokens, lengths, table, 400, load_phrase_bank(), truth)
        return rewards.reward_terms(parsed, solution, lengths, max_length=300, limit=320)

    one = terms(*jax.device_put((tokens, lengths, solution, truth), jax.devices()[0]))
    rows = NamedSharding(Mesh(jax.devices(), "data"), PartitionSpec("data"))
    four = terms(*jax.device_put((tokens, lengths, solution, truth), rows))
    assert set(one) == set(rewards.TERMS)
    for name, value in one.items():
        np.testing.assert_array_equal(value, four[name], name)
        assert len(four[name].sharding.device_set) == 4, name
    print("same on", len(jax.devices()))


if __name__ == "__main__":
    main()
