"""A converted folder that tests of its reading, and of its conversion back, copy."""

import pytest
from convert_calls import call
from convert_cases import make


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    assert call("from-hf", make(folder / "src"), folder / "ours") == 0
    return folder / "ours"
