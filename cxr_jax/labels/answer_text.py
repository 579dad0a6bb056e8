"""Completions as Python strings, on the host: the patterns of the reference reward, and where the trace ends.

`labels/answers.py` reads the same on the device; tests hold the two against each other.
"""

import re

# The format that the reference reward asks for. Groups: what stands in <think>, what stands in <answer>.
FORMAT_PATTERN = re.compile(r"^<think>(.*?)</think>\s*<answer>(.*?)</answer>$", re.DOTALL)
# The answer, wherever it stands; the first one counts. Group: what stands in <answer>.
ANSWER_PATTERN = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def extract_trace(text: str) -> str:
    """Return what stands before the first <answer>: the trace that rewards read."""
    return text.split("<answer>", 1)[0]
