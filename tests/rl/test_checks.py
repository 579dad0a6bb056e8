"""An RL config that cannot work is refused in one line, before anything compiles and before anything is written."""

import json
import math
import pathlib
import shutil

import chat_templates
import jax
import numpy as np
import pytest
from PIL import Image
from places import ROOT

from cxr_jax.errors import UserError
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.rl import checks
from cxr_jax.weights import pretrained

NAN, INF = math.nan, math.inf
KNOBS = dict(
    num_iterations=1,
    minibatches=1,
    advantage="grpo",
    scale_rewards="group",
    aggregation="token",
    denominator="trained",
    ratio_level="token",
    clip="ppo",
    epsilon=0.2,
    epsilon_high=0.2,
    delta=0.0,
    beta=0.0,
    kl="k3",
    sampler_correction="none",
    sampler_cap=2.0,
    replay_weight=0.0,
    replay_batch=8,
    patience=0,
)
NOT_COUNTS, NOT_NUMBERS = (
    [0, -1, 1.5, NAN, "2", None, True, 10**30],
    [NAN, INF, -INF, "1", None, True, 10**400],
)
BAD = {
    **dict.fromkeys(
        [
            "steps",
            "max_completion",
            "save_every",
            "rl.prompts_per_step",
            "rl.micro_batches",
            "rl.minibatches",
            "rl.num_iterations",
            "rl.oversample",
            "rl.min_length",
            "rl.replay_batch",
            "eval.every",
            "eval.n",
            "eval.batch_size",
        ],
        NOT_COUNTS,
    ),
    "rl.group_size": [*NOT_COUNTS, 1],
    **dict.fromkeys(
        ["rl.patience", "data.sites", "optim.warmup_steps", "lora.rank"], [-1, 0.5, NAN, "1", None]
    ),
    **dict.fromkeys(["optim.lr", "optim.eps"], [*NOT_NUMBERS, 0.0, -1e-4, 1e39, 1e-60]),
    **dict.fromkeys(
        ["rl.temperature", "rl.epsilon_high", "rl.repetition_penalty"], [*NOT_NUMBERS, 0.0, -1.0]
    ),
    **dict.fromkeys(["rl.beta", "rl.replay_weight", "optim.weight_decay"], [*NOT_NUMBERS, -0.1]),
    **dict.fromkeys(["optim.b1", "optim.b2"], [*NOT_NUMBERS, -0.1, 1.0, 1 - 1e-12]),
    "optim.final_fraction": [*NOT_NUMBERS, -0.1, 1.1],
    "optim.clip_norm": [NAN, -INF, 0.0, -1.0, "1", None],
    "rl.epsilon": [*NOT_NUMBERS, 0.0, -0.2, 1.5],
    "rl.delta": [*NOT_NUMBERS, -1.0, 0.5, 1.2],
    "rl.sampler_cap": [*NOT_NUMBERS, 0.0, 0.5, -2.0],
    "rl.top_p": [*NOT_NUMBERS, 0.0, -0.1, 1.1],
    "rl.min_p": [*NOT_NUMBERS, -0.1, 1.0],
    **dict.fromkeys(["rl.top_k", "rl.sample_micro_batches"], [-1, 0.5, NAN, "1", None]),
    "rl.overlong_from": [*NOT_NUMBERS, 0.0, 1.0],
    "rl.mask_truncated": [None, 1, "yes"],
    **dict.fromkeys(
        [
            "rl.advantage",
            "rl.scale_rewards",
            "rl.aggregation",
            "rl.denominator",
            "rl.ratio_level",
            "rl.clip",
            "rl.kl",
            "rl.sampler_correction",
            "eval.select_by",
            "data.source",
            "data.hospital",
        ],
        ["", "beauty", None, 1, ["k1"]],
    ),
    **dict.fromkeys(["seed", "data.seed"], [-1, 2**32, 0.5, NAN, "1", None]),
    "optim.frozen": ["vision", ("(",), (1,), None, ("ears",), (".",)],
    "model": ["", None, 3, "random:9b", "nowhere"],
    "rl": [None, 5],
    "optim": [None, "adam"],
    "rl.reward_weights": [None, 1.0, "accuracy"],
}
GOOD = {
    "rl.group_size": [2],
    "rl.patience": [0, 3],
    "rl.beta": [0.04, 1],
    "rl.top_k": [0, 50],
    "rl.top_p": [1, 0.9],
    "rl.min_p": [0, 0.05],
    "rl.repetition_penalty": [1, 1.05, 0.9],
    "rl.kl": ["k1", "k2"],
    "rl.epsilon": [1.0, 3e-4],
    "rl.epsilon_high": [5.0],
    "rl.delta": [1.5],
    "rl.sampler_cap": [1.0],
    "rl.advantage": ["gdpo"],
    "rl.aggregation": ["sequence", "token_local", "constant"],
    "rl.ratio_level": ["sequence", "sequence_token"],
    "rl.clip": ["cispo", "none"],
    "rl.sampler_correction": ["tis", "icepop"],
    "rl.denominator": ["all"],
    "rl.scale_rewards": ["batch", "none"],
    "optim.clip_norm": [INF],
    "optim.b1": [0.0],
    "optim.final_fraction": [0, 1],
    "data.sites": [64],
    "optim.frozen": [("vision",)],
    "seed": [2**32 - 1],
}


