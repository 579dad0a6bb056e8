"""A run on films of any size, and what `transformers` says of the same films by the exported folder's own processor.

    .venv/bin/python tests/oracle/native_films.py ours FOLDER
    .venv-oracle/bin/python tests/oracle/native_films.py theirs FOLDER

The first makes films that are not square, trains the embedded model on them for some steps of SFT and of RL
(`config.data.max_pixels`), and keeps what our evaluation reads greedily from the export of either. The second lets
`transformers` read the same files, float32 on torch, and compares token by token.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

FILMS, NEW_TOKENS = 50, 48
PROMPT = "Find abnormalities and support devices."
LABELS = ("Edema", "No Finding", "Fracture")
TASKS = {
    "sft": [
        "--config=sft:nv_reason_3b",
        "--config.epochs=0",
        "--config.batch_size=4",
        "--config.mesh.data=-1",
        "--config.mesh.fsdp=1",
        "--config.optim.lr=1e-4",
        "--config.optim.warmup_steps=1",
    ],
    "rl": [
        "--config=rl:files",
        "--config.rl.prompts_per_step=2",
        "--config.rl.group_size=2",
        "--config.rl.micro_batches=2",
    ],
}


# ---- Ours ----------------------------------------------------------------------------------------------------


def make_films(folder: pathlib.Path) -> None:
    """Write FILMS pictures, none of them square, and their manifest."""
    rng, rows = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(FILMS):
        height, width = 1, 1
        while not 1.1 < max(height, width) / min(height, width) < 2.4:
            height, width = (int(side) for side in rng.integers(120, 500, 2))
        y, x = np.mgrid[:height, :width]
        wave = 120 + 80 * np.sin(x / (9 + number % 5)) * np.cos(y / 13)
        pixels = np.clip(wave + rng.normal(0, 15, wave.shape), 0, 255).astype(np.uint8)
        name, label = f"{number:02d}.png", LABELS[number % len(LABELS)]
        Image.fromarray(pixels).save(folder / name)
        asked = [{"type": "image", "image": name}, {"type": "text", "text": PROMPT}]
        said = f"<think>Heart: {label.lower()}.</think><answer>{label}</answer>"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        row = {"id": name, "image": name, "patient_id": name, "solution": label}
        rows.append(json.dumps({**row, "messages": turns}))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")


def train(folder: pathlib.Path, task: str) -> None:
    """Run some steps of a task on the films."""
    films = folder / "films"
    flags = [
        "--config.model=phantom",
        f"--workdir={folder / task}",
        f"--config.data.manifest={films / 'rows.jsonl'}",
        f"--config.data.image_root={films}",
        "--config.data.min_pixels=16384",
        "--config.data.max_pixels=50176",
        "--config.data.image_gate=off",
        "--config.dtype=float32",
        "--config.steps=3",
        "--config.save_every=3",
        f"--config.max_completion={NEW_TOKENS}",
        *("--config.eval.every=3", "--config.eval.n=2", "--config.eval.n_final=2"),
        *("--config.eval.batch_size=2", "--config.eval.bootstrap=10", "--config.eval.cases=1"),
    ]
    subprocess.run([sys.executable, "-m", "cxr_jax.main", *TASKS[task], *flags], check=True)


def read(folder: pathlib.Path, task: str) -> None:
    """Keep what our evaluation reads from the export of a run."""
    from cxr_jax.config.sections import DataConfig
    from cxr_jax.data import resize
    from cxr_jax.data.sources import manifest, splits
    from cxr_jax.evaluation.reader import Reader
    from cxr_jax.inference.prompts import Prompts
    from cxr_jax.models import image_batches, registry
    from cxr_jax.models import tokenizer as tokenizers
    from cxr_jax.weights import pretrained

    films, hf = folder / "films", folder / task / "hf"
    model = pretrained.load_starting_model(str(hf), 0)
    data = DataConfig.with_defaults(source="files", min_pixels=16384, max_pixels=50176)
    source = manifest.FilesSource(manifest.load_rows(films / "rows.jsonl", films))
    source.native = resize.NativeSize(registry.processor_of(model.config), *data.pixel_limits)
    batch = splits.held_out(source, FILMS)
    images = image_batches.open_images(data, model.config, 0)
    prompts = Prompts.for_images(model.tokenizer, model.config, images, NEW_TOKENS)
    reader = Reader(model.config, model.tokenizer, prompts, 10)
    params = pretrained.to_device(model.params, "float32")
    readings = reader.read(params, image_batches.images_of(batch), batch["texts"], batch["ids"])
    special = tokenizers.special_ids(model.tokenizer, model.config.text.vocab_size)
    np.savez(
        folder / f"{task}.npz",
        tokens=readings.tokens,
        lengths=readings.lengths,
        grids=[grids[0] for grids in images.grids(batch["images"])],
        suppress=sorted({*special["suppress"], *model.config.media_token_ids}),
    )


# ---- Theirs --------------------------------------------------------------------------------------------------


def compare(folder: pathlib.Path, task: str) -> bool:
    """Read the films with transformers, and say how many are read as ours."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    hf = folder / task / "hf"
    model = AutoModelForImageTextToText.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(hf), AutoTokenizer.from_pretrained(hf)
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pad = "<|image_pad|>"
    assert text.count(pad) == 1
    same, sizes = 0, set()
    with np.load(folder / f"{task}.npz") as ours:
        tokens, lengths, grids, suppress = (
            ours[name] for name in ("tokens", "lengths", "grids", "suppress")
        )
    for number in range(FILMS):
        film = Image.open(folder / "films" / f"{number:02d}.png").convert("RGB")
        made = processor(images=[film], return_tensors="pt")
        grid = made["image_grid_thw"]
        assert grid[0].tolist() == grids[number].tolist(), (number, grid, grids[number])
        sizes.add(tuple(grid[0].tolist()))
        whole = text.replace(pad, pad * (int(grid.prod()) // 4))
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        model.model.rope_deltas = None
        with torch.no_grad():
            said = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                pixel_values=made["pixel_values"].float(),
                image_grid_thw=grid,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                suppress_tokens=suppress.tolist(),
            )[0, ids.shape[1] :].tolist()
        own = tokens[number, : lengths[number]].tolist()
        same += said[: len(own)] == own and len(said) == len(own)
    print(f"{task}: {same} of {FILMS} films of {len(sizes)} grids are read token for token alike")
    return same == FILMS


if __name__ == "__main__":
    who, where = sys.argv[1], pathlib.Path(sys.argv[2])
    if who == "ours":
        make_films(where / "films")
        for name in TASKS:
            train(where, name)
            read(where, name)
    elif not min([compare(where, name) for name in TASKS]):
        sys.exit(1)
