"""The chain: what it refuses, what `verify` finds, one writer at a time, heads."""

import hashlib
import json
import threading

import pytest
import sqlalchemy as sa

from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.store import Head, open_store, parse_head, tables
from cxr_jax.store.database import Writing
from cxr_jax.store.records.actors import Actor


def first_problem(store, *heads):
    problems = store.verify(heads)
    return str(problems[0]) if problems else None


def test_a_used_store_is_in_order(filled):
    assert filled.verify([filled.head()]) == []


def test_hash_is_the_one_that_is_written_down(filled):
    """By hand, as anybody may check an exported chain: sha256 of the hash before and the rest as canonical JSON."""
    previous = "0" * 64
    with filled.read() as connection:
        rows = connection.execute(sa.select(tables.event).order_by(tables.event.c.seq)).mappings()
        for row in map(dict, rows):
            stored, before = row.pop("hash"), row.pop("prev_hash")
            text = json.dumps(row, sort_keys=True, separators=(",", ":"))
            assert before == previous
            assert stored == hashlib.sha256((before + text).encode()).hexdigest()
            previous = stored


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE event SET role = 'admin' WHERE seq = 3",
        "DELETE FROM event WHERE seq = 3",
        "DELETE FROM event",
    ],
)
def test_events_cannot_be_changed_by_statements(filled, statement):
    with pytest.raises(RunFailedError, match="append-only"), filled.write() as transaction:
        transaction.connection.execute(sa.text(statement))
    if filled.engine.dialect.name == "sqlite":
        replace = "INSERT OR REPLACE INTO event SELECT * FROM event WHERE seq = 3"
        with pytest.raises(RunFailedError, match="append-only"), filled.write() as transaction:
            transaction.connection.execute(sa.text(replace))
    assert filled.verify() == []


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (
            "UPDATE event SET body = replace(body, 'big', 'bit') WHERE seq = 4",
            "event 4: its content",
        ),
        ("UPDATE event SET actor = 'bert' WHERE seq = 5", "event 5: its content"),
        ("UPDATE event SET body = body || ' ' WHERE seq = 2", "event 2: its content"),
        ("DELETE FROM event WHERE seq = 6", "event 7: no event 6 before it"),
        ("DELETE FROM event WHERE seq = 1", "event 2: no event 1 before it"),
        ("UPDATE report SET state = 'draft' WHERE version = 3", "report ID/3: differs"),
        ("DELETE FROM report WHERE version = 4", "report ID/4: is gone"),
        ("DELETE FROM report_flag", "report_flag ID/1: is gone"),
        ("UPDATE answer SET version = 2", "answer t1/1: is gone"),
        ("UPDATE \"user\" SET role = 'admin'", "user "),
        ("UPDATE reading SET document = '{}'", "reading r: its document"),
    ],
)
def test_first_bad_row_is_named(filled, tamper, statement, expected):
    tamper(filled, statement)
    problem = first_problem(filled)
    assert problem is not None and problem.startswith(expected.replace("ID", filled.report_id))


def test_a_deleted_tail_is_found_by_a_head(filled, tamper):
    head = filled.head()
    # Nothing folds from the last event, so the chain alone is whole without it.
    tamper(filled, f"DELETE FROM event WHERE seq = {head.seq}")
    assert filled.verify() == []
    assert first_problem(filled, head).startswith(f"event {head.seq}: is gone")


def test_a_deleted_tail_is_found_by_an_export(filled, tamper):
    """An export names the head of its time; without what came after, the store's own list of exports tells."""
    tamper(filled, f"DELETE FROM event WHERE seq > {filled.head().seq - 3}")
    reasons = [str(problem) for problem in filled.verify()]
    assert any("a head was given" in reason for reason in reasons)


