"""The sources of a run: what trains, what a checkpoint is chosen by, what is reported."""

import types

import numpy as np

from cxr_jax.data.sources import phantom


def open_splits(config):
    """Namespace of train, select (checkpoint choice, dict) and test (reported, dict) sources by display name.

    Phantoms: disjoint streams of hospitals A and B. Files: some patients are held out (`files.open_split`), a
    third of them for selection.
    """
    d = config.data
    if d.source == "phantom":
        held = lambda split: {
            h: phantom.PhantomSource(h, split, 0) for h in (d.hospital, d.ood_hospital)
        }
        train = phantom.PhantomSource(
            d.hospital, "train", d.seed, d.get("reader_miss", 0.0), d.get("sites", 0)
        )
        return types.SimpleNamespace(
            train=train, select=held("select"), test=held("test"), ood=d.ood_hospital
        )
    from cxr_jax.data import image_cache
    from cxr_jax.data.sources import manifest

    train, held = manifest.open_split(
        d.manifest,
        d.image_root,
        size=d.size,
        seed=d.seed,
        cache_mib=d.get("cache_mib", image_cache.CACHE_MIB),
        threads=d.get("threads", 0),
    )
    patients = list(dict.fromkeys(r.group for r in held.rows))
    chosen = set(patients[: max(1, len(patients) // 3)])
    rows = [
        [r for r in held.rows if (r.group in chosen) == side] or held.rows for side in (True, False)
    ]
    select, test = (
        manifest.FilesSource(r, d.size, name=f"files ({n})", cache=held.cache, threads=held.threads)
        for r, n in zip(rows, ("selection", "test"), strict=True)
    )
    return types.SimpleNamespace(
        train=train, select={"files": select}, test={"files": test}, ood="files"
    )


def held_out(source, n: int, poll=lambda: None) -> dict:
    """The first n examples of a source, in order (all of a smaller one); `poll` is called every 64."""
    n, parts = min(n, len(source)), []
    for s in range(0, n, 64):
        poll()
        parts.append(source.batch(np.arange(s, min(s + 64, n))))
    keys = ("image", "solution", "known", "hedged", "sides")
    out = {k: np.concatenate([np.asarray(p[k]) for p in parts]) for k in keys}
    out["texts"] = source.about(range(n))["prompts"]
    if "ids" in parts[0]:
        out["ids"] = [i for p in parts for i in p["ids"]]
    return out


def all_prompts(found) -> tuple[str, ...]:
    """Every prompt text of a namespace of `sources`, each once: held-out rows may ask what training rows do not."""
    groups = [found.train, *found.select.values(), *found.test.values()]
    return tuple(dict.fromkeys(t for source in groups for t in source.prompts()))