@pytest.fixture(autouse=True)
def compiled():
    """The programs that were compiled so far in a test."""
    found = []
    hear = lambda name, seconds, **_: found.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(hear)
    yield found
    jax.monitoring.unregister_event_duration_listener(hear)


def preset(**changes):
    """The phantom preset with every knob there is, and changes {dotted key: value} of any type."""
    space = {}
    exec((ROOT / "experiments" / "rl.py").read_text(), space)
    config = space["get_config"]()
    config.model = "random:phantom"
    with config.unlocked():
        config.rl.update({k: v for k, v in KNOBS.items() if k not in config.rl})
        config.data.sites = 0
        for key, value in changes.items():
            *path, name = key.split(".")
            section = config
            for part in path:
                section = section[part]
            if name in section:
                del section[name]  # or the value would be cast to the type of what is there
            section[name] = value
    return config


def refused(compiled, config, *named):
    with pytest.raises(UserError) as e:
        checks.check(config)
    line = str(e.value)
    assert "\n" not in line and all(n in line for n in named), line
    assert compiled == []


@pytest.mark.parametrize("key", BAD)
def test_absurd_values(compiled, key):
    for value in BAD[key]:
        refused(compiled, preset(**{key: value}), f"config.{key}")


@pytest.mark.parametrize("key", GOOD)
def test_values_at_the_border_pass(compiled, key):
    for value in GOOD[key]:
        checks.check(preset(**{key: value}))
    assert compiled == []


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts_per_step": 16, "micro_batches": 3},
        {"prompts_per_step": 16, "minibatches": 3},
        {"prompts_per_step": 16, "minibatches": 4, "micro_batches": 8},
    ],
)
def test_batches_that_do_not_divide(compiled, changes):
    refused(
        compiled,
        preset(**{f"rl.{k}": v for k, v in changes.items()}),
        "config.rl.prompts_per_step=16 does not divide into",
        "micro-batches",
    )


@pytest.mark.parametrize(("oversample", "turns"), [(1, 3), (1, 32), (3, 5)])
def test_turns_of_a_rollout_that_do_not_divide(compiled, oversample, turns):
    changes = {"prompts_per_step": 16, "oversample": oversample, "sample_micro_batches": turns}
    refused(
        compiled,
        preset(**{f"rl.{key}": value for key, value in changes.items()}),
        f"config.rl.sample_micro_batches={turns}",
        f"the {16 * oversample} prompts of a step",
    )


