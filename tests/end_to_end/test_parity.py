"""The model equals transformers on hundreds of random configs: positions, image features, logits, greedy tokens.

transformers runs on torch in an environment of its own, .venv-oracle. Thousands of configs, by hand:

    .venv/bin/python tests/oracle/parity.py --seeds 0:3000 [--family qwen3_vl]
"""

import json
import subprocess
import sys

import cases
import cases_gemma3
import cases_qwen3_vl
import pytest
from places import ORACLE, ORACLE_PYTHON

from cxr_jax.models import registry

CONFIGS = 200
COUNTS = {"gemma3": 100}  # of families with fewer
BAR = 1e-4  # of the standard deviation


@pytest.fixture(scope="module")
def drawn():
    return [cases.draw(seed) for seed in range(CONFIGS)]


@pytest.fixture(scope="module")
def drawn_qwen3_vl():
    return [cases.draw(seed, "qwen3_vl") for seed in range(CONFIGS)]


def share(drawn, fact) -> float:
    return sum(bool(fact(c)) for c in drawn) / len(drawn)


@pytest.mark.parametrize(
    "name, fact",
    {
        "no block full": lambda c: not set(full(c)) & set(range(vision(c)["depth"])),
        "all blocks full": lambda c: len(full(c)) == vision(c)["depth"] > 1,
        "some blocks full": lambda c: (
            0 < len(set(full(c)) & set(range(vision(c)["depth"]))) < vision(c)["depth"]
        ),
        "window does not divide the grid": lambda c: any(
            x // merge(c) % side(c) for g in c.grids for x in g[1:]
        ),
        "several windows": lambda c: any(x // merge(c) > side(c) for g in c.grids for x in g[1:]),
        "merge size not 2": lambda c: merge(c) != 2,
        "frames": lambda c: (c.grids[:, 0] > 1).any(),
        "one frame a patch": lambda c: vision(c)["temporal_patch_size"] == 1,
        "text only": lambda c: not len(c.grids),
        "several images": lambda c: len(c.grids) > len(c.input_ids),
        "different grids": lambda c: len({tuple(g) for g in c.grids.tolist()}) > 1,
        "padding": lambda c: c.attention_mask is not None and not c.attention_mask.all(),
        "no mask": lambda c: c.attention_mask is None,
        "1,280 image tokens": lambda c: (c.input_ids == c.config["image_token_id"]).sum() == 1280,
        "key heads shared": lambda c: c.text["num_key_value_heads"] < c.text["num_attention_heads"],
        "3B's head ratio": lambda c: (
            c.text["num_attention_heads"] == 8 * c.text["num_key_value_heads"]
        ),
        "7B's head ratio": lambda c: (
            c.text["num_attention_heads"] == 7 * c.text["num_key_value_heads"]
        ),
        "tied": lambda c: "lm_head.weight" not in cases.shapes(c),
        "untied": lambda c: "lm_head.weight" in cases.shapes(c),
        "a section of zero": lambda c: 0 in sections(c),
        "flat": lambda c: "text_config" not in c.config,
        "nested, transformers 4": lambda c: "rope_scaling" in c.config.get("text_config", {}),
        "nested, transformers 5": lambda c: "rope_parameters" in c.config.get("text_config", {}),
        "deep": lambda c: max(c.text["num_hidden_layers"], vision(c)["depth"]) > 8,
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_drawn(drawn, name, fact):
    assert 0.015 <= share(drawn, fact) < 1, name


@pytest.mark.parametrize(
    "name, fact",
    {
        "quiet residual stream": lambda c: cases_qwen3_vl.is_quiet(c.seed),
        "large eps": lambda c: c.text["rms_norm_eps"] >= 0.3,
        "small eps": lambda c: c.text["rms_norm_eps"] <= 1e-5,
        "heads are not the width": lambda c: heads(c) != c.text["hidden_size"],
        "heads are wider": lambda c: heads(c) > c.text["hidden_size"],
        "odd-sided table": lambda c: table(c) % 2,
        "table of one row": lambda c: table(c) == 1,
        "table smaller than the grid": lambda c: any(x > table(c) for g in c.grids for x in g[1:]),
        "table larger than the grid": lambda c: any(x < table(c) for g in c.grids for x in g[1:]),
        "table is no square": lambda c: vision(c)["num_position_embeddings"] > table(c) ** 2,
        "one row or column of patches": lambda c: (c.grids[:, 1:] == 1).any(),
        "deep tower with taps": lambda c: vision(c)["depth"] > 8 and taps(c),
        "deep decoder with taps": lambda c: c.text["num_hidden_layers"] > 8 and taps(c),
        "tap of the first block": lambda c: 0 in taps(c),
        "tap of the last block": lambda c: vision(c)["depth"] - 1 in taps(c),
        "taps out of order": lambda c: taps(c) != sorted(taps(c)),
        "tap beyond the depth": lambda c: any(tap >= vision(c)["depth"] for tap in taps(c)),
        "as many taps as layers": lambda c: given(c) == c.text["num_hidden_layers"],
        "more taps than layers": lambda c: given(c) > c.text["num_hidden_layers"],
        "no tap": lambda c: not taps(c),
        "rows with and without images": lambda c: (
            0 < (c.input_ids == c.config["image_token_id"]).any(1).sum() < len(c.input_ids)
        ),
        "published heads and sections": lambda c: sections(c) == [24, 20, 20],
        "sections do not sum to half a head": lambda c: sum(sections(c)) != c.text["head_dim"] // 2,
        "a section of zero": lambda c: 0 in sections(c),
        "theta of the class": lambda c: (
            "rope_theta" not in c.text and "rope_theta" not in c.text.get("rope_parameters", {})
        ),
        "biases": lambda c: c.text["attention_bias"],
        "merge size not 2": lambda c: merge(c) != 2,
        "frames": lambda c: (c.grids[:, 0] > 1).any(),
        "text only": lambda c: not len(c.grids),
        "different grids": lambda c: len({tuple(g) for g in c.grids.tolist()}) > 1,
        "padding": lambda c: c.attention_mask is not None and not c.attention_mask.all(),
        "tied": lambda c: "lm_head.weight" not in cases.shapes(c),
        "untied": lambda c: "lm_head.weight" in cases.shapes(c),
        "transformers 4": lambda c: "rope_scaling" in c.text,
        "transformers 5": lambda c: "rope_parameters" in c.text,
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_drawn_of_qwen3_vl(drawn_qwen3_vl, name, fact):
    assert 0.015 <= share(drawn_qwen3_vl, fact) < 1, name


@pytest.fixture(scope="module")
def drawn_gemma3():
    return [cases.draw(seed, "gemma3") for seed in range(COUNTS["gemma3"])]


@pytest.mark.parametrize(
    "name, fact",
    {
        "a window smaller than the prompt": lambda c: (
            sliding(c) and c.text["sliding_window"] < c.lengths.max()
        ),
        "an image longer than the window": lambda c: (
            sliding(c) and c.text["sliding_window"] < c.config["mm_tokens_per_image"]
        ),
        "a window of one": lambda c: sliding(c) and c.text["sliding_window"] == 1,
        "layers of both kinds": lambda c: 0 < len(sliding(c)) < c.text["num_hidden_layers"],
        "no layer with a window": lambda c: not sliding(c),
        "every layer with a window": lambda c: len(sliding(c)) == c.text["num_hidden_layers"],
        "layers by the class's pattern": lambda c: (
            not {"layer_types", "sliding_window_pattern"} & c.text.keys()
        ),
        "two images parted by their frame": lambda c: adjacent(c),
        "several images in a row": lambda c: len(c.grids) > len(c.input_ids),
        "text only": lambda c: not len(c.grids),
        "padding": lambda c: c.attention_mask is not None and not c.attention_mask.all(),
        "heads are not the width": lambda c: heads(c) != c.text["hidden_size"],
        "scale is not the head size": lambda c: (
            c.text["query_pre_attn_scalar"] != c.text["head_dim"]
        ),
        "placeholder beyond the table": lambda c: c.image_id >= c.text["vocab_size"],
        "quiet residual stream": lambda c: c.seed % 5 == 0,
        "tied by the class": lambda c: "tie_word_embeddings" not in c.config,
        "untied": lambda c: "lm_head.weight" in cases.shapes(c),
        "linear rotation": lambda c: "linear" in json.dumps(c.config),
        "ropes by the kind": lambda c: "rope_parameters" in c.text,
        "ropes of the class": lambda c: not any("rope" in key for key in c.text),
        "one patch a token": lambda c: c.merge == 1,
        "16 patches a token": lambda c: c.merge == 4,
        "deep decoder": lambda c: c.text["num_hidden_layers"] > 8,
        "deep tower": lambda c: vision(c)["num_hidden_layers"] > 8,
        **{layout: lambda c, of=layout: c.layout == of for layout in cases_gemma3.LAYOUTS},
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_drawn_of_gemma3(drawn_gemma3, name, fact):
    assert 0.015 <= share(drawn_gemma3, fact) < 1, name


def sliding(c):
    """Layers that see a window, by the three spellings."""
    layers, text = range(c.text["num_hidden_layers"]), c.text
    if "layer_types" in text:
        return [layer for layer in layers if text["layer_types"][layer] == "sliding_attention"]
    every = text.get("sliding_window_pattern", 6)
    return [layer for layer in layers if (layer + 1) % every]


def adjacent(c):
    """Whether the end of an image stands before the start of another."""
    end, start = c.config["eoi_token_index"], c.config["boi_token_index"]
    return ((c.input_ids[:, :-1] == end) & (c.input_ids[:, 1:] == start)).any()


def vision(c):
    return c.config["vision_config"]


def heads(c):
    return c.text["num_attention_heads"] * c.text["head_dim"]


def table(c):
    return int(vision(c)["num_position_embeddings"] ** 0.5)


def taps(c):
    return vision(c)["deepstack_visual_indexes"]


def given(c):
    return sum(tap < vision(c)["depth"] for tap in taps(c))


def full(c):
    return vision(c)["fullatt_block_indexes"]


def merge(c):
    return vision(c)["spatial_merge_size"]


def side(c):
    return vision(c)["window_size"] // merge(c) // vision(c)["patch_size"]


def sections(c):
    return (c.text.get("rope_scaling") or c.text.get("rope_parameters"))["mrope_section"]


def test_seeds_differ_and_repeat():
    seeds = (*range(CONFIGS), 0)
    for family in LOOP_EVERY:
        drawn = [cases.draw(seed, family).config for seed in seeds]
        texts = [json.dumps(config, sort_keys=True) for config in drawn]
        assert len(set(texts)) == CONFIGS and texts[0] == texts[-1]


# Of every so many configs, one is decoded with the cache as well.
LOOP_EVERY = {"qwen2_5_vl": 4, "qwen3_vl": 8, "gemma3": 4}


@pytest.fixture(scope="module")
def all_results(tmp_path_factory):
    """One dict a case (`parity.Result`)."""
    if not ORACLE_PYTHON.exists():
        pytest.skip(
            "no .venv-oracle (torch and transformers): `bash launch/test.sh` makes it, given a package index"
        )
    out = tmp_path_factory.mktemp("parity") / "results.jsonl"
    arguments = {
        "seeds": ",".join(f"0:{COUNTS.get(family, CONFIGS)}" for family in LOOP_EVERY),
        "family": ",".join(LOOP_EVERY),
        "loop_every": ",".join(map(str, LOOP_EVERY.values())),
        "jsonl": out,
    }
    # One process, which compiles on every core: the libraries of both sides are imported once.
    command = [sys.executable, ORACLE / "parity.py", *(f"--{k}={v}" for k, v in arguments.items())]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode in (0, 1), done.stdout[-4000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module", params=[family.model_type for family in registry.FAMILIES])
def results(all_results, request):
    found = [result for result in all_results if result["family"] == request.param]
    assert [r["seed"] for r in found] == list(range(COUNTS.get(request.param, CONFIGS)))
    return found


def failing(results, bad) -> list[dict]:
    return [r for r in results if bad(r)]


@pytest.mark.slow
def test_positions_are_identical(results):
    assert not failing(results, lambda r: r["positions"])


@pytest.mark.slow
def test_image_features(results):
    assert not failing(results, lambda r: not r["features"] <= BAR)
    assert sum(r["features"] > 0 for r in results) > len(results) / 2


@pytest.mark.slow
def test_logits(results):
    assert not failing(results, lambda r: not r["logits"] <= BAR)


@pytest.mark.slow
def test_greedy_tokens_are_identical(results):
    """The choice after every prefix in all configs; the decode loop with its cache in some. Where the two
    best tokens tie to within rounding, either may come out on another processor; thousands of choices hold few."""
    assert not failing(results, lambda r: r["tokens"] and not r["gap"] <= BAR)
    assert len(failing(results, lambda r: r["tokens"])) <= 2


@pytest.mark.slow
def test_transformers_spelling_of_the_config_reads_the_same(results):
    assert not failing(results, lambda r: not r["config"])


@pytest.mark.slow
def test_the_reference_agrees_with_itself(results):
    """transformers' `generate`, with its cache, gives the tokens that its full passes give."""
    assert not failing(results, lambda r: not r["generate"])
