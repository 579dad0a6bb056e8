"""The HTML page of a run, from its records."""

from cxr_jax.report.records import (
    Case,
    Remarks,
    label_names,
    load_cases,
    load_groups,
    png,
    save_cases,
    save_evaluation,
    save_groups,
)
from cxr_jax.report.write import render, write_report

__all__ = [
    "Case",
    "Remarks",
    "label_names",
    "load_cases",
    "load_groups",
    "png",
    "render",
    "save_cases",
    "save_evaluation",
    "save_groups",
    "write_report",
]
