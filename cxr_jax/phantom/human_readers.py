"""What a phantom's reader writes down of a scene: not quite all of it.

Reports are an imperfect record of images, and the best-known way in which readers fall short is satisfaction of
search: once something has been found, the less conspicuous rest often is not (Berbaum et al., Investigative Radiology
1990;25:133-140). So here: where two findings or more are there to be called, each small one, the most severe excepted,
is left out with probability `miss`. The labels of the scene keep it, as a verified label (a CT, a consensus) would.
The traces that SFT imitates are the readers'; the answers that RL verifies are the truth.

Such readers err to one side, so a text that says more is a better text. `confused` are others, who err to none: of
each finding they report, now and then, what another patient of the hospital has. They name each finding as often as it
is there, and no text of theirs can be completed to hold the answer.

    python -m cxr_jax.phantom.human_readers        # how such readers score against the labels, in both hospitals
"""

from typing import Any

import numpy as np

from cxr_jax.phantom.constants import FINDINGS, PATHOLOGIES, POSITIVE_AT, Finding

SMALL_BELOW = 0.6  # severity; findings that are called are drawn with 0.40..1
# The streams of random numbers that decide on misses, and on confusions: part of their seeds.
MISSES, CONFUSIONS = 8, 10


def as_read(scene_row: dict[str, Any], miss: float, rng: np.random.Generator) -> dict[str, Any]:
    """Give the scene that its reader reports: `scene_row` with severity 0 for what was missed.

    Devices, and faint findings (hedged, not called), are never missed.

    Args:
        miss: the probability with which a finding that can be missed is.
        rng: drawn from once, whatever the scene.
    """
    # float32 throughout, as the scene's own labels compare.
    severity = np.array(scene_row["severity"], np.float32)
    pathologies = severity[:PATHOLOGIES]
    is_called = pathologies >= np.float32(POSITIVE_AT)
    is_small = is_called & (pathologies < np.float32(SMALL_BELOW))
    is_small[np.argmax(pathologies)] = False  # the most severe is what the reader found
    is_missed = is_small & (rng.random(PATHOLOGIES) < miss) & (is_called.sum() >= 2)
    severity[:PATHOLOGIES] = np.where(is_missed, np.float32(0), pathologies)
    return {**scene_row, "severity": severity}


def confused(
    scene_row: dict[str, Any], other_row: dict[str, Any], share: float, rng: np.random.Generator
) -> dict[str, Any]:
    """Give the scene that is reported by a reader who takes findings of another scene for this one's.

    Args:
        other_row: a scene of the same hospital, drawn apart.
        share: the probability with which a finding is as in `other_row`: its severity, side and zone together, and the
            devices together.
        rng: drawn from once, whatever the scenes.
    """
    is_other = rng.random(len(FINDINGS)) < share
    mixed = dict(scene_row)
    for name in ("severity", "side", "zone", "variant"):
        own, other = np.asarray(scene_row[name]), np.asarray(other_row[name])
        mixed[name] = np.where(is_other.reshape(-1, *[1] * (own.ndim - 1)), other, own)
    if is_other[Finding.SUPPORT_DEVICES]:
        mixed["device"] = np.asarray(other_row["device"])
    return mixed


def main(count: int = 4000, miss: float = 0.75) -> None:
    """Print the readers' mean Jaccard, macro-F1 and lowest recall on `count` test scenes of each hospital."""
    import jax

    from cxr_jax import phantom
    from cxr_jax.metrics import scores

    for hospital in phantom.HOSPITALS:
        keys = phantom.example_keys(0, "test", hospital, np.arange(count))
        scenes = jax.tree.map(np.asarray, phantom.sample_scenes(keys, hospital))
        severities = [
            as_read({"severity": severity}, miss, np.random.default_rng([MISSES, index]))
            for index, severity in enumerate(scenes["severity"])
        ]
        # The same scenes with what was missed at 0, labelled by the same rule.
        read = {**scenes, "severity": np.stack([row["severity"] for row in severities])}
        truth, said = (np.asarray(phantom.labels(scene)) == 1 for scene in (scenes, read))
        summary = scores.summary(
            scores.Answers(said), scores.Reference(truth), bootstrap=scores.Bootstrap(20)
        )
        recall, label = min(
            (values["recall"], label) for label, values in summary["per_label"].items()
        )
        print(
            f"readers of hospital {hospital} ({count} scenes, miss {miss}): "
            f"Jaccard {summary['jaccard']['value']:.3f}, "
            f"macro-F1 {summary['macro_f1']['all']['value']:.3f}, lowest recall {recall:.3f} {label}"
        )


if __name__ == "__main__":
    main()