def test_batches_that_divide():
    checks.check(preset(**{"rl.prompts_per_step": 16, "rl.minibatches": 4, "rl.micro_batches": 2}))
    # Turns of the sampler divide what is drawn, whatever the learner divides.
    checks.check(
        preset(**{"rl.prompts_per_step": 5, "rl.oversample": 3, "rl.sample_micro_batches": 15})
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("advantage", ["grpo", "gdpo"])
def test_a_group_of_one_has_no_advantage(compiled, scale, advantage):
    refused(
        compiled,
        preset(**{"rl.group_size": 1, "rl.scale_rewards": scale, "rl.advantage": advantage}),
        "config.rl.group_size=1",
    )


def test_bounds_that_would_cut_what_is_right(compiled):
    checks.check(preset(**{"rl.clip": "none", "rl.delta": 1.1}))
    refused(compiled, preset(**{"rl.clip": "none", "rl.delta": 0.9}), "config.rl.delta=0.9")
    refused(
        compiled,
        preset(**{"rl.sampler_correction": "icepop", "rl.sampler_cap": 1.0}),
        "config.rl.sampler_cap=1.0",
    )


@pytest.mark.parametrize(
    "weights, named",
    [
        ({"beauty": 1.0}, "'beauty'"),
        ({"accuracy": NAN}, "accuracy=nan"),
        ({"accuracy": "1"}, "accuracy='1'"),
        ({"accuracy": INF}, "accuracy=inf"),
        ({"accuracy": 0.0}, "weighs nothing"),
        ({}, "weighs nothing"),
    ],
)
def test_rewards(compiled, weights, named):
    config = preset()
    config.unlock()
    config.rl.reward_weights = type(config)(weights)
    refused(compiled, config, "config.rl.reward_weights", named)


def test_adapters(compiled):
    lora = {"lora.rank": 4, "rl.beta": 0.04}
    checks.check(preset(**lora))  # the reference is the model with its adapters switched off
    refused(compiled, preset(**lora, **{"lora.targets": ("ears",)}), "'ears'")
    refused(compiled, preset(**lora, **{"lora.alpha": NAN}), "alpha")
    refused(compiled, preset(**lora, **{"optim.frozen": ("vision",)}), "config.optim.frozen")
    refused(compiled, preset(**{"lora.rank": 4096}), "lora rank 4096")


# Model folders


@pytest.fixture
def folder(tmp_path):
    """(**{file name without .json: change(dict)}) -> config of a copy of the embedded model that is changed so."""

    def make(**changes):
        out = tmp_path / "model"
        shutil.copytree(pretrained.PHANTOM, out, ignore=shutil.ignore_patterns("*.safetensors"))
        (out / "model.safetensors").touch()  # nobody reads the weights
        for name, change in changes.items():
            content = json.loads((out / f"{name}.json").read_text())
            change(content)
            (out / f"{name}.json").write_text(json.dumps(content))
        return preset(model=str(out))

    return make


def without(token):
    return lambda t: [
        a.update(content="<|gone|>") for a in t["added_tokens"] if a["content"] == token
    ]


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|vision_start|>"]
)
def test_a_tokenizer_without_a_special_token(compiled, folder, token):
    unnamed = lambda c: c.update(eos_token=None, pad_token=None)
    config = folder(tokenizer=without(token), tokenizer_config=unnamed)
    refused(compiled, config, config.model, "lacks the special token", token)


def test_an_end_of_turn_that_the_model_never_learned(compiled, folder):
    config = folder(
        tokenizer=without("<|im_end|>")
    )  # transformers adds what tokenizer_config.json names
    refused(compiled, config, config.model, "<|im_end|> is 927", "eos_token_id")


@pytest.mark.parametrize("tag", tokenizers.FORMAT_TAGS)
def test_a_tokenizer_that_cannot_write_a_tag(compiled, folder, tag):
    hide = lambda t: [a.update(special=True) for a in t["added_tokens"] if a["content"] == tag]
    config = folder(tokenizer=hide)
    refused(compiled, config, config.model, tag)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"image_token_id": 916}, "image_token_id 916"),
        ({"vocab_size": 900}, "the model embeds 900"),
        ({"max_position_embeddings": 128}, "more than the 128 positions"),
    ],
)
def test_a_model_config_that_does_not_fit(compiled, folder, changes, named):
    refused(compiled, folder(config=lambda c: c.update(changes)), named)


# Files


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name in "abc":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60), np.uint8)).save(
            root / f"{name}.png"
        )
    return root


def films(
    root, change=lambda row: None, target="<think>Wet.</think><answer>Edema</answer>", **changes
):
    """The config of a manifest of three patients, of whose last row something was changed."""
    rows = []
    for name in "abc":
        turns = [
            {"role": "user", "content": "What is wrong?"},
            {"role": "assistant", "content": target},
        ]
        turns = turns if target else turns[:1]
        rows.append({"id": name, "image": f"{name}.png", "solution": "Edema", "messages": turns})
    change(rows[-1])
    (root / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = preset(
        **{"data.source": "files", "data.manifest": "", "data.image_root": "", "data.size": 224}
    )
    config.data.manifest, config.data.image_root = str(root / "rows.jsonl"), str(root)
    for key, value in changes.items():
        config.rl[key] = value
    return config


def say(text):
    return lambda row: row["messages"][0].update(content=text)


def test_films_pass(images):
    checks.check(films(images))
    checks.check(films(images, replay_weight=0.1))


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda row: row.update(solution="Edema, Tumour"),
            ":3: name 2 in solution is none of the 14 labels",
        ),
        (say("Look closely. " * 2000), "the prompt of row c has"),
        (say("What is <|image_pad|> this?"), "the prompt of row c: a prompt must not hold"),
    ],
)
def test_a_row_that_cannot_be_used(compiled, images, change, named):
    refused(compiled, films(images, change), named)


def speak_first(text):
    return lambda row: row["messages"].insert(0, {"role": "system", "content": text})


