"""The report of a study as one HTML file: first the design, then the hypotheses, then everything behind them."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cxr_jax.study.page import figures
from cxr_jax.study.page.checklists import checklists
from cxr_jax.study.protocol import CONFIDENCE_SCALE, SHOWN, Protocol

_TEMPLATES = Path(__file__).parents[1] / "templates"


def _signed(number: float | None, digits: int = 3) -> str:
    return "-" if number is None else f"{number:+.{digits}f}"


def _fixed(number: float | None, digits: int = 3) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


def _chance(number: float | None) -> str:
    """A p value: three digits, or how small."""
    if number is None:
        return "-"
    return "< 0.001" if number < 0.001 else f"{number:.3f}"


def _percent(rate: dict[str, Any]) -> str:
    if not rate["total"]:
        return "-"
    return f"{100 * rate['share']:.0f} % ({rate['events']}/{rate['total']})"


def make_page(protocol: Protocol, document: dict[str, Any]) -> str:
    """Draw the report.

    Args:
        document: of analysis.json.
    """
    # Everything is escaped but our own SVG and style.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "signed": _signed,
        "fixed": _fixed,
        "chance": _chance,
        "percent": _percent,
    }
    return environment.get_template("report.html").render(
        document=document,
        protocol=protocol,
        shows=SHOWN,
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        forest=figures.forest(_bars(document)),
        time_lines=figures.reader_lines(document["time"]["seconds"]["readers"], "s"),
        carried=figures.kind_bars(document["auditing"]["kinds"], protocol.arms, "carried"),
        detected=figures.kind_bars(
            document["auditing"]["kinds"],
            [arm_name for arm_name in protocol.arms if arm_name != "manual"],
            "detected_label",
        ),
        confidence=figures.confidence_bars(document["confidence"]["counts"], CONFIDENCE_SCALE),
        checklists=checklists(protocol, document),
    )


def _bars(document: dict[str, Any]) -> list[figures.Bar]:
    """The three hypotheses, and the secondary part of the third."""
    bars = []
    for hypothesis in document["hypotheses"]:
        # As in the table below the figure.
        text = f"{hypothesis['estimate']:.2f} [{hypothesis['low']:.2f}, {hypothesis['high']:.2f}]"
        bars.append(
            figures.Bar(
                f"{hypothesis['name']}  {hypothesis['measure']}",
                hypothesis["estimate"],
                hypothesis["low"],
                hypothesis["high"],
                hypothesis["null"],
                text,
                hypothesis["supported"],
            )
        )
        reliance = hypothesis.get("over_reliance_gap")
        # Over-reliance is a part of H3 and has a sign of its own: to the right is worse.
        if reliance:
            gap_text = f"{reliance['estimate']:.2f} [{reliance['low']:.2f}, {reliance['high']:.2f}]"
            title = "H3  planted error in the report, full - manual"
            values = (reliance["estimate"], reliance["low"], reliance["high"])
            bars.append(figures.Bar(title, *values, 0.0, gap_text, False))
    return bars
