"""The templates of the page: one Jinja2 environment that escapes every text, and how numbers are written.

Text comes from models, manifests and configs, so none of it is trusted: what a template prints is escaped unless it is
`Markup`, and only templates, `escape` and the charts of `svg.py` make `Markup`.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import markupsafe
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

# The two sets of the phantom world, and that of a manifest; others keep their names.
SET_NAMES = {"A": "Hospital A", "B": "Hospital B", "files": "Given files"}
# C0 controls except tab and newline, and the characters that turn the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


# ---- Text and numbers ----


def _show_controls(value: object) -> object:
    """Make control and text-direction characters of a text visible; leave markup and other values as they are."""
    # Text that reorders or hides itself could make a page say what nobody wrote.
    if isinstance(value, str) and not isinstance(value, Markup):
        return _CONTROL.sub("\ufffd", value)
    return value


def escape(text: object) -> Markup:
    """Escape a text for elements and quoted attributes; control and text-direction characters become visible."""
    return markupsafe.escape(_show_controls(text))


def set_title(set_name: str) -> str:
    """Return what a reader is told of a test set: "Hospital A" for "A"."""
    return SET_NAMES.get(set_name, set_name)


def fixed(value: float | None, digits: int = 3) -> str:
    """Write a number with `digits` decimals, a missing one as a dash."""
    # A dash, not 0: what is undefined is not a bad score.
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float) -> str:
    """Write a difference with its sign and three decimals."""
    return f"{value:+.3f}".replace("-", "−")


def percent(share: float | None) -> str:
    """Write a share of 0..1 in percent, a missing one as a dash."""
    return "–" if share is None else f"{100 * share:.1f} %"


def interval(estimate: Mapping, sign: str = "") -> str:
    """Write [lo, hi] of an estimate, or nothing where there is none. sign: "+" to show the sign of both."""
    if estimate.get("lo") is None:
        return ""
    return f"[{estimate['lo']:{sign}.3f}, {estimate['hi']:{sign}.3f}]".replace("-", "−")


# ---- Templates ----


@functools.cache
def _environment() -> Environment:
    # One environment: templates are compiled once a process.
    environment = Environment(
        loader=PackageLoader("cxr_jax.report"),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelt name is an error, not an empty place on the page
        finalize=_show_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Templates know these by the names that they have here.
    for function in (fixed, signed, percent, interval, set_title):
        environment.filters[function.__name__] = function
    return environment


def render(template: str, **values: Any) -> Markup:
    """Fill a template of `report/templates/` with values."""
    return Markup(_environment().get_template(template).render(**values))


def muted(text: str) -> Markup:
    """Return a grey paragraph: what stands where nothing was recorded."""
    return Markup('<p class="muted">{}</p>').format(escape(text))
