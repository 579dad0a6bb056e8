"""Columns of a manifest that rewards of the user's read: labels of their own, a report, anything JSON holds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cxr_jax.data import json_rows
from cxr_jax.data.json_rows import BadRowError
from cxr_jax.errors import UserError, as_utf8, shown


class RewardColumns:
    """The values of `config.data.columns` by the id of a row.

    Attributes:
        shapes: of the columns that hold numbers, or lists of as many numbers in every row: name -> shape of a row's.
    """

    def __init__(self, names: Sequence[str] = (), manifest: str = "") -> None:
        """Read the manifest once more; without names nothing is read.

        Raises:
            UserError: for a column that a row does not have.
        """
        self.names = tuple(names)
        self._values: dict[str, tuple] = {}
        if self.names:
            self._read(manifest)
        # A program wants arrays: what is no number in one row is for Python rewards alone.
        self.shapes: dict[str, tuple[int, ...]] = {}
        for place, name in enumerate(self.names):
            shapes = {_shape_of(values[place]) for values in self._values.values()}
            if len(shapes) == 1 and (shape := shapes.pop()) is not None:
                self.shapes[name] = shape

    def _read(self, manifest: str) -> None:
        for _, place, record in json_rows.read_rows(manifest):
            assert not isinstance(record, BadRowError), "the manifest has been read before"
            for name in self.names:
                if name not in record:
                    raise UserError(
                        f"{manifest}: {place}: has no {shown(name)}, a column of config.data.columns"
                    )
            if json_rows.is_absent(identifier := record.get("id")):
                raise UserError(f"{manifest}: {place}: has no id, which config.data.columns needs")
            # Of rows that repeat one, the first is read.
            values = tuple(record[name] for name in self.names)
            self._values.setdefault(as_utf8(identifier), values)

    def rows(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Give what the rows of some ids hold, as JSON has it."""
        # Phantoms have no manifest.
        if not self.names:
            return [{} for _ in ids]
        return [dict(zip(self.names, self._values[row_id], strict=True)) for row_id in ids]

    def of_batch(self, shown: Mapping[str, Any], ids_here: Sequence[str]) -> dict[str, Any]:
        """Give what a step's batch holds for rewards of the user's.

        Args:
            shown: "ids" and "prompts", as texts, of all its rows.
            ids_here: of the rows that this process makes.

        Returns:
            "rows", a dict for each of all rows; "columns", arrays of those here, if there are any of numbers.
        """
        columns = self.rows(shown["ids"])
        about = zip(shown["ids"], shown["prompts"], columns, strict=True)
        keys: dict[str, Any] = {
            "rows": [{"id": row_id, "prompt": prompt, **row} for row_id, prompt, row in about]
        }
        # Rows of several processes are joined on the devices; dicts are small, and each has them all.
        if self.shapes:
            keys["columns"] = self.arrays(ids_here)
        return keys

    def arrays(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Give the columns of numbers for some ids: name -> float32 [B, ..]."""
        rows = self.rows(ids)
        return {
            name: np.array([row[name] for row in rows], np.float32).reshape(len(rows), *shape)
            for name, shape in self.shapes.items()
        }


def _shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of a number, or of a list of numbers; None for anything else."""
    # JSON has numbers and switches; both are numbers to a program.
    if isinstance(value, bool | int | float):
        return ()
    if (
        isinstance(value, list)
        and value
        and all(isinstance(item, bool | int | float) for item in value)
    ):
        return (len(value),)
    return None
