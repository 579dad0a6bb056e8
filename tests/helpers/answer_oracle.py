"""The oracle of constrained answers: every valid answer written out, every ending measured; a tiny model."""

import functools
import itertools
import re

import numpy as np
import tiny_model

from cxr_jax.models.config_json import EMBEDDED_IDS

NAMES = ("No Finding", "Edema", "Eddy", "Support Devices")
TAGS = (b"<think>", b"</think>", b"<answer>", b"</answer>")
FORMAT = re.compile(r"^<think>.*?</think>\s*<answer>(.*?)</answer>$", re.DOTALL)
STOP, SILENT = 0, 1  # in every tokenizer below; SILENT is a special token without text


def valid_lists(no_finding):
    """All valid answer lists, as (bytes, number of names)."""
    beside = {"devices": {"Support Devices"}, "alone": set(), "any": set(NAMES)}[no_finding]
    out = []
    for k in range(1, len(NAMES) + 1):
        for chosen in itertools.permutations(NAMES, k):
            if "No Finding" not in chosen or set(chosen) - {"No Finding"} <= beside:
                out.append((", ".join(chosen).encode() + b"</answer>", k))
    return out


class Oracle:
    def __init__(self, pieces, no_finding, force_format, separators, answer_tokens):
        self.pieces, self.force, self.answer_tokens = pieces, force_format, answer_tokens
        self.lists = valid_lists(no_finding)
        self.words = {p for p in pieces if p}
        self.heads = [b"</think>" + s + b"<answer>" for s in separators]
        # Trace text that a token holds together with a closing tag: it can make a cheaper ending.
        self.glued = {p.partition(b"</")[0] for p in pieces if b"</" in p} - {b""}

    @functools.cache  # noqa: B019
    def cost(self, text: bytes) -> float:
        """The fewest tokens that spell the text."""
        if not text:
            return 0
        return 1 + min(
            (self.cost(text[len(w) :]) for w in self.words if text.startswith(w)), default=np.inf
        )

    @functools.cache  # noqa: B019
    def need(self, text: bytes) -> float:
        """The fewest further tokens of a valid completion that starts with text; infinity if none does."""
        if not self.force:
            head, found, rest = text.partition(b"<answer>")
            return self.ending(rest) if found else 0
        if not text.startswith(b"<think>"):
            rest = b"<think>"[len(text) :] if b"<think>".startswith(text) else None
            return np.inf if rest is None else self.answer_tokens + self.closing(rest, b"")
        body = text[7:]
        trace, closed, _ = body.partition(b"</think>")
        if any(tag in trace for tag in TAGS):
            return np.inf
        if not closed:
            return self.answer_tokens + self.closing(b"", trace)
        after = body[len(trace) :]
        for head in self.heads:
            if after.startswith(head):
                return self.ending(after[len(head) :])
        return self.shortest(b"", [h[len(after) :] for h in self.heads if h.startswith(after)])

    def closing(self, prefix, trace):
        begun = max(k for k in range(8) if not k or trace.endswith(b"</think>"[:k]))
        glued = [g for g in self.glued if not any(tag in trace + g for tag in TAGS)]
        plain = self.spelled(prefix, begun)
        return min([plain, *(self.spelled(prefix + g, 0) for g in glued)])

    @functools.cache  # noqa: B019
    def spelled(self, prefix, begun):
        """Tokens of `prefix`, a head of which `begun` bytes are written, one name, the end."""
        return self.shortest(prefix, [h[begun:] for h in self.heads])

    def shortest(self, prefix, heads):
        texts = [prefix + h + t for h in heads for t, k in self.lists if k == 1]
        return 1 + min(map(self.cost, texts), default=np.inf)

    def ending(self, text):
        """Of an answer list begun: at most one name more than `text` has completed."""
        named = sum(text.count(n.encode()) for n in NAMES)
        rests = [t[len(text) :] for t, k in self.lists if t.startswith(text) and k <= named + 1]
        return 1 + min(map(self.cost, rests), default=np.inf)

    def allowed(self, text: bytes, left: int):
        """bool [V]; left counts the token to be chosen."""
        out = np.array([bool(p) and self.need(text + p) <= left - 1 for p in self.pieces])
        out[STOP] = bool(self.complete(text))
        return out

    def complete(self, text: bytes) -> bool:
        if not self.force and b"<answer>" not in text:
            return True  # free text may stop
        return self.need(text) == 1 and text.endswith(b"</answer>")


# A tiny model, with the phantom's tokenizer

V = 1024
PHANTOM_CFG = tiny_model.config(text={"vocab_size": V, "num_hidden_layers": 1}, **EMBEDDED_IDS)
