"""Read a chest radiograph: the reasoning, the answer, and a probability for each of the 14 labels.

    python examples/read_a_film.py                # draws a phantom film and reads it
    python examples/read_a_film.py film.dcm       # PNG, JPEG or DICOM, told apart by content

The embedded model has seen only phantoms; `--model` takes a Hugging Face folder or the folder of a run. Half a minute
on two CPU cores, most of it compilation. Research use only. Not for diagnosis.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import cxr_jax
from cxr_jax.data.images import read_image
from cxr_jax.data.sources.phantom import PhantomSource
from cxr_jax.labels import CHEXPERT_14
from cxr_jax.phantom.dicom_writer import write_dicom

EXAMPLE = 5  # of the test stream, which no training has seen


def draw_phantom_film(folder: str) -> Path:
    """Write a phantom of hospital A as a DICOM file, and print what is there."""
    batch = PhantomSource(hospital="A", split="test").batch([EXAMPLE])
    there = ", ".join(np.array(CHEXPERT_14)[batch["solution"][0]])
    print(f"A phantom film. What is there: {there}")
    path = Path(folder) / "phantom.dcm"
    write_dicom(path, batch["image"][0], hospital="A", ap=False, seed=EXAMPLE)
    return path


def main() -> None:
    """Read the film that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("film", nargs="?", help="default: a phantom film, drawn here")
    parser.add_argument("--model", default="phantom")
    parser.add_argument("--samples", type=int, default=4, help="traces behind the probabilities")
    args = parser.parse_args()

    # Whatever the format, an image is float32 gray in 0..1 with what a reader should know beside it.
    with tempfile.TemporaryDirectory() as folder:
        image = read_image(args.film or draw_phantom_film(folder))
    for note in image.meta["warnings"] + image.meta["unusable"]:
        print(f"note: {note}")

    model = cxr_jax.load(args.model)
    reading = model.read(
        image.pixels, "Find abnormalities and support devices.", samples=args.samples
    )
    print(f"\n{reading.shown.text}\n")
    print(f"How likely the answer is to name it, after {args.samples} sampled traces:")
    for label, probability in sorted(reading.probabilities.items(), key=lambda item: -item[1]):
        print(f"{probability:7.1%}  {label}")
    print("\nResearch use only. Not for diagnosis.")


if __name__ == "__main__":
    main()
