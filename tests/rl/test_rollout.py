"""What a rollout and an evaluation read of a completion behind what its prompt opened; without a model."""

import dataclasses
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import oracle_rewards
import pytest
from chat_templates import OPENED, tokenizer_with
from ml_collections import ConfigDict

from cxr_jax import rewards
from cxr_jax.config.sections import RunConfig
from cxr_jax.errors import UserError
from cxr_jax.evaluation import reader as readers
from cxr_jax.inference import prompts
from cxr_jax.inference.sampling import SamplingSettings
from cxr_jax.labels import CHEXPERT_14, answers
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.metrics import alarms
from cxr_jax.models import network
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl.config import PHANTOM, QWEN2_5_VL_3B
from cxr_jax.report import group_records
from cxr_jax.rl import rollout
from cxr_jax.rl.algorithms import ALGORITHMS
from cxr_jax.runtime import layout
from cxr_jax.training import checks, micro_batches
from experiments import rl as experiment

GRID, C, G = (1, 4, 4), 40, 2
# What models write behind <think>, behind an empty trace, and from the start.
WRITTEN = [
    "Possible edema.</think><answer>Edema</answer>",
    "<answer>Edema</answer>",
    "<think>No edema.</think>\n<answer>Pneumonia</answer>",
    "Wet.</think>\n\n<answer>Edema, Edema</answer>",
]


def written(tokenizer):
    """(tokens [4, C], lengths [4]) of the texts, each with its end of turn."""
    tokens, lengths = np.zeros((4, C), np.int32), np.zeros(4, np.int32)
    for row, text in enumerate(WRITTEN):
        ids = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, lengths


def truth(rows):
    solution = np.tile(np.array(CHEXPERT_14) == "Edema", (rows, 1))
    return {
        "solution": solution,
        "known": np.ones_like(solution),
        "hedged": np.zeros_like(solution),
        "sides": np.zeros((rows, 14, 2), bool),
    }


def expected(opened):
    scores = [oracle_rewards.score(opened + text, "Edema", 0) for text in WRITTEN]
    return {
        name: np.array([score[name] for score in scores], np.float32)
        for name in ("accuracy", "format", "tag_count", "accuracy_hard")
    }


@pytest.mark.parametrize(
    ("changes", "shards", "dtype", "memory", "want"),
    [
        # 64 prompts x 16 completions of 1,800 tokens by the 3B: 36,864 bytes a token, 1.0 GiB a group.
        ({}, 8, "bfloat16", None, 1),  # 8 groups, 7.99 GiB
        ({}, 8, "float32", None, 2),
        ({}, 8, "bfloat16", 16 * 2**30, 2),
        ({}, 8, "bfloat16", 80 * 2**30, 1),
        ({}, 1, "bfloat16", None, 8),
        ({}, 1, "bfloat16", 141 * 2**30, 2),
        ({"sample_micro_batches": 4}, 1, "bfloat16", 141 * 2**30, 4),
        ({"prompts_per_step": 7}, 1, "bfloat16", 4 * 6 * 2**30, 7),
        ({"prompts_per_step": 3, "oversample": 2}, 1, "bfloat16", 4 * 3 * 2**30, 2),
        ({"group_size": 512}, 8, "bfloat16", 80 * 2**30, 8),  # one prompt is the least
    ],
)
def test_a_rollout_takes_as_few_turns_as_fit(changes, shards, dtype, memory, want):
    settings = RunConfig.from_config(experiment.get_config("nv_reason_3b"))
    chosen = rollout.with_turns(
        dataclasses.replace(settings.rollout, **changes),
        QWEN2_5_VL_3B,
        prompt_width=300,
        max_completion=settings.max_completion,
        dtype=dtype,
        shards=shards,
        shares=1,
        device_memory=memory,
    )
    assert chosen.sample_micro_batches == want


@pytest.mark.parametrize(
    ("preset", "shards", "want"),
    [
        # 64 prompts x 16; in minibatches 16 prompts x 16.
        ("nv_reason_3b", 64, 1),
        ("nv_reason_3b", 128, 2),
        ("nv_reason_3b", 1024, 16),
        ("nv_reason_3b,dapo", 16, 1),
        ("nv_reason_3b,dapo", 128, 8),
        ("nv_reason_3b,dapo", 256, 16),
        ("nv_reason_3b,dapo", 512, None),  # more than the completions of 16 prompts
        ("nv_reason_3b", 24, None),
        ("nv_reason_3b", 48, None),
    ],
)
def test_few_prompts_on_many_devices_share_out_their_completions(preset, shards, want):
    settings = RunConfig.from_config(experiment.get_config(preset))
    assert checks.group_shares(settings, shards) == (want or 1)
    with pytest.raises(UserError, match="do not divide") if want is None else nullcontext():
        checks.check_rows_divide(settings, shards)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_of_the_published_batch_runs_on_256_devices(algorithm):
    settings = RunConfig.from_config(experiment.get_config(f"nv_reason_3b,{algorithm}"))
    for shards in (8, 64, 128, 256):
        checks.check_rows_divide(settings, shards)


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, {}),  # the program of runs that narrow nothing is as it was
        ({"top_k": 5}, {"top_k": 5, "logs_kept": True}),
        (
            {"top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
            {"top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "logs_kept": True},
        ),
    ],
)
def test_what_a_rollout_draws_from(changes, want):
    settings = RunConfig.from_config(experiment.get_config())
    assert rollout.token_choice_of(dataclasses.replace(settings.rollout, **changes)) == want
    SamplingSettings(max_new_tokens=1, **want)


