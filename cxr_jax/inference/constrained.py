"""Answers that are valid whatever the model: the rules that sampling follows.

A `Constraint` for `sampling.generate` is made once per tokenizer, by `answer_rules.compile_answers`. The rules are
about text: every tokenisation of a valid text is allowed, also with tokens that reach over a border ("><", ", E"),
and nothing else. `answer_probabilities` weighs all answers after a trace, under the same rules.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cxr_jax.errors import UserError
from cxr_jax.runtime.trees import Array

_AMPLE = 2**30  # tokens left, where they do not matter
_SPACE_AFTER_TRACE = re.compile(r"</think>\s*(<answer>|)$")


class State(NamedTuple):
    """Where each of R rows is."""

    at: jax.Array  # int32 [R]: row of the tables
    named: jax.Array  # int32 [R]: findings named so far, as bits
    left: jax.Array  # int32 [R]: tokens left


class Moves(NamedTuple):
    """What K tokens lead to from R states, each [R, K]."""

    after: jax.Array  # int32: row of the tables
    named: jax.Array  # int32: findings named, as bits
    allowed: jax.Array  # bool


class Constraint(NamedTuple):
    """The compiled rules; a pytree of arrays. S states (the last two: over, dead), C classes of tokens that
    behave alike, n names."""

    # ---- Tokens ----
    classes: Array  # int32 [V]: the class of each token
    next: Array  # int32 [S, C]: the state after a token
    hits: Array  # int32 [S, C]: the names that it completes, as bits
    bars: Array  # int32 [S, C]: the names that these rule out
    # ---- States ----
    # int32 [S, M]: the names that can still be completed, and the answer ended, within m tokens; bit n: it can end
    # without a further name.
    fits: Array
    conflicts: Array  # int32 [n]: the names that each name rules out, itself among them
    # int32 [S, F]: the tokens allowed at all in a state of the answer, -1 beyond.
    options: Array
    locked: Array  # int32 [S]: the same place, but the answer must begin now
    begun: Array  # bool [S]: the list has begun
    settled: Array  # bool [S]: no further name can follow
    after_byte: Array  # int32 [S, 256]: the state after a byte
    # ---- The completion ----
    start: ArrayLike = np.int32(0)  # the state before its first token
    budget: ArrayLike = np.int32(0)  # tokens of a whole completion

    def after(self, opened: str) -> "Constraint":
        """Make the same rules for completions that go on where `opened` ends: what a chat template has said for them.

        Raises:
            UserError: if no valid answer begins so.
        """
        # After a closed trace the format takes any white space, and the rules only some.
        for text in (opened, _SPACE_AFTER_TRACE.sub(r"</think>\1", opened)):
            # By bytes, not by tokens: the prompt may have cut the text otherwise.
            state = 0
            for byte in text.encode():
                state = int(np.asarray(self.after_byte)[state, byte])
            # Names that were completed would have to be counted: no template gives an answer.
            is_dead = state == self.next.shape[0] - 1 or text.partition("<answer>")[2]
            if not is_dead:
                return self._replace(start=np.int32(state))
        raise UserError(
            "constrained answers cannot follow this chat template: no valid answer begins as it opens the answer"
        )

    def after_if_valid(self, opened: str) -> "Constraint":
        """Make the rules of `after`, or leave them as they are where no valid answer begins as opened."""
        try:
            return self.after(opened)
        except UserError:
            return self

    def within(self, max_new_tokens: int) -> "Constraint":
        """Make the same rules for completions of at most max_new_tokens, the stop token included.

        Raises:
            UserError: if no valid completion is that short.
        """
        # By the first state: what fits there fits a whole completion.
        fitting_budgets = np.flatnonzero(np.asarray(self.fits)[np.asarray(self.start)])
        if not len(fitting_budgets) or max_new_tokens < fitting_budgets[0]:
            least = "the tokenizer cannot spell them"
            if len(fitting_budgets):
                least = f"they need {fitting_budgets[0]}"
            raise UserError(
                f"constrained answers do not fit max_new_tokens={max_new_tokens}: {least}"
            )
        return self._replace(budget=np.int32(max_new_tokens))

    def fits_after_trace(self) -> np.ndarray:
        """Look up `fits` where a trace that has just begun must end at once, int32 [M]."""
        locked = np.asarray(self.locked)[np.asarray(self.start)]
        return np.asarray(self.fits)[locked]

    def init(self, rows: int) -> State:
        """Make the state of `rows` completions before their first token."""
        start, budget = (
            jnp.broadcast_to(jnp.asarray(value), rows) for value in (self.start, self.budget)
        )
        return State(start, jnp.zeros(rows, jnp.int32), budget)

    def allowed(self, state: State) -> jax.Array:
        """Find the tokens, bool [R, V], after which a valid completion is still possible in the tokens left."""
        # Classes first: there are far fewer of them than tokens.
        every_class = jnp.arange(self.next.shape[1])[None]
        return self.moves(state, every_class).allowed[:, self.classes]

    def advance(self, state: State, token: ArrayLike) -> State:
        """Take token int [R]. One that is not allowed leads to the dead state, for good."""
        classes = jnp.asarray(self.classes)[token][:, None]
        after, named, allowed = (values[:, 0] for values in self.moves(state, classes))
        # Dead is the last row of all tables.
        dead = self.next.shape[0] - 1
        return State(jnp.where(allowed, after, dead), named, state.left - 1)

    def moves(self, state: State, classes: ArrayLike) -> Moves:
        """Look up where token classes int [R or 1, K] lead."""
        # ---- Where the tokens lead, whatever has been named ----
        state_rows = state.at[:, None]
        after, completed, barred = (
            jnp.asarray(table)[state_rows, classes] for table in (self.next, self.hits, self.bars)
        )
        # ---- and whether an answer can still end there, in time and without a name that is ruled out ----
        ruled_out = _any_of(state.named, jnp.asarray(self.conflicts))[:, None]
        tokens_left = jnp.clip(state.left - 1, 0, self.fits.shape[1] - 1)[:, None]
        can_end = jnp.asarray(self.fits)[after, tokens_left] & ~(ruled_out | barred)
        allowed = (completed & ruled_out == 0) & (can_end != 0)
        return Moves(after, state.named[:, None] | completed, allowed)

    def trace(self, tokens: Array, lengths: Array) -> tuple[jax.Array, State]:
        """Find where the answer list begins.

        The count leaves out the token in which the list begins, however much of the tags it holds: its choice may
        give the answer away. Of tokens that break the rules, those before are the trace.

        Args:
            tokens: int [R, N].
            lengths: int [R], how many of them count.

        Returns:
            (how many tokens come before the list int32 [R], the state after them, which demands that the answer
            begins at once).
        """
        row_count, token_count = tokens.shape
        # Here only the place in the rules matters, and not whether an answer still fits.
        start = self.init(row_count)._replace(left=jnp.full(row_count, _AMPLE, jnp.int32))

        def step(carry: tuple, column: tuple) -> tuple:
            state, count, in_trace = carry
            token, column_number = column
            # The state moves on as long as the list has not begun, and then stays.
            next_state = self.advance(state, token)
            in_trace &= (column_number < lengths) & ~jnp.asarray(self.begun)[next_state.at]
            state = jax.tree.map(
                lambda moved, stayed: jnp.where(in_trace, moved, stayed),
                next_state._replace(left=state.left),
                state,
            )
            return (state, count + in_trace, in_trace), None

        carry = start, jnp.zeros(row_count, jnp.int32), jnp.ones(row_count, bool)
        (state, count, _), _ = jax.lax.scan(step, carry, (tokens.T, jnp.arange(token_count)))
        return count, state._replace(at=jnp.asarray(self.locked)[state.at])


def _any_of(bits: jax.Array, masks: jax.Array) -> jax.Array:
    """int32 [R]: the union of masks[i] over the bits i that are set."""
    # [R, n]: the mask of every name whose bit is set.
    chosen_masks = jnp.where(bits[:, None] >> jnp.arange(len(masks)) & 1 == 1, masks, 0)
    return jax.lax.reduce(chosen_masks, jnp.int32(0), jax.lax.bitwise_or, (1,))
