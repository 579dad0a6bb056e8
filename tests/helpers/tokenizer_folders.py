"""Tokenizers and chat templates in the files that published folders have, made from the embedded ones."""

import json
import shutil

import cxr_jax

PHANTOM = cxr_jax.asset("phantom")
_PARSED = json.loads((PHANTOM / "tokenizer.json").read_text())
ADDED = _PARSED["added_tokens"]
VOCAB = _PARSED["model"]["vocab"]
MERGES = [pair if isinstance(pair, str) else " ".join(pair) for pair in _PARSED["model"]["merges"]]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
ENDS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def write_json(path, value):
    path.write_text(json.dumps(value))


def pair_folder(folder, *, kept_in="added_tokens_decoder", tokenizer_class="Qwen2Tokenizer"):
    """A folder without tokenizer.json: vocab.json and merges.txt, and the special tokens where `kept_in` says.

    Args:
        kept_in: "added_tokens_decoder" (of tokenizer_config.json), "added_tokens.json" or "" for nowhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "chat_template.jinja"):
        shutil.copy(PHANTOM / name, folder)
    write_json(folder / "vocab.json", VOCAB)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    settings = {**ENDS, "tokenizer_class": tokenizer_class}
    if kept_in == "added_tokens_decoder":
        settings["added_tokens_decoder"] = {
            str(token["id"]): {key: token[key] for key in token if key != "id"} for token in ADDED
        }
    if kept_in == "added_tokens.json":
        write_json(folder / kept_in, {token["content"]: token["id"] for token in ADDED})
        special = [token["content"] for token in ADDED if token["special"]]
        write_json(
            folder / "special_tokens_map.json", {**ENDS, "additional_special_tokens": special}
        )
    write_json(folder / "tokenizer_config.json", settings)
    return folder


def template_folder(folder):
    """The embedded tokenizer without a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PHANTOM / name, folder)
    return folder


# ---- Templates: all write `framed`, from other forms of messages ---------------------------------------------

_FRAME = (
    "{%% for m in messages %%}{{ '<|im_start|>' + m['role'] + '\\n' }}%s{{ '<|im_end|>\\n' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
)
_PARTS = (
    "{%% for p in m['content'] %%}{%% if p['type'] == 'image' %%}%s{%% elif p['type'] == 'text' %%}{{ p['text'] }}"
    "{%% endif %%}{%% endfor %%}"
)
_EITHER = "{%% if m['content'] is string %%}{{ m['content'] }}{%% else %%}%s{%% endif %%}"
TEMPLATES = {
    "parts or texts": _FRAME % (_EITHER % (_PARTS % IMAGE)),
    "parts only": _FRAME % (_PARTS % IMAGE),
    "texts, joined": _FRAME % "{{ '' + m['content'] }}",
    "texts, printed": _FRAME % "{{ m['content'] }}",
    "texts, trimmed": _FRAME % "{{ m.content | trim }}",
    "texts, as JSON": _FRAME
    % "{{ (m.content | tojson)[1:-1] if m.content is string else m.content | tojson }}",
    "parts without images": _FRAME % (_EITHER % (_PARTS % "")),
    "parts of the question only": _FRAME
    % ("{% if m['role'] == 'user' %}" + _PARTS % IMAGE + "{% else %}{{ m['content'] }}{% endif %}"),
}


def framed(messages, has_image):
    """What a template of `TEMPLATES` should write."""
    text, image = "", IMAGE if has_image else ""
    for message in messages:
        before, image = (image, "") if message["role"] == "user" else ("", image)
        text += f"<|im_start|>{message['role']}\n{before}{message['content']}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"
