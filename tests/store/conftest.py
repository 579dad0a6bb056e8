"""A store on each database: SQLite always, PostgreSQL (really running, on loopback) as a slow parameter."""

import postgres_server
import pytest
import sqlalchemy as sa

from cxr_jax.store import open_store


@pytest.fixture(scope="session")
def postgres_url():
    if reason := postgres_server.why_not():
        pytest.skip(reason)
    with postgres_server.running() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def place(request, tmp_path):
    """Where a store may be opened: a folder, or a URL of an empty database."""
    if request.param == "sqlite":
        return str(tmp_path / "room")
    url = request.getfixturevalue("postgres_url")
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()
    return f"{url}?folder={tmp_path / 'room'}"


@pytest.fixture
def heads():
    """What a store has announced."""
    return []


@pytest.fixture
def store(place, heads):
    opened = open_store(place, announce=heads.append)
    yield opened
    opened.close()


def tamper(store, *statements):
    """Do what an editor of the database would: with its triggers out of the way."""
    with store.engine.connect() as connection:
        if store.engine.dialect.name == "sqlite":
            for word in ("update", "delete"):
                connection.exec_driver_sql(f"DROP TRIGGER event_no_{word}")
        else:
            connection.exec_driver_sql("DROP TRIGGER event_append_only ON event")
        for statement in statements:
            connection.execute(sa.text(statement))
        connection.commit()


@pytest.fixture(name="tamper")
def tamper_fixture():
    return tamper


@pytest.fixture
def filled(store):
    """A store in which a film was read, reported, signed and exported."""
    from cxr_jax.store.records.reports import Change

    anna = store.users.add("anna", "reader").actor
    film = {"sha256": "f" * 64, "kind": "png", "rows": 8, "cols": 9, "bits": 8}
    store.images.add(film, actor=anna)
    store.readings.add({"sha256": "r", "image": film["sha256"], "document": {"a": 1}}, actor=anna)
    report = store.reports.begin(film["sha256"], "r", {"Heart": "The heart is big."}, actor=anna)
    change = {"report": report["id"], "actor": anna}
    store.reports.save(Change(**change, version=1), {"Heart": "The heart is normal."})
    store.reports.flag(Change(**change, version=None), "wrong", 3)
    store.reports.sign(Change(**change, version=2), "reviewed", 5)
    store.reports.add(Change(**change, version=3), "And the lungs are clear.")
    store.answers.put("t1", {"present": ["Edema"]}, idem_key="a", actor=anna)
    store.exports.add("json", "0" * 64, head=store.head(), actor=anna)
    store.append("last", {}, actor="anna", role="reader")
    store.report_id, store.anna = report["id"], anna
    return store
