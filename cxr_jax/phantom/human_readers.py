"""What a phantom's reader writes down of a scene: not quite all of it.

Reports are an imperfect record of images, and the best-known way in which readers fall short is satisfaction of
search: once something has been found, the less conspicuous rest often is not (Berbaum et al., Investigative Radiology
1990;25:133-140). So here: where two findings or more are there to be called, each small one, the most severe excepted,
is left out with probability `miss`. The labels of the scene keep it, as a verified label (a CT, a consensus) would.
The traces that SFT imitates are the readers'; the answers that RL verifies are the truth.

    python -m cxr_jax.phantom.human_readers        # how such readers score against the labels, in both hospitals
"""

import numpy as np

from cxr_jax.phantom.constants import DEV, POSITIVE_AT

SMALL_BELOW = 0.6  # severity; findings that are called are drawn with 0.40..1


def as_read(scene_row: dict, miss: float, rng: np.random.Generator) -> dict:
    """The scene that its reader reports: `scene_row` with severity 0 for what was missed.

    Devices, and faint findings (hedged, not called), are never missed. `rng` is drawn from once, whatever the scene.
    """
    severity = np.array(scene_row["severity"], np.float32)
    called = severity[:DEV] >= np.float32(POSITIVE_AT)
    small = called & (severity[:DEV] < np.float32(SMALL_BELOW))
    small[np.argmax(severity[:DEV])] = False
    missed = small & (rng.random(DEV) < miss) & (called.sum() >= 2)
    severity[:DEV] = np.where(missed, np.float32(0), severity[:DEV])
    return {**scene_row, "severity": severity}


def main(n: int = 4000, miss: float = 0.75) -> None:
    """Prints the readers' mean Jaccard, macro-F1 and lowest recall on n test scenes of each hospital."""
    import jax

    from cxr_jax import phantom
    from cxr_jax.metrics import scores

    for hospital in phantom.HOSPITALS:
        keys = phantom.example_keys(0, "test", hospital, np.arange(n))
        scenes = jax.tree.map(np.asarray, phantom.sample_scenes(keys, hospital))
        rows = [
            as_read({"severity": s}, miss, np.random.default_rng([8, i]))
            for i, s in enumerate(scenes["severity"])
        ]
        read = {**scenes, "severity": np.stack([r["severity"] for r in rows])}
        truth, said = (np.asarray(phantom.labels(s)) == 1 for s in (scenes, read))
        s = scores.summary(said, truth, n_boot=20)
        recall, label = min((v["recall"], k) for k, v in s["per_label"].items())
        print(
            f"readers of hospital {hospital} ({n} scenes, miss {miss}): Jaccard {s['jaccard']['value']:.3f}, "
            f"macro-F1 {s['macro_f1']['all']['value']:.3f}, lowest recall {recall:.3f} {label}"
        )


if __name__ == "__main__":
    main()
