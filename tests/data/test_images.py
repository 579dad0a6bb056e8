"""Reading PNG and JPEG files, and turning pixels into the patches of the Qwen2-VL image processor."""

import dataclasses
import io
import json
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image as PilImage
from places import SHARED

import cxr_jax
from cxr_jax.data import images, radiograph, resize
from cxr_jax.errors import UserError
from cxr_jax.inference import image_inputs
from cxr_jax.inference import model as inference_model
from cxr_jax.models import image_processor, registry
from cxr_jax.models.qwen2_5_vl.config import PHANTOM
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR

DATA = SHARED


def picture(h=97, w=61, seed=0):
    """A smooth uint8 picture with some noise: resizing it is not trivial."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    smooth = 120 + 80 * np.sin(x / 9) * np.cos(y / 13)
    return np.clip(smooth + rng.normal(0, 15, (h, w)), 0, 255).astype(np.uint8)


def save(path, array, mode=None, **options):
    image = PilImage.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


# --- patches


@pytest.mark.parametrize("h, w", [(224, 224), (97, 61), (300, 517), (40, 900), (56, 84)])
def test_prepare_equals_the_hugging_face_processor(h, w):
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil()
    low, high = 80 * 80, 400 * 400
    gray = picture(h, w)
    want = processor([PilImage.fromarray(gray)], size={"shortest_edge": low, "longest_edge": high})
    floats = gray / np.float32(255)
    patches, grid = PROCESSOR.prepare(floats, min_pixels=low, max_pixels=high)
    assert grid == tuple(want["image_grid_thw"][0])
    assert patches.dtype == np.float32
    np.testing.assert_array_equal(patches, want["pixel_values"])
    # And what a compiled program makes of the levels, which is all that travels to it.
    levels = PROCESSOR.cut(PROCESSOR.levels(floats, low, high))
    assert levels.dtype == np.uint8
    np.testing.assert_array_equal(jax.jit(PROCESSOR.normalise)(levels), patches)


def other_processor(**changes):
    """A processor of other constants, as other families have."""
    return dataclasses.replace(PROCESSOR, mean=(0.5,) * 3, std=(0.5,) * 3, **changes)


def test_another_size_of_patches_equals_the_hugging_face_processor():
    """Qwen3-VL's: patches of 16 pixels, mean and deviation 0.5."""
    from transformers import Qwen2VLImageProcessorPil

    half = [0.5] * 3
    processor = Qwen2VLImageProcessorPil(patch_size=16, image_mean=half, image_std=half)
    gray = picture(297, 461)
    size = {"shortest_edge": 256**2, "longest_edge": 320**2}
    want = processor([PilImage.fromarray(gray)], size=size)
    patches, grid = other_processor(patch_size=16).prepare(gray / np.float32(255), 256**2, 320**2)
    assert grid == tuple(want["image_grid_thw"][0])
    np.testing.assert_array_equal(patches, want["pixel_values"])


