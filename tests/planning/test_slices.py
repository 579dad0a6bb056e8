"""Names of TPU slices: which there are, and what is said of all others."""

import importlib.util

import pytest

from cxr_jax.errors import UserError
from cxr_jax.planning import slices


@pytest.mark.parametrize(
    "name, sides",
    [
        ("v5e:1x1", (1, 1)),
        ("v5e:4x4", (4, 4)),
        ("v6e:16x16", (16, 16)),
        ("v5p:2x2x1", (2, 2, 1)),
        ("v5p:2x4x4", (2, 4, 4)),
        ("v5p:4x4x12", (4, 4, 12)),
        ("v5p:16x16x24", (16, 16, 24)),
    ],
)
def test_slices_that_there_are(name, sides):
    assert slices.parse_topology(name) == (name[:3], sides)


@pytest.mark.parametrize(
    "name",
    [
        *("", "v5e", "v5e:", "4x4", "v9:2x2", "V5E:2x2", "v5e-16", "cpu:2x2", "v5e:2x2 "),
        *(
            "v5e:3x5",
            "v5e:4x2",
            "v5e:2x2x2",
            "v5e:32x32",
            "v6e:0x0",
            "v5e:-2x2",
            "v5e:2X2",
            "v5e:02x02",
        ),
        *("v5p:2x2", "v5p:2x2x3", "v5p:4x4x2", "v5p:8x4x4", "v5p:4x4", "v5p:0x4x4", "v5p:4x4x4x4"),
        *("v5p:64x64x64", "v5p:x", "v5p:4xx4", "v5p:4x4x1000", "v5p:\u0664x4x4"),
    ],
)
def test_slices_that_there_are_not(name):
    with pytest.raises(UserError) as error:
        slices.parse_topology(name)
    assert str(error.value).startswith(f"--topology={name}: ") and "\n" not in str(error.value)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
        slices.open_slice("v5e:2x2")
    # A name that is none is said first: it needs no installation to be wrong.
    with pytest.raises(UserError, match="slices of a v5e are"):
        slices.open_slice("v5e:5x5")


def test_a_reserve_stays_free():
    for kind, program_gib in (("v5e", 15), ("v6e", 30), ("v5p", 89.0625)):
        assert slices.Slice(f"{kind}:..", kind, []).program_gib == program_gib
