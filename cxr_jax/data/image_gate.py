"""Is this a chest film, by its pixels alone? Noise, a page of text, a photograph, a hand, a knee or a CT slice is not.

A score card: fifteen statistics of the picture, each worth points that image_gate.toml lists. A picture with fewer
points in all than the limit there is no chest film; the statistic that lost the most points says why, in words, beside
the kind of other picture that it is most like. Statistics are of a small copy whose plain margins are cut off, so that
size, borders, contrast and brightness hardly count; turned and inverted films are films.

The card is fitted, and measured on films that it has not seen, by experiments/analysis/image_gate.py; what it misses
stands in docs/inputs.md. It is made to let doubtful films pass: it looks for what is plainly something else, is no
check of quality or view, and passes a lateral film.
"""

import functools
import re
import threading
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PilImage

from cxr_jax.data.radiograph import Image
from cxr_jax.errors import UserError

POLICIES = ("refuse", "warn", "off")
CARD_PATH = Path(__file__).with_name("image_gate.toml")

# ---- Sizes of the copies, px a side ----------------------------------------------------------------
_SKIPPED_TO = 1024  # larger pictures are thinned out to about this first: it is quick
_COPY = 256  # the longer side of the copy that margins are cut from
_FINE, _MIDDLE, _COARSE, _LOWEST = 128, 64, 16, 4
_MOST_MARGIN = 0.3  # of a side that may be cut off at each end
_PLAIN = 0.02  # standard deviation of a line, of the picture's range, below which it is margin
_BLANK = -99.0  # points of a picture without any light and dark, or with pixels that are no numbers


# Remarks that need no reader's attention: they tell how the film was shown, not that anything may be wrong with it.
_HARMLESS = re.compile(
    r"^\d+ windows in the file|^pixel padding was masked|^no window in the file|^pixels are not square"
    r"|^16-bit PNG whose values|^rotated as its EXIF"
)
_BY_PIXELS = "no chest film by its pixels"


class Gate(NamedTuple):
    """What every door says of a film, with one meaning each, and why.

    Attributes:
        state: "refused": no frontal chest film by its header or its pixels, or blank; it is read only where somebody
            says so. "warned": a film that something may be wrong with. "ok": neither.
        reasons: in words, of the state.
    """

    state: str
    reasons: list[str]


class Verdict(NamedTuple):
    """What the gate says: `points` above the limit, and why it is no chest film, None if it may be one."""

    points: float
    reason: str | None


def check_policy(policy: str, flag: str = "--image_gate") -> None:
    """Refuse a policy that is none of POLICIES. Raises UserError."""
    if policy not in POLICIES:
        raise UserError(f"{flag}={policy}: choose one of {', '.join(POLICIES)}")


def gate_of(image: Image) -> Gate:
    """Say whether a film may be read: by its header, its pixels and what was remarked when it was decoded.

    A flag that reads it all the same changes nothing here: what is said of a film is what it is.
    """
    reasons = list(image.meta["unusable"])
    verdict = judge(image.pixels)
    # A blank picture has said so already.
    if verdict.reason is not None and not any("blank" in reason for reason in reasons):
        reasons.append(f"{_BY_PIXELS}: {verdict.reason}")
    if reasons:
        return Gate("refused", reasons)
    remarks = [remark for remark in image.meta["warnings"] if not _HARMLESS.search(remark)]
    return Gate("warned" if remarks else "ok", remarks)


def check(path: str | Path, image: Image, policy: str, flag: str = "--image_gate") -> None:
    """Refuse an image that is no chest film by its pixels, or note it in its meta, as the policy says.

    Args:
        path: only the name used in messages.
        image: under "warn" its `meta` gets a warning, and "image_gate": {"reason", "points"}.
        policy: one of POLICIES; "off" does not look.
        flag: what sets the policy, for the message.

    Raises:
        UserError: under "refuse", with the reason in words.
    """
    check_policy(policy, flag)
    if policy == "off":
        return
    verdict = judge(image.pixels)
    if verdict.reason is None:
        return
    remark = f"{_BY_PIXELS}: {verdict.reason}"
    if policy == "refuse":
        raise UserError(f"{path}: not read: {remark} ({flag}=warn reads it all the same)")
    image.meta["warnings"].append(remark)
    image.meta["image_gate"] = {"reason": verdict.reason, "points": round(verdict.points, 2)}


class Watch:
    """Judges the films that a source decodes; under "warn" it counts those that are no chest films. Safe in threads.

    Args:
        policy: one of POLICIES.
        name: of the policy's key, for the line.

    Raises:
        UserError: for another policy.
    """

    def __init__(self, policy: str = "off", name: str = "config.data.image_gate") -> None:
        check_policy(policy, name)
        self.policy, self.name = policy, name
        self._lock = threading.Lock()
        # Every file once: an epoch decodes again what the cache has let go.
        self._refused: dict[str, str] = {}
        if policy == "warn":  # only then is there anything to count
            _watches.append(self)

    def look(self, path: str | Path, image: Image) -> None:
        """Judge a film. Raises UserError under "refuse", as `check` does."""
        check(path, image, self.policy, self.name)
        if gate := image.meta.get("image_gate"):
            with self._lock:
                self._refused.setdefault(str(path), gate["reason"])

    def count_line(self) -> str | None:
        """Say how many films were none, and name the first; None if all may be."""
        if not self._refused:
            return None
        name, reason = next(iter(self._refused.items()))
        others = len(self._refused) - 1
        more = f", and {others:,} more" if others else ""
        return f"{self.name}={self.policy}: no chest film by its pixels: {Path(name).name} ({reason}){more}"