def test_a_square_of_one_size_equals_the_hugging_face_processor():
    """Gemma 3's: every picture is stretched to one square, bilinear; patches without an axis of frames."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    gray = picture(97, 61)
    processor = SiglipImageProcessorPil(size={"height": 112, "width": 112}, resample=2)
    want = processor([PilImage.fromarray(gray).convert("RGB")])["pixel_values"][0]  # [3, 112, 112]
    ours = other_processor(merge_size=4, temporal_patch_size=1, side=112, resample=2)
    patches, grid = ours.prepare(gray / np.float32(255))
    assert grid == (1, 8, 8) and patches.shape == (64, 588)
    # Raster order of the reference: a row of patches after the other.
    want = want.reshape(3, 8, 14, 8, 14).transpose(1, 3, 0, 2, 4).reshape(8, 8, 588)
    blocks = want.reshape(2, 4, 2, 4, 588).transpose(0, 2, 1, 3, 4).reshape(64, 588)
    np.testing.assert_array_equal(patches, blocks)


def test_default_limits_are_those_of_the_processor():
    from transformers import Qwen2VLImageProcessorPil

    size = Qwen2VLImageProcessorPil().size
    assert (size["shortest_edge"], size["longest_edge"]) == PROCESSOR.default_limits


def test_patchify_equals_prepare_of_the_same_picture_as_png(tmp_path):
    floats = np.random.default_rng(1).random((2, 224, 224), np.float32)
    got = jax.jit(PROCESSOR.patchify)(floats)
    assert got.shape == (2, 256, 1176)
    np.testing.assert_allclose(PROCESSOR.patchify(floats, np), got, atol=1e-6)
    for row, pixels in zip(np.asarray(got), floats, strict=True):
        path = save(tmp_path / "x.png", image_processor.quantise(pixels))
        patches, grid = PROCESSOR.prepare(images.read_image(path).pixels)
        assert grid == (1, 16, 16)
        np.testing.assert_allclose(row, patches, atol=1e-6)


def test_patchify_refuses_sizes_off_the_grid():
    with pytest.raises(UserError, match="28"):
        PROCESSOR.patchify(np.zeros((1, 224, 230)))


def test_smart_resize_refuses_strips():
    with pytest.raises(UserError, match="aspect"):
        PROCESSOR.resized(1, 20_000, 784, 10**6)


def test_fit_pads_to_a_square_and_keeps_depth():
    tall = np.full((300, 100), 0.5, np.float32)
    out = resize.fit(tall, 60)
    assert out.shape == (60, 60) and out.dtype == np.float32
    assert out[30, 30] == pytest.approx(0.5) and out[30, 5] == 0 and out[30, -5] == 0
    ramp = np.tile(np.linspace(0, 1, 1024, dtype=np.float32), (1024, 1))
    assert len(np.unique(resize.fit(ramp, 512))) > 400  # more levels than 8 bits would leave
    np.testing.assert_array_equal(resize.fit(ramp, 1024), ramp)


def test_fit_to_model_only_for_fixed_sizes():
    gray = picture(90, 60) / np.float32(255)
    assert image_inputs.fit_to_model(gray, (224 * 224, 224 * 224)).shape == (224, 224)
    np.testing.assert_array_equal(image_inputs.fit_to_model(gray, (3136, 10**6)), gray)


def test_buckets_pad_and_neither_stretch_nor_crop():
    rng, limit = np.random.default_rng(0), 476 * 476
    shapes = image_inputs.bucket_shapes(limit, 28)
    assert len(shapes) == 9 and (476, 476) in shapes
    assert all(
        h % 28 == w % 28 == 0 and 0.9 * limit < h * w <= limit and 1 / 2.1 < h / w < 2.1
        for h, w in shapes
    )
    for limit_ in (784, 3136, 12845056):
        assert 1 <= len(image_inputs.bucket_shapes(limit_, 28)) <= 9
    for _ in range(6):
        side = rng.integers(650, 900)
        h, w = side, int(side * rng.uniform(0.55, 1.8))
        white = np.ones((h, w), np.float32)
        patches, grid = image_inputs.prepare_in_buckets(PROCESSOR, white, limit)
        shape = grid[1] * 14, grid[2] * 14
        padded = resize.fit(white, shape)
        want, same = PROCESSOR.prepare(
            padded, 784, limit
        )  # the processor's arithmetic, with nothing to resize
        np.testing.assert_allclose(patches, want, atol=1e-6)
        shown = padded > 0.5
        assert shape in shapes and grid == same
        tall, wide = shown.any(1).sum(), shown.any(0).sum()
        assert abs(tall / wide / (h / w) - 1) < 0.01 and (tall == shape[0] or wide == shape[1])
        assert shown.mean() > 0.87  # what is padded
    with pytest.raises(UserError, match="aspect"):
        image_inputs.prepare_in_buckets(PROCESSOR, np.zeros((1, 300)), limit)


def test_buckets_never_enlarge_a_film():
    """Of films smaller than max_pixels: no side of the shape's film is longer than the film's own."""
    rng = np.random.default_rng(1)
    limits = [(784, 476**2), (3136, 12845056), (128**2, 476**2)]
    shapes = set()
    for _ in range(300):
        low, high = limits[rng.integers(3)]
        h = int(rng.integers(130, 3200))
        w = int(h * rng.uniform(0.5, 2.0))
        height, width = image_inputs.bucket_shape(h, w, low, high, 28)
        shapes.add((height, width))
        assert height % 28 == width % 28 == 0 and height * width <= high
        # `resize.fit` scales by the smaller one; what is below min_pixels is enlarged by the processor, too.
        assert min(height / h, width / w) <= 1 or h * w < low
        assert height * width >= min(0.4 * min(h * w, high), high)  # and much is left of it
    assert len(shapes) < 80  # few, for 300 sizes under three limits
    # Published limits: a film of CheXpert-small became 3,584 x 3,584 pixels.
    _, grid = image_inputs.prepare_in_buckets(
        PROCESSOR, np.ones((390, 320), np.float32), 12845056, 3136
    )
    assert grid[1] * grid[2] * 196 <= 390 * 320
    # As the processor, what is below min_pixels is enlarged, here to less than twice its area.
    assert image_inputs.bucket_shape(40, 40, 128**2, 476**2, 28) == (168, 168)


# --- a reader's own limit


def test_max_pixels_lowers_the_limit_as_in_the_processor():
    """The same sizes as `Qwen2VLImageProcessorPil` gives with max_pixels set."""
    from transformers import Qwen2VLImageProcessorPil

    rng = np.random.default_rng(2)
    for _ in range(6):
        h, w = (int(side) for side in rng.integers(200, 900, 2))
        most = int(rng.integers(128**2, 476**2))
        gray = picture(h, w)
        low, high = image_inputs.limited(PROCESSOR, (128**2, 12845056), most)
        patches, grid = PROCESSOR.prepare(gray / np.float32(255), low, high)
        size = {"shortest_edge": 128**2, "longest_edge": most}
        want = Qwen2VLImageProcessorPil()([PilImage.fromarray(gray)], size=size)
        assert grid == tuple(want["image_grid_thw"][0]) and grid[1] * grid[2] * 196 <= most
        np.testing.assert_allclose(patches, want["pixel_values"], atol=1e-6)


@pytest.mark.parametrize(
    "limits,most,want,remark",
    [
        ((3136, 12845056), None, (3136, 12845056), None),
        ((3136, 12845056), 10**6, (3136, 10**6), None),
        ((3136, 226576), 10**6, (3136, 226576), "above the model's own limit, 226576"),
        ((16384, 226576), 10000, (784, 10000), "below the model's min_pixels, 16384"),
        ((50176, 50176), 10**6, (50176, 50176), "above"),
        ((50176, 50176), 20000, (19600, 19600), "224 x 224 and now gets 140 x 140"),
        ((50176, 50176), 784, (784, 784), "28 x 28"),
    ],
)
def test_max_pixels_is_never_exceeded(limits, most, want, remark):
    assert image_inputs.limited(PROCESSOR, limits, most) == want
    if most is not None:
        said = image_inputs.remark_on_limit(PROCESSOR, limits, most)
        assert said is None if remark is None else (remark in said and "\n" not in said)
        for h, w in ((30, 50), (3056, 2544), (390, 320)):
            fitted = image_inputs.fit_to_model(np.zeros((h, w)), want)
            _, grid = PROCESSOR.prepare(fitted, *want)
            assert grid[1] * grid[2] * 196 <= max(most, 784)


def test_max_pixels_keeps_to_the_tokens_of_the_family():
    """Tokens of Qwen3-VL are 32 pixels wide; Gemma 3 stretches every picture to one size."""
    of_qwen3 = registry.family_of_type("qwen3_vl").processor
    assert image_inputs.limited(of_qwen3, (224**2, 224**2), 200**2) == (192**2, 192**2)
    assert "now gets 192 x 192" in image_inputs.remark_on_limit(of_qwen3, (224**2, 224**2), 200**2)
    assert image_inputs.limited(of_qwen3, (128**2, 476**2), 10**4) == (32**2, 10**4)
    with pytest.raises(UserError, match="from 1024"):
        image_inputs.check_max_pixels(900, of_qwen3.factor)
    of_gemma = registry.family_of_type("gemma3").processor
    assert image_inputs.limited(of_gemma, (896**2, 896**2), 10**4) == (896**2, 896**2)
    assert "changes nothing" in image_inputs.remark_on_limit(of_gemma, (896**2, 896**2), 10**4)


@pytest.mark.parametrize("most", [783, 0, -5, 1e6, True, "many", float("nan")])
def test_a_bad_max_pixels_is_refused(most):
    with pytest.raises(UserError, match="max_pixels=.*whole number from 784"):
        cxr_jax.load("phantom", max_pixels=most)


# --- settings of a folder


def settings(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


NESTED = {"min_pixels": 6400, "max_pixels": 90000}
FLAT = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 3200, "longest_edge": 50000},
}
OURS = PROCESSOR.settings(3136, 226576)


@pytest.mark.parametrize(
    "files",
    [
        dict(preprocessor_config=FLAT),
        dict(preprocessor_config=OURS),
        dict(preprocessor_config={}),
        dict(preprocessor_config={**FLAT, "max_pixels": 40000, "min_pixels": None}),
        dict(preprocessor_config={"min_pixels": 5000}),
        dict(preprocessor_config=FLAT, processor_config={"processor_class": "Qwen2_5_VLProcessor"}),
        dict(preprocessor_config=FLAT, processor_config={"image_processor": {**FLAT, **NESTED}}),
        dict(
            processor_config={
                "image_processor": {"size": {"shortest_edge": 3200, "longest_edge": 60000}}
            }
        ),
        dict(preprocessor_config=FLAT, processor_config={"image_processor": None}),
    ],
)
def test_limits_are_those_that_transformers_reads(tmp_path, files):
    from transformers import Qwen2VLImageProcessorPil

    want = Qwen2VLImageProcessorPil.from_pretrained(settings(tmp_path, **files)).size
    model = inference_model.Model(PHANTOM, {}, folder=tmp_path)
    assert model.pixel_limits == (want["shortest_edge"], want["longest_edge"])


def test_without_settings_the_published_limits():
    assert (
        inference_model.Model(PHANTOM, {}).pixel_limits
        == PROCESSOR.published_limits
        == (3136, 12845056)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ({"size": 3}, "size is not a JSON object"),
        ({"max_pixels": "many"}, "max_pixels .* is many"),
        ({"max_pixels": 1e6}, "whole numbers"),
        ({"min_pixels": True}, "whole numbers"),
        ({"min_pixels": 783}, "is 783"),
        ({"min_pixels": 5000, "max_pixels": 4999}, "is 5000 and .* is 4999"),
        ({"size": {"height": 5}}, "whole numbers"),
        ({"patch_size": 16}, "patch_size is 16: .* 14 only"),
        ({"merge_size": 1}, "merge_size"),
        ({"temporal_patch_size": 1}, "temporal_patch_size"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is"),
        ({"image_std": [0.5]}, "image_std is"),
        ({"image_std": {"a": 1}}, "image_std is"),
        ({"resample": 2}, "resample is 2"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_convert_rgb": False}, "do_convert_rgb"),
        ({"do_normalize": "no\n"}, "do_normalize is no"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
    ],
)
def test_settings_that_we_do_not_follow_are_refused(tmp_path, change, message):
    for name in ("preprocessor_config", "processor_config"):
        whole = (
            change
            if isinstance(change, str)
            else change
            if "size" in change
            else {**OURS, **change}
        )
        nested = name == "processor_config" and isinstance(change, dict)
        settings(
            tmp_path,
            **{"preprocessor_config": OURS, name: {"image_processor": whole} if nested else whole},
        )
        with pytest.raises(UserError, match=message) as caught:
            inference_model.Model(PHANTOM, {}, folder=tmp_path).prepare(np.zeros((64, 64)))
        assert f"{name}.json" in str(caught.value) and "\n" not in str(caught.value)
        (tmp_path / f"{name}.json").unlink()


# --- formats that must load


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_every_png_mode_gives_the_same_gray(tmp_path, mode):
    gray = picture()
    image = images.read_image(save(tmp_path / "x.png", gray, mode))
    np.testing.assert_allclose(image.pixels * 255, gray, atol=0.01)
    assert (
        image.pixels.dtype == np.float32
        and image.meta["warnings"] == []
        and image.meta["bits"] == 8
    )


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_modes(tmp_path, mode):
    gray = picture(seed=2)
    image = images.read_image(save(tmp_path / "x.jpg", gray, mode, quality=95))
    assert np.abs(image.pixels * 255 - gray).mean() < 6


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_16_bit_png_is_not_clipped_to_white(tmp_path, bits):
    deep = (picture().astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)
    image = images.read_image(save(tmp_path / "x.png", deep))
    assert image.meta["bits"] == bits
    np.testing.assert_allclose(image.pixels, deep / (2**bits - 1), atol=1e-6)


def test_interlaced_one_bit_and_animated(tmp_path):
    bilevel = (picture() > 120).astype(np.uint8) * 255
    image = images.read_image(save(tmp_path / "x.png", bilevel, "1"))
    np.testing.assert_array_equal(image.pixels, bilevel / np.float32(255))
    frames = [PilImage.fromarray(picture(seed=s)) for s in (1, 2)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    image = images.read_image(tmp_path / "a.png")
    assert any("first was read" in note for note in image.meta["warnings"])


def test_exif_rotation_is_applied_and_said(tmp_path):
    gray = picture(96, 64)
    exif = PilImage.Exif()
    exif[0x0112] = 6
    image = images.read_image(save(tmp_path / "x.jpg", gray, quality=95, exif=exif))
    assert image.pixels.shape == (64, 96)
    assert np.abs(image.pixels * 255 - np.rot90(gray, -1)).mean() < 4
    assert any("EXIF" in note for note in image.meta["warnings"])


def test_told_by_content_not_by_name(tmp_path):
    save(tmp_path / "x.png", picture())
    (tmp_path / "x.png").rename(tmp_path / "x.dcm")
    assert images.read_image(tmp_path / "x.dcm").meta["kind"] == "PNG"


def test_renderers_differ_and_are_recorded(tmp_path):
    path = save(tmp_path / "x.png", (picture() // 4 + 40).astype(np.uint8))
    out = {name: images.read_image(path, name) for name in radiograph.RENDERERS}
    assert all(image.meta["renderer"] == name for name, image in out.items())
    assert out["voi"].pixels.max() < 0.5
    assert out["percentile"].pixels.max() == 1 and out["percentile"].pixels.min() == 0
    shares = np.histogram(out["mimic_jpg"].pixels, 4, (0, 1))[0] / out["mimic_jpg"].pixels.size
    assert shares.min() > 0.15  # equalised


def test_constant_and_colour_pictures_are_flagged(tmp_path):
    blank = images.read_image(save(tmp_path / "x.png", np.full((64, 64), 90, np.uint8)))
    assert "blank: the image is constant" in blank.meta["unusable"]
    rgb = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert images.read_image(save(tmp_path / "y.png", rgb)).meta["unusable"]


# --- files that must be refused, each with one clear line


def png_header(w, h):
    """A PNG that claims a size and holds next to nothing: a decompression bomb's outside."""
    word = lambda number: struct.pack(">I", number)
    chunk = lambda kind, body: word(len(body)) + kind + body + word(zlib.crc32(kind + body))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0))
    return (
        radiograph.PNG_MAGIC
        + head
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def png_bytes(array):
    out = io.BytesIO()
    PilImage.fromarray(array).save(out, "PNG")
    return out.getvalue()


REFUSED = {
    "empty": (b"", "empty"),
    "text.dcm": (b"PatientName: SECRET", "not a PNG, JPEG or DICOM"),
    "gif.png": (b"GIF89a" + bytes(200), "not a PNG, JPEG or DICOM"),
    "one.png": (png_bytes(np.zeros((1, 1), np.uint8)), "too small"),
    "small.png": (png_bytes(picture(31, 200)), "too small"),
    "strip.png": (png_bytes(picture(40, 1000)), "strip"),
    "cut.png": (png_bytes(picture())[:-2000], "damaged or cut short"),
    "magic.png": (radiograph.PNG_MAGIC, "damaged or cut short"),
    "magic.jpg": (radiograph.JPEG_MAGIC, "damaged or cut short"),
    "bomb.png": (png_header(65_535, 65_535), "megapixels"),
    "large.png": (png_header(9_000, 9_000), "megapixels"),
    "short.png": (png_header(400, 400), "damaged or cut short"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    data, reason = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=reason) as caught:
        images.read_image(path)
    line = str(caught.value)
    assert name in line and "\n" not in line and "SECRET" not in line


def test_missing_directory_and_bad_names(tmp_path):
    for path, reason in [(tmp_path / "no.png", "no such file"), (tmp_path, "not a regular file")]:
        with pytest.raises(UserError, match=reason):
            images.read_image(path)
    with pytest.raises(UserError):
        images.read_image("a\0b")
    with pytest.raises(UserError, match="renderer"):
        images.read_image(tmp_path / "no.png", "bright")


def test_random_damage_never_escapes_as_another_error(tmp_path):
    rng = np.random.default_rng(0)
    out = io.BytesIO()
    PilImage.fromarray(picture()).save(out, "JPEG")
    for base in (png_bytes(picture()), out.getvalue()):
        for _ in range(60):
            data = bytearray(base)
            for at in rng.integers(3, len(data), 6):
                data[at] = rng.integers(256)
            try:
                image = images.image_from_bytes("x", bytes(data))
            except UserError:
                continue
            assert (
                np.isfinite(image.pixels).all()
                and 0 <= image.pixels.min()
                and image.pixels.max() <= 1
            )


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is absent")
def test_real_radiographs_load():
    for path in sorted((DATA / "images").glob("*.[pj][np]g")):
        image = images.read_image(path)
        assert min(image.pixels.shape) >= 200 and image.pixels.std() > 0.05, path.name
        assert image.meta["unusable"] == [], path.name
