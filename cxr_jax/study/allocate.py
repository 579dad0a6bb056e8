"""Who reads which case when and in which arm: blocks of alike cases, and Williams squares over readers and sessions.

Three arms give the six orders MLF, LFM, FML, FLM, MFL, LMF, so readers come in sixes; four arms in fours. Any other
number is allowed, and `balance` says what it costs.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.study.protocol import Protocol

# Streams of the protocol's seed.
_BLOCKS, _ORDER = 1, 2


class Place(NamedTuple):
    """One reading that a reader has before him.

    Attributes:
        position: within the session, from 0, practice counted.
        block: of the cases; -1 for a practice case.
        case_no: its number; practice cases have those behind the last case of the study.
    """

    reader_no: int
    session_no: int
    position: int
    block: int
    case_no: int
    arm: str
    practice: bool


# ---- Williams squares ------------------------------------------------------------------------------


def williams_rows(size: int) -> list[list[int]]:
    """Give the rows of a Williams design: each treatment follows each other one equally often.

    Returns:
        `size` rows for an even size, twice as many (a square and its mirror) for an odd one.
    """
    # 0, 1, n-1, 2, n-2, ..: neighbours differ by every number once.
    first_row = [0]
    low, high = 1, size - 1
    while len(first_row) < size:
        first_row.append(low if len(first_row) % 2 else high)
        low, high = (low + 1, high) if len(first_row) % 2 == 0 else (low, high - 1)
    square = [[(start + step) % size for step in first_row] for start in range(size)]
    # An odd size needs the mirror, too.
    return square if size % 2 == 0 else square + [square_row[::-1] for square_row in square]


def _square(size: int, reader_no: int) -> list[list[int]]:
    """The square of a reader: as many readers as it has rows share one, the next have its mirror."""
    rows = williams_rows(size)
    squares = [rows[start : start + size] for start in range(0, len(rows), size)]
    return squares[(reader_no // size) % len(squares)]


def _arm_index(arm_count: int, reader_no: int, block: int, session_no: int) -> int:
    """Which arm a reader has for a block in a session."""
    return _square(arm_count, reader_no)[(reader_no + block) % arm_count][session_no]


def _block_order(block_count: int, reader_no: int, session_no: int) -> list[int]:
    """In which order a reader has the blocks of a session."""
    # Of two blocks a fixed order is the balanced one: their arms change places already.
    if block_count == 2:
        return [0, 1]
    return _square(block_count, reader_no)[(reader_no + session_no) % block_count]


# ---- The allocation --------------------------------------------------------------------------------


def make_blocks(protocol: Protocol, strata: Sequence[object]) -> np.ndarray:
    """Deal cases into as many blocks as there are arms, each stratum evenly.

    Args:
        strata: what each case is like (abnormal, planted); its values are only compared.

    Returns:
        int [cases].
    """
    # As many blocks as arms: in each session every arm has one.
    block_count = len(protocol.arms)
    generator = np.random.default_rng([protocol.seed, _BLOCKS])
    blocks = np.empty(len(strata), int)
    dealt = 0
    for stratum in sorted(set(strata), key=str):
        cases = np.array([case_no for case_no, kind in enumerate(strata) if kind == stratum])
        # The next stratum goes on where this one ended, or the first block would get all the remainders.
        for case_no in generator.permutation(cases):
            blocks[case_no] = dealt % block_count
            dealt += 1
    return blocks


def allocate(protocol: Protocol, strata: Sequence[object]) -> list[Place]:
    """Allocate every reading of a study, by reader, session and position.

    Raises:
        UserError: for fewer cases than blocks.
    """
    if len(strata) < len(protocol.arms):
        raise UserError(f"cases: {len(strata)} are too few for {len(protocol.arms)} arms")
    # Once for the study: all readers have the same blocks.
    blocks = make_blocks(protocol, strata)
    return [
        reading_place
        for reader_no in range(protocol.readers)
        for session_no in range(protocol.sessions)
        for reading_place in _session(protocol, blocks, reader_no, session_no)
    ]


def _session(
    protocol: Protocol, blocks: np.ndarray, reader_no: int, session_no: int
) -> Iterator[Place]:
    """One session of one reader: blocks one after the other, each opened by practice cases."""
    arm_count, position = len(protocol.arms), 0
    for block in _block_order(arm_count, reader_no, session_no):
        arm_index = _arm_index(arm_count, reader_no, block, session_no)
        arm_name = protocol.arms[arm_index]
        for repeat in range(protocol.practice_per_block):
            # Another practice film in each session of an arm, or the last one would be known by heart.
            number = (arm_index + session_no) % arm_count + repeat * arm_count
            case_no = len(blocks) + number
            yield Place(reader_no, session_no, position, -1, case_no, arm_name, True)
            position += 1
        # Seeded by reader: an order that is the same for all would make fatigue look like a case.
        generator = np.random.default_rng([protocol.seed, _ORDER, reader_no, session_no, block])
        for case_no in generator.permutation(np.flatnonzero(blocks == block)):
            yield Place(reader_no, session_no, position, block, int(case_no), arm_name, False)
            position += 1


def practice_count(protocol: Protocol) -> int:
    """How many practice cases a study needs."""
    return protocol.practice_per_block * len(protocol.arms)


# ---- What is balanced ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Balance:
    """Counts that are all equal in a balanced design, as {what: {key: count}}, and whether they are."""

    counts: dict[str, dict[str, int]]
    is_balanced: bool
    readers_of_a_round: int


def balance(protocol: Protocol, places: Sequence[Place]) -> Balance:
    """Count arms by block and session, their order across sessions and within one."""
    arm_of: dict[tuple[int, int, int], str] = {}
    order_of: dict[tuple[int, int], list[str]] = {}
    for reading_place in places:
        if reading_place.practice:
            continue
        arm_of[reading_place.reader_no, reading_place.session_no, reading_place.block] = (
            reading_place.arm
        )
        order = order_of.setdefault((reading_place.reader_no, reading_place.session_no), [])
        # Blocks are contiguous, so an arm is listed when it changes.
        if reading_place.arm not in order:
            order.append(reading_place.arm)
    counts: dict[str, Counter[str]] = {
        "arm, block, session": Counter(),
        "from session to session": Counter(),
        "place in the session": Counter(),
        "after one another in a session": Counter(),
    }
    for (reader_no, session_no, block), arm_name in arm_of.items():
        counts["arm, block, session"][f"{arm_name} {block} {session_no}"] += 1
        following = arm_of.get((reader_no, session_no + 1, block))
        if following is not None:
            counts["from session to session"][f"{arm_name} > {following}"] += 1
    for order in order_of.values():
        for spot, arm_name in enumerate(order):
            counts["place in the session"][f"{arm_name} {spot}"] += 1
        for arm_name, following in zip(order, order[1:], strict=False):
            counts["after one another in a session"][f"{arm_name} > {following}"] += 1
    arm_count = len(protocol.arms)
    # What a balanced design has of each kind.
    pairs, triples = arm_count * (arm_count - 1), arm_count * arm_count
    expected = (triples * protocol.sessions, pairs, triples, pairs)
    is_balanced = all(
        len(set(counter.values())) <= 1 and (len(counter) == keys or not counter)
        for counter, keys in zip(counts.values(), expected, strict=True)
    )
    named = {what: dict(sorted(counter.items())) for what, counter in counts.items()}
    return Balance(named, is_balanced, len(williams_rows(arm_count)))
