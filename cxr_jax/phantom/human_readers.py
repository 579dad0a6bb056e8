"""What a phantom's reader writes down of a scene: not quite all of it.

Reports are an imperfect record of images, and the best-known way in which readers fall short is satisfaction of
search: once something has been found, the less conspicuous rest often is not (Berbaum et al., Investigative Radiology
1990;25:133-140). So here: where two findings or more are there to be called, each small one, the most severe excepted,
is left out with probability `miss`. The labels of the scene keep it, as a verified label (a CT, a consensus) would.
The traces that SFT imitates are the readers'; the answers that RL verifies are the truth.

    python -m cxr_jax.phantom.human_readers        # how such readers score against the labels, in both hospitals
"""

from typing import Any

import numpy as np

from cxr_jax.phantom.constants import PATHOLOGIES, POSITIVE_AT

SMALL_BELOW = 0.6  # severity; findings that are called are drawn with 0.40..1
MISSES = 8  # the stream of random numbers that decide on misses: part of their seed


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