def test_a_rewritten_chain_is_found_by_a_head(filled, tamper):
    """Whoever computes all hashes anew still has not the head that somebody wrote down."""
    from cxr_jax.store import chain

    head = filled.head()
    with filled.read() as connection:
        rows = connection.execute(sa.select(tables.event).order_by(tables.event.c.seq))
        events = [dict(row) for row in rows.mappings()]
    previous, statements = "0" * 64, []
    for row in events:
        if row["kind"] == "report.signed":
            row["mono_ns"] += 1
        row["prev_hash"] = previous
        previous = chain.event_hash(row)
        statements.append(
            f"UPDATE event SET mono_ns = {row['mono_ns']}, prev_hash = '{row['prev_hash']}', "
            f"hash = '{previous}' WHERE seq = {row['seq']}"
        )
    tamper(filled, "DELETE FROM export", *statements)
    # The chain follows in itself; that an export is missing is a matter of the folds.
    assert not first_problem(filled).startswith("event")
    assert (
        first_problem(filled, head)
        == f"event {head.seq}: another event stood here when its head went out"
    )


def test_a_failed_transaction_leaves_nothing(filled):
    before = filled.head()
    with pytest.raises(RuntimeError), filled.write() as transaction:
        transaction.append("x", {}, actor="a", role="b")
        raise RuntimeError
    assert filled.head() == before


def test_threads_and_processes_take_turns(filled, place):
    """Two openings of one store, as of a server and a command, four threads each: no gap, no fork."""
    other = open_store(place, exclusive=False, announce=str)
    before = filled.head().seq

    def work(store):
        for _ in range(10):
            store.append("x", {}, actor="a", role="b")

    threads = [threading.Thread(target=work, args=(s,)) for s in (filled, other) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.head().seq == before + 80
    assert other.verify() == []
    other.close()


def test_two_servers_are_refused(store, place):
    with pytest.raises(UserError, match="in use by another server"):
        open_store(place, announce=str)
    store.close()
    open_store(place, announce=str).close()


def test_heads_are_announced(store, heads, monkeypatch):
    from cxr_jax.store import chain

    monkeypatch.setattr(chain, "HEAD_EVERY", 10)
    for _ in range(25):
        store.append("x", {}, actor="a", role="b")
    announced = [parse_head(line.removeprefix("store head ")) for line in heads]
    assert [head.seq for head in announced] == [0, 10, 20]
    assert store.heads() == [*announced[1:], store.head()]
    assert store.verify(announced[1:]) == []


def test_a_later_schema_is_refused(store, place):
    with store.write() as transaction:
        transaction.connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(UserError, match="of version 9999, which this program"):
        open_store(place, announce=str)
    # And nothing was locked by the refusal.
    with pytest.raises(UserError, match="9999"):
        open_store(place, announce=str)


def test_migrations_make_the_tables_of_the_program(store):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    with Writing(store.engine).transaction() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, tables.metadata) == []


def test_any_text_is_kept(store):
    """What a model may write: NUL, half a character, every alphabet; in both databases the same."""
    body = {"text": "a\0b \ud800 心 \u202e", "number": 1.5e300}
    event = store.append("x", body, actor="a", role="b")
    assert store.events("x")[0].body == body == event.body
    assert store.verify() == []
    with pytest.raises(ValueError):
        store.append("x", {"number": float("nan")}, actor="a", role="b")


@pytest.mark.parametrize("text", ["", "7", "x:" + "0" * 64, "7:" + "0" * 63])
def test_heads_that_are_none(text):
    with pytest.raises(UserError, match="NUMBER:HASH"):
        parse_head(text)
    assert parse_head(f" 7:{'0' * 64}\n") == Head(7, "0" * 64)


def test_a_reading_that_was_taken_away_is_missed(filled, tamper):
    with filled.read() as connection:
        [image] = connection.execute(sa.select(tables.image.c.sha256).limit(1)).scalars()
    other = {"sha256": "other", "image": image, "document": {"x": 1}}
    filled.readings.add(other, actor=Actor("anna", "reader"))
    assert filled.verify() == []
    tamper(filled, "DELETE FROM reading WHERE sha256 = 'other'")
    assert first_problem(filled) == "reading other: is gone, though events say so"