def test_a_rollout_judges_the_whole_turn():
    opened = OPENED["think"]
    tokenizer = tokenizer_with(opened)
    settings = RunConfig.from_config(experiment.get_config())
    encoder = prompts.Prompts(tokenizer, PHANTOM, GRID, C)
    program = rollout._Rollout(
        rollout=ConfigDict(dict(settings.rollout.__dict__, group_size=G)),
        model_config=PHANTOM,
        images=encoder.images,
        special=tokenizers.special_ids(tokenizer),
        table=answers.TokenBytes.from_tokenizer(tokenizer),
        trainable=None,
        bank=load_phrase_bank(),
        seed=0,
        max_completion=C,
    )
    batch = {"prompts": encoder.encode(["Find."] * 2), **truth(2)}
    # As the program cuts them: what was opened goes with its prompt.
    parts = micro_batches.cut({"image": np.zeros((2, 1)), "prompts": batch["prompts"]}, 2)
    assert "opened" not in parts["prompts"] or parts["prompts"]["opened"].shape[:2] == (2, 1)
    tokens, lengths = written(tokenizer)
    completions = {"tokens": jnp.asarray(tokens), "lengths": jnp.asarray(lengths)}
    _, terms = jax.jit(program.score)(batch, completions)
    for name, want in expected(opened).items():
        np.testing.assert_array_equal(terms[name], want, err_msg=name)
    shown = rewards.score([opened + text for text in WRITTEN], ["Edema"] * 4)
    for name in ("trace_answer", "trace_findings", "trace_false", "trace_coverage"):
        np.testing.assert_allclose(terms[name], shown[name], err_msg=name)

    # The records for people hold the text that was judged.
    samples = {
        "tokens": tokens.reshape(2, G, C),
        "lengths": lengths.reshape(2, G),
        "finished": np.ones((2, G), bool),
        "reward": np.arange(4.0).reshape(2, G),
        "advantages": np.ones((2, G)),
        "terms": {name: np.asarray(term).reshape(2, G) for name, term in terms.items()},
        "answer": np.zeros((2, G, 14), bool),
        "train_mask": np.ones((2, G, C), bool),
        "kept": np.arange(2),
    }
    batch["image"] = np.zeros((2, 4, 4))
    groups = group_records.groups_of(samples, batch, tokenizer, step=1, weights={})
    texts = {completion.text for group in groups for completion in group.completions}
    assert texts == {opened + text for text in WRITTEN}


@pytest.mark.parametrize("opened", [OPENED["empty_think"], OPENED["preface"]])
def test_an_evaluation_judges_the_whole_turn(opened, monkeypatch):
    tokenizer = tokenizer_with(opened)
    encoder = prompts.Prompts(tokenizer, PHANTOM, GRID, C)
    tokens, lengths = written(tokenizer)
    drawn = {"tokens": jnp.asarray(tokens), "lengths": jnp.asarray(lengths)}
    monkeypatch.setattr(readers.sampling, "sample_completions", lambda *args, **kw: drawn)
    monkeypatch.setattr(network, "vision", lambda *args, **kw: None)
    reader = readers.Reader(PHANTOM, tokenizer, encoder, 4, layout=layout.ONE_DEVICE)
    readings = reader.read({}, np.zeros((4, 28, 28)), ["Find."] * 4)
    want = expected(opened)
    np.testing.assert_array_equal(readings.valid, want["format"] == 1)
    assert reader.texts(readings, range(4)) == [opened + text for text in WRITTEN]
    if opened == OPENED["empty_think"]:  # one program is enough
        got = reader.score_traces(readings, truth(4))
        shown = rewards.score([opened + text for text in WRITTEN], ["Edema"] * 4)
        for name in ("trace_answer", "trace_findings", "trace_false", "trace_coverage"):
            np.testing.assert_allclose(got[name], shown[name], err_msg=name)
    # What would have been missed without: answers are right, and no format is held.
    rings = alarms.format_never_held(want["accuracy"].mean(), readings.valid.mean())
    assert rings == (opened == "Certainly. ")
