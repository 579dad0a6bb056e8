"""Decoding in stages: finished rows leave, and the cache grows, inside one program.

Completions end at different lengths. A loop over all rows to the longest one spends about half its work on rows that
are done and on cache slots that are empty. So the loop is cut into a few stages of fixed length. At the end of a stage
the rows that are left move together into the next smaller power-of-two share of the batch that holds them, and their
own keys get the room that the next stage needs. Each stage is compiled for every such share and the device picks one:
no host round trip, one compilation, and over a mesh every device takes the same branch and moves only its own rows.

A completion does not change: the noise of a token follows from its row's key, and prompts' keys stay where they are.
"""

import functools

import jax
import jax.numpy as jnp

from cxr_jax.runtime.batch_rows import by_shard, put_rows, row_shards, take_rows

ENDS = (5 / 16, 15 / 32, 5 / 8)  # of all stages but the last, as shares of the most tokens
GRAIN, SHORTEST = (
    32,
    96,
)  # ends are multiples of GRAIN; a loop of fewer tokens than SHORTEST is one stage
HALVINGS, LEAST_ROWS = 3, 8  # a batch shrinks to 1/8, but to no fewer rows


def stage_ends(most: int) -> list[int]:
    """The token counts at which rows may leave; `most`, the last one, ends the loop."""
    if most < SHORTEST:
        return [most]
    ends = {GRAIN * max(1, round(share * most / GRAIN)) for share in ENDS}
    return [*sorted(t for t in ends if t < most), most]


def sizes(rows: int, shards: int = 1) -> list[int]:
    """Row counts that a stage is compiled for: all, and halves of it that `shards` devices divide evenly."""
    out = [rows]
    while len(out) <= HALVINGS and out[-1] % (2 * shards) == 0 and out[-1] // 2 >= LEAST_ROWS:
        out.append(out[-1] // 2)
    return out


def run(loop, prompt, lengths, start, keys, state):
    """`loop` to the end of `state.tokens` [R, N], in stages.

    loop(prompt, lengths, start, keys, state, until, place) -> state draws until step `until` or until all are done;
    place as in `layers.two_part_attention`. prompt [(k, v)] a layer [B, K, S, d] and lengths [B] are the prompts',
    start and keys [R] the rows'. state: a `sampling.State` whose own keys have room for the first stage. Returns it
    without own keys.
    """
    R, N, B = len(start), state.tokens.shape[1], len(lengths)
    shards = row_shards() if B % row_shards() == 0 else 1
    apart = functools.partial(by_shard, shards=shards)

    def with_rows(size, until, state):
        """The stage with `size` rows: those that are not done, filled up with some that are."""
        room = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, until - x.shape[2]), (0, 0)))
        grown = lambda state: state._replace(own=jax.tree.map(room, state.own))
        ended = lambda state: (
            state._replace(own=()) if until == N else state
        )  # nobody reads the keys any more
        if size == R:
            return ended(loop(prompt, lengths, start, keys, grown(state), until, None))
        index = jnp.argsort(apart(state.done), axis=1, stable=True)[:, : size // shards]
        pick = lambda tree, index=index: jax.tree.map(lambda x: take_rows(x, index), tree)
        if (
            size <= B
        ):  # every row a copy of its prompt: as much memory again as all prompts take, at most
            prompt_of, place = pick((prompt, lengths), index // (R // B)), None
        else:
            prompt_of, place = (prompt, lengths), (index, R)
        some = grown(pick(state._replace(step=()))._replace(step=state.step))
        out = ended(loop(*prompt_of, pick(start), pick(keys), some, until, place))
        back = lambda old, new: put_rows(old, index, new)
        return jax.tree.map(
            back, ended(grown(state))._replace(step=()), out._replace(step=())
        )._replace(step=out.step)

    options = sizes(R, shards)
    for i, until in enumerate(stage_ends(N)):
        if i == 0 or len(options) == 1:
            state = with_rows(R, until, state)
            continue
        alive = shards * jnp.sum(~apart(state.done), axis=1).max()
        smallest = sum((alive <= n).astype(jnp.int32) for n in options[1:])
        state = jax.lax.switch(
            smallest, [functools.partial(with_rows, n, until) for n in options], state
        )
    return state
