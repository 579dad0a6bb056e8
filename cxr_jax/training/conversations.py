"""Conversations as token ids: what SFT imitates, and RL replays.

A row is trained on in one pass: its prompt ends where the first answer that trains begins, and all that follows is the
"completion": answers, which train, and between them the frame and the questions, which do not. Every answer stands
behind exactly the tokens that serving puts before it, which are the chat template's rendering of what was said so far.
A template that writes earlier answers otherwise than the model wrote them (leaves out their traces, say) gives no such
row for several answers; each of them alone has one (`config.train_turns=last`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cxr_jax.data.prompts import Conversation, Message, Prompt, as_prompt, cut_at_marks
from cxr_jax.errors import UserError
from cxr_jax.inference.prompts import (
    Grid,
    Grids,
    Prompts,
    RenderedPrompt,
    count_image_tokens,
    messages_of,
    render_conversation,
)
from cxr_jax.runtime.trees import Tree
from cxr_jax.training.targets import Completions, continuation


class Plan(NamedTuple):
    """A conversation before its answers are encoded.

    Attributes:
        prompt: what is said before the first answer that trains.
        contexts: the tokens before each answer that trains, the prompt's first.
        answers: what is left to write of each (`targets.continuation`).
    """

    prompt: Prompt
    contexts: list[list[int]]
    answers: list[str]


def plan(
    conversation: Conversation,
    train_turns: str,
    film_count: int,
    render: Callable[[Prompt, int], RenderedPrompt],
) -> Plan:
    """Find which answers of a conversation train, and what each follows on.

    Args:
        conversation: its last turn is the model's.
        train_turns: "each" or "last".
        film_count: images of the conversation.
        render: gives the tokens of what is said before an answer, about the first so many images.

    Raises:
        UserError: for an answer that does not go on from what the template has opened, and for an image that stands
            behind the first answer that trains.
    """
    # Without marks all stand before the first question.
    has_marks = any(_count_marks(turn) for turn in conversation)
    said: list[Message] = []
    films_said = 0 if has_marks else film_count
    prompts, contexts, answers, films = [], [], [], []
    for message in conversation:
        films_said += _count_marks(message)
        if message.role == "assistant":
            prompt = as_prompt(tuple(said))
            rendered = render(prompt, films_said)
            answer = continuation(message.content, rendered.opened)
            prompts.append(prompt)
            contexts.append(rendered.ids)
            answers.append(answer)
            films.append(films_said)
            # As a chat keeps it: what the template has opened is part of what was said.
            message = Message("assistant", rendered.opened + answer)
        said.append(message)
    # The last answer needs all that was said before it; the first one, what the template says of an only question.
    first = 0 if train_turns == "each" else len(answers) - 1
    if films[first] < film_count:
        raise UserError(
            "an image stands in a later turn than the first answer: only the last answer of such a conversation can "
            "train (config.train_turns=last)"
        )
    return Plan(prompts[first], contexts[first:], answers[first:])


def _count_marks(message: Message) -> int:
    return cut_at_marks(message.content).count(None) if message.role == "user" else 0


def join(
    contexts: Sequence[list[int]], answers: Sequence[list[int]]
) -> tuple[list[int], list[bool]]:
    """Put together what follows the first context.

    Args:
        contexts: tokens before each answer, what was said before them included.
        answers: tokens of each answer, with the end of the turn.

    Returns:
        (tokens, whether each is of an answer).

    Raises:
        UserError: if a context does not begin with what was said, token for token.
    """
    row, trained = list(contexts[0]), [False] * len(contexts[0])
    for number, (context, answer) in enumerate(zip(contexts, answers, strict=True), 1):
        if context[: len(row)] != row:
            raise UserError(
                f"the chat template writes the answer before answer {number} otherwise than it trains: only the last "
                "answer of such a conversation can train (config.train_turns=last)"
            )
        # Between two answers: the end of one frame, a question, the beginning of the next.
        trained += [False] * (len(context) - len(row)) + [True] * len(answer)
        row = context + answer
    # The prompt is another array: of one static width, with its images.
    start = len(contexts[0])
    return row[start:], trained[start:]


class Examples:
    """Encodes conversations about images as prompts and completions of one fixed shape each."""

    def __init__(self, prompts: Prompts, completions: Completions, train_turns: str) -> None:
        """Take the encoders of both.

        Args:
            train_turns: `config.train_turns`.
        """
        self.prompts, self.completions, self.train_turns = prompts, completions, train_turns

    def encode(self, conversations: Sequence[Conversation], grids: Grids | None = None) -> Tree:
        """Encode B conversations.

        Args:
            grids: as for `Prompts.encode`.

        Returns:
            "prompts" as from `Prompts.encode`; "completions", "lengths" and "mask" as from `Completions.fill`.

        Raises:
            UserError: for what does not fit, and see `plan` and `join`.
        """
        each = grids
        if each is None:
            each = [self.prompts.same_grids(messages) for messages in conversations]
        plans = [
            plan(messages, self.train_turns, len(own), functools.partial(self._render, own))
            for messages, own in zip(conversations, each, strict=True)
        ]
        # All texts of the batch at once: the tokenizer works them off in parallel.
        answer_ids = iter(
            self.completions.token_ids([answer for row in plans for answer in row.answers])
        )
        stop = self.completions.stop
        rows = [
            join(row.contexts, [[*next(answer_ids), stop] for _ in row.answers]) for row in plans
        ]
        return {
            "prompts": self.prompts.encode([row.prompt for row in plans], grids),
            **self.completions.fill([ids for ids, _ in rows], [trained for _, trained in rows]),
        }

    def _render(self, grids: Sequence[Grid], prompt: Prompt, film_count: int) -> RenderedPrompt:
        own = list(grids[:film_count])
        # What follows on answers is another prompt in every row: nothing to remember.
        if isinstance(prompt, str) or all(turn.role != "assistant" for turn in prompt):
            return self.prompts.known(prompt, own)
        image_tokens = count_image_tokens(self.prompts.config, own)
        return render_conversation(self.prompts.tokenizer, messages_of(prompt), image_tokens)