_watches: list[Watch] = []  # of this process, until their lines are taken


def take_count_lines() -> list[str]:
    """Give the lines of all watches so far, each once, for a run to print at its end."""
    lines = [line for watch in _watches if (line := watch.count_line())]
    _watches.clear()
    return lines


def judge(pixels: np.ndarray) -> Verdict:
    """Judge a picture, float [H, W] in 0..1, by the card."""
    if not np.isfinite(pixels).all():
        return Verdict(_BLANK, "pixels that are no finite numbers")
    if float(np.ptp(pixels)) < 1 / 255:
        return Verdict(_BLANK, "blank: one level all over")
    return judge_statistics(statistics(pixels))


def judge_statistics(values: dict[str, float]) -> Verdict:
    """Judge a picture by its statistics."""
    card = load_card()
    points = {
        name: float(np.interp(values[name], line["at"], line["points"]))
        for name, line in card["statistics"].items()
    }
    spare = sum(points.values()) - card["limit"]
    if spare >= 0:
        return Verdict(spare, None)
    worst = min(points, key=lambda name: points[name])
    line = card["statistics"][worst]
    words = line["low"] if values[worst] < line["typical"] else line["high"]
    return Verdict(spare, f"most like {_nearest_look(values)} ({words})")


def _nearest_look(values: dict[str, float]) -> str:
    """Which other kind of picture it is most like, by name."""
    looks = load_card()["looks"]
    row = np.array([values[name] for name in load_card()["statistics"]])
    return max(looks, key=lambda look: looks[look]["offset"] + row @ looks[look]["weights"])


@functools.cache
def load_card() -> dict[str, Any]:
    """Read the card. Nobody may change what this returns."""
    return tomllib.loads(CARD_PATH.read_text(encoding="utf-8"))


# ---- The statistics --------------------------------------------------------------------------------


def statistics(pixels: np.ndarray, mean_film: np.ndarray | None = None) -> dict[str, float]:
    """Compute what the card gives points for.

    Args:
        pixels: float [H, W] in 0..1.
        mean_film: [16, 16], what a chest film looks like; None: that of the card.
    """
    fine = _standard_copy(pixels)
    middle = _average(fine, _MIDDLE)
    if mean_film is None:
        mean_film = load_card()["mean_film"]
    return {
        "tone_spread": float(middle.std()),
        "fine_detail": _log_share((fine - _blur(fine, 3)).var(), fine.var()),
        "broad_shape": float(_average(fine, _LOWEST).var() / (middle.var() + 1e-6)),
        **_edges(middle),
        **_shade(middle),
        **_ground(middle),
        **_build(_average(fine, _COARSE), np.asarray(mean_film, np.float64)),
    }


def coarse_copy(pixels: np.ndarray) -> np.ndarray:
    """Shrink a picture as the gate compares it with the mean film, [16, 16]."""
    return _average(_standard_copy(pixels), _COARSE)


def _edges(picture: np.ndarray) -> dict[str, float]:
    """How hard, how even and in which directions the edges of a picture are."""
    across, along = np.diff(picture, axis=1)[1:], np.diff(picture, axis=0)[:, 1:]
    steepness = np.hypot(across, along)
    upright, level = float((across**2).sum()), float((along**2).sum())

    # Of a smoothed copy, so that noise has no say in it.
    smooth = _blur(picture, 3)
    across, along = np.diff(smooth, axis=1)[1:], np.diff(smooth, axis=0)[:, 1:]
    smooth_steepness = np.hypot(across, along)
    angles = np.arctan2(along, across) % np.pi
    sectors = np.minimum((angles / np.pi * 8).astype(int), 7)
    weights = np.bincount(sectors.ravel(), smooth_steepness.ravel(), minlength=8)
    weights = weights / (weights.sum() + 1e-6)
    return {
        "edge_evenness": _log_share(np.median(steepness), steepness.mean(), 1e-3),
        "edge_peaks": _log_share(
            np.percentile(smooth_steepness, 99), np.percentile(smooth_steepness, 60), 2e-3
        ),
        "edge_imbalance": abs(upright - level) / (upright + level + 1e-6),
        "edge_directions": float(-(weights * np.log(weights + 1e-6)).sum()),
    }


