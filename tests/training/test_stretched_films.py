"""Films of a model whose processor stretches them to one square (Gemma 3): trained on as they are read."""

import dataclasses

import gemma_tokenizer
import jax
import numpy as np
import pytest
import tiny_model

from cxr_jax.config.sections import DataConfig
from cxr_jax.data.resize import NativeSize
from cxr_jax.errors import UserError
from cxr_jax.models import network
from cxr_jax.models.gemma3.config import GEMMA_PHANTOM
from cxr_jax.models.image_batches import PackedImages, open_images
from cxr_jax.training import checks
from cxr_jax.weights import hf_folder

SIDE = 224
TINY = dataclasses.replace(
    GEMMA_PHANTOM,
    vision=dataclasses.replace(
        GEMMA_PHANTOM.vision, depth=1, hidden_size=16, num_heads=2, intermediate_size=24
    ),
)


def of_files(**changes):
    return DataConfig.with_defaults(source="files", **{"max_pixels": SIDE**2, **changes})


def test_packed_films_are_what_reading_makes_of_them():
    images = open_images(of_files(), TINY, SIDE, count=2)
    assert isinstance(images, PackedImages) and images.patches == 2 * 256
    processor = images.processor
    rng = np.random.default_rng(0)
    films = [rng.random(shape, np.float32) for shape in ((300, 211), (90, 130), (224, 224))]
    size = NativeSize(processor, *of_files().pixel_limits)
    levels = [size.levels(film) for film in films]
    assert {film.shape for film in levels} == {(SIDE, SIDE)}
    params = tiny_model.draw_params(TINY)
    table = params["vision"]["pos_embed"]
    table["embedding"] = 9 * table["embedding"]  # so that a place in the wrong order would show
    batch = images.inputs([levels[:2], levels[2:]])
    got = jax.jit(images.features)(params, batch).tokens
    see = jax.jit(network.vision, static_argnums=(1, 3))
    for number, film in enumerate(films):
        patches, grid = processor.prepare(film)
        want = see(params, TINY, patches[None], grid).tokens[0]
        row, first = divmod(number, 2)
        mine = np.asarray(got[row, 64 * first : 64 * (first + 1)])
        np.testing.assert_allclose(mine, want, atol=1e-5 * float(np.std(want)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("gemma") / "model"
    params = tiny_model.draw_params(TINY)
    tokenizer = checks.pretrained.tokenizers.load(str(gemma_tokenizer.folder()))
    ids = checks.pretrained.tokenizers.config_ids(tokenizer)
    hf_folder.save(made, dataclasses.replace(TINY, **ids), params, tokenizer=tokenizer)
    return str(made)


def test_runs_that_read_what_the_processor_makes_are_taken(folder):
    prompts = {"What?": "the prompt"}
    checks.check_model(folder, SIDE, prompts, 64, of_files())
    checks.check_model(folder, SIDE, prompts, 64)  # phantoms are squares of this side


@pytest.mark.parametrize(
    "size, data, message",
    [
        (SIDE, of_files(max_pixels=0), f"set config.data.max_pixels to {SIDE**2}"),
        (SIDE, of_files(max_pixels=476**2), f"stretched to {SIDE} x {SIDE} pixels"),
        (112, None, "reads squares of 224 pixels, and the images of config.data.source='phantom'"),
    ],
)
def test_others_are_refused_in_a_line(folder, size, data, message):
    with pytest.raises(UserError) as refusal:
        checks.check_model(folder, size, {"What?": "the prompt"}, 64, data)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
