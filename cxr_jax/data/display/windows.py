"""The windows of a film: those that its file offers, in the order of the standard, and some computed from its values.

A window is {"name", "source": "file" or "computed"} with either "center", "width" and "function" (PS3.3 C.11.2.1.2), or
"lut": {"first", "bits", "white", "values"}.
"""

from typing import Any

import numpy as np

from cxr_jax.data import radiograph

# Words of (0028,1055) and (0028,3003) that a window may be called by; other words may be anything, a name included.
KNOWN_NAMES = frozenset(
    "NORMAL HARDER SOFTER STANDARD DEFAULT LUNG LUNGS BONE BONES CHEST MEDIASTINUM ABDOMEN SOFT_TISSUE HARD SOFT "
    "LOW HIGH MEDIUM WIDE NARROW LINEAR BRIGHT DARK FLAT USER ALGO1 ALGO2 WINDOW1 WINDOW2 WINDOW3".split()
)
# Percentiles of the values, from what is shown darkest: air and lungs are dark, bones and the mediastinum bright.
_COMPUTED = {"Full range": (0.0, 100.0), "Middle 99 %": (0.5, 99.5)} | {
    "Lungs": (2.0, 62.0),
    "Bones": (40.0, 99.8),
}


def between(name: str, source: str, black: float, white: float) -> dict[str, Any]:
    """Make the window from black to white; LINEAR_EXACT because LINEAR shifts by half a value."""
    center, width = (black + white) / 2, max(white - black, 1e-6)
    window = {"name": name, "source": source, "center": center, "width": width}
    return window | {"function": "LINEAR_EXACT"}


def computed(
    values: np.ndarray, valid_mask: np.ndarray, *, is_inverted: bool
) -> list[dict[str, Any]]:
    """Make windows for a film of any range: all of it, without outliers, for dark parts, for bright ones."""
    inside = values[valid_mask]
    # A film that is all padding has nothing to window.
    if not inside.size:
        return []
    # Every eighth value or so of a large film: percentiles need no more.
    step = max(1, inside.size // 500_000)
    windows = []
    for name, shares in _COMPUTED.items():
        if is_inverted:  # what is shown dark are the high values
            shares = (100 - shares[1], 100 - shares[0])
        if name == "Full range":
            black, white = float(inside.min()), float(inside.max())
        else:
            black, white = (float(level) for level in np.percentile(inside[::step], shares))
        windows.append(between(name, "computed", black, white))
    return windows


def of_file(opened: Any) -> list[dict[str, Any]]:
    """List the windows of a DICOM, first the one that `dicom.show` shows."""
    from cxr_jax.data.dicom import header

    dataset, used = opened.dataset, opened.metadata["window"] or {}
    # A table goes before a window, as in the renderer.
    windows = [*_tables(opened), *_numbered(opened)]
    if used.get("kind") == "stored range":
        bits = opened.metadata["bits"]
        is_signed = header.whole_number(dataset, "PixelRepresentation", 0) == 1
        lowest = float(-(2 ** (bits - 1))) if is_signed else 0.0
        as_stored = between("As stored", "file", lowest, lowest + 2**bits - 1)
        windows = [as_stored, *windows]
    elif used.get("kind") == "percentile":
        inside = opened.values[opened.valid_mask]
        shares = radiograph.PERCENTILES
        black, white = np.percentile(inside, shares) if inside.size else (0.0, 1.0)
        automatic = between("Automatic", "computed", float(black), float(white))
        windows = [automatic, *windows]
    return windows


def _tables(opened: Any) -> list[dict[str, Any]]:
    """The VOI LUTs of a DICOM, those that can be used."""
    from cxr_jax.data.dicom import pixels

    items = list(opened.dataset.get("VOILUTSequence") or [])
    windows = []
    for number, item in enumerate(items, 1):
        try:
            table = pixels.read_table(item, opened.values)
            # White is told by what the table makes of this very film.
            entries = np.clip(
                np.rint(opened.values).astype(np.int64) - table.first, 0, table.entries.size - 1
            )
            # The renderer has said it of the first table; a viewer only needs the level.
            remarks: dict[str, Any] = {"warnings": []}
            white = pixels.white_of_table(table.entries[entries], table.bits, remarks)
        except Exception:
            # Damaged tables are passed over here as they are where the film is rendered.
            continue
        windows.append(
            {
                "name": _name(item, "LUTExplanation", 0) or _counted("VOI LUT", number, items),
                "source": "file",
                "lut": {
                    "first": table.first,
                    "bits": table.bits,
                    "white": float(white),
                    "values": [int(entry) for entry in table.entries],
                },
            }
        )
    return windows


def _numbered(opened: Any) -> list[dict[str, Any]]:
    """The windows of a DICOM that have a center and a width."""
    from cxr_jax.data.dicom import header, pixels

    dataset = opened.dataset
    function = header.read_text(dataset, "VOILUTFunction") or "LINEAR"
    # A centre without a width is no window.
    pairs = list(
        zip(
            header.read_numbers(dataset, "WindowCenter"),
            header.read_numbers(dataset, "WindowWidth"),
            strict=False,
        )
    )
    windows = []
    for number, (center, width) in enumerate(pairs, 1):
        # The renderer's own judgement of which windows are legal.
        if pixels.window(np.zeros(1, np.float32), center, width, function) is None:
            continue
        # Explanations are a list beside the list of windows, and often shorter.
        name = _name(dataset, "WindowCenterWidthExplanation", number - 1)
        windows.append(
            {
                "name": name or _counted("Window", number, pairs),
                "source": "file",
                "center": center,
                "width": width,
                "function": function,
            }
        )
    return windows


def _name(dataset: Any, element: str, index: int) -> str | None:
    """A window's name, if it is a known word."""
    try:
        value = dataset.get(element)
        texts = [value] if isinstance(value, str) else list(value or [])
        # Several windows have one element for all their names.
        word = str(texts[index]).strip().upper().replace(" ", "_")
    except Exception:
        return None
    return word.replace("_", " ").capitalize() if word in KNOWN_NAMES else None


def _counted(kind: str, number: int, among: list[Any]) -> str:
    return kind if len(among) == 1 else f"{kind} {number} of {len(among)}"
