"""Where a completion's reasoning ends, told while it streams: for clients that show reasoning apart, or not at all."""

from typing import NamedTuple

OPEN, CLOSE, ANSWER = "<think>", "</think>", "<answer>"


class Split(NamedTuple):
    """New text of a completion, by what it is."""

    reasoning: str = ""
    content: str = ""


class ReasoningSplitter:
    """Splits the text of one completion; a text that does not begin with <think> is content from its first letter."""

    def __init__(self) -> None:
        """Begin before the first character."""
        self._part = "start"
        self._held = ""

    def add(self, text: str, *, is_last: bool = False) -> Split:
        """Take new text, and give what is certain by now; the parts of all calls add up.

        Args:
            text: what is new.
            is_last: whether nothing more comes, so that nothing is held back.
        """
        self._held += text
        reasoning = content = ""
        if self._part == "start":
            self._look_for_beginning(is_last)
        # Each part may end within the same piece of text, hence no elif.
        if self._part == "reasoning":
            reasoning = self._take_reasoning(is_last)
        if self._part == "gap":
            # Blank lines between reasoning and answer belong to neither.
            self._held = self._held.lstrip()
            self._part = "content" if self._held or is_last else "gap"
        if self._part == "content":
            content, self._held = self._held, ""
        return Split(reasoning, content)

    def _look_for_beginning(self, is_last: bool) -> None:
        beginning = self._held.lstrip()
        if beginning.startswith(OPEN):
            self._part, self._held = "reasoning", beginning[len(OPEN) :]
        # Half a tag may become one; anything else never will.
        elif is_last or not OPEN.startswith(beginning):
            self._part = "content"

    def _take_reasoning(self, is_last: bool) -> str:
        # An answer without the closing tag ends the reasoning, too; its own tag stays with it.
        places = [(self._held.find(tag), tag) for tag in (CLOSE, ANSWER) if tag in self._held]
        if places:
            place, tag = min(places)
            reasoning = self._held[:place]
            self._held = self._held[place + (len(tag) if tag == CLOSE else 0) :]
            self._part = "gap"
            return reasoning
        # The longest end that could be the beginning of a tag waits for more.
        held_back = 0 if is_last else max(_overlap(self._held, tag) for tag in (CLOSE, ANSWER))
        cut_place = len(self._held) - held_back
        reasoning, self._held = self._held[:cut_place], self._held[cut_place:]
        return reasoning


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of a text are the beginning of a tag."""
    # From the longest on; of length 0 every text is a beginning.
    return next(
        size
        for size in range(min(len(tag) - 1, len(text)), -1, -1)
        if tag.startswith(text[len(text) - size :])
    )