def _shade(picture: np.ndarray) -> dict[str, float]:
    """How much shade the quiet and the usual places of a picture have."""
    variance = np.maximum(_blur(picture**2, 5) - _blur(picture, 5) ** 2, 0)
    shade = np.sqrt(variance)
    return {
        "usual_shade": float(np.log(np.median(shade) + 3e-3)),
        "quiet_shade": float(np.log(np.percentile(shade, 10) + 2e-3)),
    }


def _ground(picture: np.ndarray) -> dict[str, float]:
    """The level that is most frequent on the rim, and how much of the sides has it."""
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    counts = np.bincount((rim * 16).astype(int), minlength=17)
    # Two neighbouring bins together: the level may lie between them.
    counts = counts + np.roll(counts, 1)
    level = counts.argmax() / 16
    sides = (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])
    shares = sorted(float((np.abs(side - level) < 0.07).mean()) for side in sides)
    return {
        "ground_level": abs(level - 0.5),
        "empty_side": shares[3],
        "third_empty_side": shares[1],
    }


def _build(coarse: np.ndarray, mean_film: np.ndarray) -> dict[str, float]:
    """How a picture is built: as a chest film, whichever way it was turned or inverted, and alike on two sides."""
    centred, mean_film = _centre(coarse), _centre(mean_film)
    poses = [sign * np.rot90(centred, turns) for turns in range(4) for sign in (1, -1)]
    likenesses = [float((pose * mean_film).sum()) for pose in poses]
    upright = poses[int(np.argmax(likenesses))]
    upright = upright / (upright.std() + 1e-6)
    first_lung, second_lung = upright[4:10, 2:6].mean(), upright[4:10, 10:14].mean()
    mirrored = [
        float((turned * np.roll(turned[:, ::-1], shift, 1)).sum())
        for turned in (centred, centred.T)
        for shift in (-1, 0, 1)
    ]
    return {
        "chest_likeness": max(likenesses),
        "lung_difference": float(abs(first_lung - second_lung)),
        "symmetry": max(mirrored),
    }


def _centre(picture: np.ndarray) -> np.ndarray:
    """Without its mean, and of length 1: the sum of two such products is their correlation."""
    centred = picture - picture.mean()
    return centred / (np.linalg.norm(centred) + 1e-6)


# ---- Copies of the picture -------------------------------------------------------------------------


def _standard_copy(pixels: np.ndarray) -> np.ndarray:
    """The picture without margins, [128, 128], its grays from black to white."""
    fine = _resize(_without_margins(_thin_out(pixels)), (_FINE, _FINE))
    # Outliers are markers and letters: they do not set the range.
    black, white = np.percentile(_average(fine, _MIDDLE), (1, 99))
    return np.clip((fine - black) / max(white - black, 1e-4), 0, 1)


def _thin_out(pixels: np.ndarray) -> np.ndarray:
    """A copy of no more than _COPY px a side."""
    step = max(1, max(pixels.shape) // _SKIPPED_TO)
    pixels = np.asarray(pixels, np.float32)[::step, ::step]
    shrink = min(1.0, _COPY / max(pixels.shape))
    height, width = (max(1, round(side * shrink)) for side in pixels.shape)
    return pixels if shrink == 1.0 else _resize(pixels, (height, width))


def _without_margins(pixels: np.ndarray) -> np.ndarray:
    """Without the plain lines at the four sides: collimation, scanner lids, the paper around a print."""
    plain = _PLAIN * max(float(np.ptp(pixels)), 1e-6)
    rows, columns = (_inner(pixels.std(axis=1) < plain), _inner(pixels.std(axis=0) < plain))
    return pixels[rows, columns]


def _inner(is_plain: np.ndarray) -> slice:
    """The lines between the plain ones at both ends."""
    most = int(len(is_plain) * _MOST_MARGIN)
    before = int(np.argmin(np.append(is_plain[:most], False)))
    after = int(np.argmin(np.append(is_plain[::-1][:most], False)))
    return slice(before, len(is_plain) - after)


def _resize(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    image = PilImage.fromarray(np.ascontiguousarray(pixels, np.float32))
    # Bilinear with antialiasing, which is a weighted mean where the copy is the smaller one.
    return np.asarray(image.resize(shape[::-1], PilImage.Resampling.BILINEAR), np.float64)


def _average(square: np.ndarray, side: int) -> np.ndarray:
    """Means of equal blocks of a square, [side, side]."""
    block = len(square) // side
    return square.reshape(side, block, side, block).mean(axis=(1, 3))


def _blur(picture: np.ndarray, width: int) -> np.ndarray:
    """Means over width x width px around each; the rim is repeated outwards."""
    padded = np.pad(picture, (width // 2 + 1, width // 2), mode="edge")
    # Sums over a rectangle are differences of sums from the corner.
    sums = padded.cumsum(axis=0).cumsum(axis=1)
    inside = sums[width:, width:] - sums[:-width, width:] - sums[width:, :-width]
    return (inside + sums[:-width, :-width]) / width**2


def _log_share(part: Any, whole: Any, floor: float = 1e-6) -> float:
    return float(np.log((part + floor) / (whole + floor)))
