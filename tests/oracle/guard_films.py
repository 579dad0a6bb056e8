"""The guard on real films: 40 of them, changed and renamed, against their originals, and all others against them.

    python tests/oracle/guard_films.py FILMS [--count=40] [--seed=0]

FILMS is the pack of labelled films of the shared data (manifest.csv and images/). Drawn films are the test set; each is
stored again as somebody else might: another size, equalised, inverted, with another quality, under a number for a name.
Then patients of CheXpert's test set in a manifest's rows. Prints what `cxr-jax guard` found; exits 1 for a film that is
missed, found by mistake, or taken for another.
"""

import argparse
import csv
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

GUARD = "cxr_jax.data.sources.guard"


def change(film: Image.Image, chance: random.Random) -> Image.Image:
    """Change a film as other hands would: never its borders, which the guard says that it does not see through."""
    side = chance.choice((224, 320, 448, 640))
    changed = film.convert("L").resize((side, round(side * film.height / film.width)))
    # Each of the two in three films of four, and nearly always one.
    if chance.random() < 0.75:
        changed = ImageOps.equalize(changed)
    return ImageOps.invert(changed) if chance.random() < 0.75 else changed


def guard(*places: Path) -> tuple[int, list[str]]:
    """Run the command; its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", GUARD, *map(str, places)], capture_output=True, text=True
    )
    return done.returncode, done.stdout.splitlines()


def pairs_of(printed: list[str], changed_to_original: dict[str, str]) -> tuple[int, int]:
    """How many changed films stand beside their original, and how many lines name another pair."""
    right = sum(
        any(changed in line and original in line for line in printed)
        for changed, original in changed_to_original.items()
    )
    named = sum(
        any(original in line for original in changed_to_original.values()) for line in printed
    )
    return right, named - right


def main() -> int:
    """Do it all in a folder that is gone afterwards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("films", type=Path)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with (args.films / "manifest.csv").open(newline="") as table:
        files = sorted(row["file"] for row in csv.DictReader(table))
    chance = random.Random(args.seed)
    drawn = sorted(chance.sample(files, args.count))
    with tempfile.TemporaryDirectory() as folder:
        test, changed, others = (Path(folder, name) for name in ("test", "changed", "others"))
        for place in (test, changed, others):
            place.mkdir()
        changed_to_original = {}
        for number, name in enumerate(drawn):
            shutil.copy(args.films / name, test)
            kind = chance.choice(("jpg", "png"))
            new_name = f"{number:05d}.{kind}"
            with Image.open(args.films / name) as film:
                quality = {"quality": chance.randint(30, 95)} if kind == "jpg" else {}
                change(film, chance).save(changed / new_name, **quality)
            changed_to_original[new_name] = Path(name).name
        for name in set(files) - set(drawn):
            shutil.copy(args.films / name, others)
        code, printed = guard(changed, test)
        right, wrong = pairs_of(printed, changed_to_original)
        print(f"changed films refused: {right} of {args.count}, wrong pairs {wrong}, exit {code}")
        code_others, printed = guard(others, test)
        print(f"other films: {len(files) - args.count}, exit {code_others}: {printed[-1]}")
        # By its name alone: the film behind it is any.
        rows = Path(folder, "rows.jsonl")
        shutil.copy(args.films / drawn[0], Path(folder, "any.png"))
        row = {"image": "any.png", "subject_id": "patient64741", "solution": "Edema", "prompt": "?"}
        rows.write_text(json.dumps(row) + "\n")
        code_range, printed = guard(rows, others)
        print(f"rows of patient64741: exit {code_range}: {printed[0] if printed else ''}")
    return 0 if (right, wrong, code, code_others, code_range) == (args.count, 0, 1, 0, 1) else 1


if __name__ == "__main__":
    sys.exit(main())
