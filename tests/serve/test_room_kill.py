"""A server that is killed while pages write: whatever was answered is there, once, and the chain is whole."""

import kill_room
import postgres_server
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_nothing_acknowledged_is_lost(database, tmp_path, request):
    place = str(tmp_path / "room")
    if database == "postgres":
        place = f"{request.getfixturevalue('postgres_url')}?folder={place}"
    wrong, figures = kill_room.kill(place, kills=4)
    assert wrong == []
    # The kills came while there was something to lose.
    assert figures["acknowledged"] > 10 and figures["retries"] > 0


@pytest.fixture
def postgres_url():
    if reason := postgres_server.why_not():
        pytest.skip(reason)
    with postgres_server.running() as url:
        yield url
