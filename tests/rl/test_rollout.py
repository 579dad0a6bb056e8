"""What a rollout and an evaluation read of a completion behind what its prompt opened; without a model."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_rewards
import pytest
from chat_templates import OPENED, tokenizer_with
from ml_collections import ConfigDict

from cxr_jax import rewards
from cxr_jax.config.sections import RunConfig
from cxr_jax.evaluation import reader as readers
from cxr_jax.inference import prompts
from cxr_jax.labels import CHEXPERT_14, answers
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.metrics import alarms
from cxr_jax.models import network
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl.config import PHANTOM
from cxr_jax.report import group_records
from cxr_jax.rl import rollout
from cxr_jax.runtime import layout
from cxr_jax.training import micro_batches
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