def test_a_system_turn_passes_where_the_template_takes_it(compiled, images, folder):
    for text in ("You are a helpful assistant.", "Speak as a pirate."):
        checks.check(films(images, speak_first(text)))
    config = films(images, speak_first("Speak as a pirate."))
    config.model = folder().model
    path = pathlib.Path(config.model, "chat_template.jinja")
    refuses = "{{ raise_exception('no system turns') }}"
    path.write_text(
        f"{{%- if messages[0]['role'] == 'system' -%}}{refuses}{{%- endif -%}}" + path.read_text()
    )
    refused(
        compiled, config, "the prompt of row c: the chat template does not work for turns of system"
    )


def go_on(*texts):
    roles = ("user", "assistant") * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return lambda row: row["messages"].extend(turns)


def test_conversations_that_a_run_cannot_train_on_are_refused_by_row(compiled, images, folder):
    more = go_on("Provide differentials.", "Heart failure.")
    checks.check(films(images, more, replay_weight=0.1))
    # A template that leaves out the traces of earlier turns.
    config = films(images, more, replay_weight=0.1)
    config.model = folder().model
    path = pathlib.Path(config.model, "chat_template.jinja")
    whole = "{{ message['content'] }}"
    assert whole in path.read_text()
    rest = whole.replace("content']", "content'].split('</think>')[-1]")
    path.write_text(path.read_text().replace(whole, rest))
    refused(compiled, config, "the target of row c: the chat template writes", "train_turns=last")
    config.train_turns = "last"
    checks.check(config)


def test_a_film_of_a_later_turn_trains_behind_its_history_alone(compiled, images):
    def later(row):
        row["messages"][0]["content"] = "Hello"
        go_on("<image>What is wrong?", "<think>Wet.</think><answer>Edema</answer>")(row)

    each = films(images, later, replay_weight=0.1)
    refused(
        compiled, each, "the target of row c: an image stands in a later turn", "train_turns=last"
    )
    last = films(images, later, replay_weight=0.1)
    last.train_turns = "last"
    checks.check(last)
    # Without a replay only the question is read.
    checks.check(films(images, later))


SPELLED = "What is <|im_end|> or <answer>?"


@pytest.mark.parametrize("replay_weight", [0, 0.1])
def test_rows_that_spell_special_tokens_are_read_as_text_with_one_warning(
    images, capsys, replay_weight
):
    target = "<think>Wet.<|im_end|></think><answer>Edema</answer>"
    checks.check(films(images, say(SPELLED), target=target, replay_weight=replay_weight))
    warnings = [line for line in capsys.readouterr().err.splitlines() if " spells " in line]
    assert len(warnings) == 1 + (replay_weight > 0)
    assert "the prompt of row c spells <|im_end|>, <answer>: read as plain text" in warnings[0]
    for warning in warnings[1:]:
        assert "spells <|im_end|>" in warning and "read as plain text" in warning


@pytest.mark.parametrize(
    "opened, target, named",
    [
        ("<think>\n", None, None),
        ("<think>\n", "No finding.", ": the target text does not go on from"),
        ("<think>\n\n</think>\n\n", "<think>Wet.</think>", ": the target text does not go on"),
        ("", "Wet <|image_pad|>.", ": a target text must not hold placeholders"),
    ],
)
def test_targets_must_go_on_from_what_the_template_opened(
    compiled, images, folder, opened, target, named
):
    config = films(images, replay_weight=0.1, **({"target": target} if target else {}))
    config.model = folder().model
    pathlib.Path(config.model, "chat_template.jinja").write_text(chat_templates.opening(opened))
    if named:
        refused(compiled, config, named)
    else:
        checks.check(config)


def test_replay_needs_targets_that_fit(compiled, images):
    refused(compiled, films(images, target=None, replay_weight=0.1), "has no assistant text")
    refused(
        compiled,
        films(images, target="Wet. " * 300, replay_weight=0.1),
        "config.max_completion=208 is too small",
    )
    checks.check(films(images, target=None))


def test_phantom_targets_that_do_not_fit():
    with pytest.raises(UserError, match="config.max_completion=40 is too small"):
        checks.check(preset(**{"rl.replay_weight": 0.1, "max_completion": 40}))
    checks.check(preset(max_completion=40))


def test_films_have_no_sites(compiled, images):
    config = films(images)
    config.data.sites = 4
    refused(compiled, config, "config.data.sites=4")


def test_compilation_would_have_been_noticed(compiled):
    jax.jit(lambda x: x * 2 + len(compiled))(np.float32(1))
    assert compiled
