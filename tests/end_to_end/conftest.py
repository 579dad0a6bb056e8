"""The cluster that the launch scripts' tests share."""

import os
import signal

import pytest
from clusters import Cluster


@pytest.fixture
def cluster(tmp_path):
    made = Cluster(tmp_path)
    yield made
    for file in made.state.rglob("*.pid"):  # what a failed test has left
        try:
            os.killpg(int(file.read_text()), signal.SIGKILL)
        except (ProcessLookupError, PermissionError, ValueError):
            pass
