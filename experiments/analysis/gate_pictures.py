"""Pictures for measuring the image gate: what is no chest film, drawn, and films that are changed as films are.

All are float32 [H, W] in 0..1 and a function of (kind, number) alone.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image as PilImage
from PIL import ImageDraw, ImageFilter, ImageFont

Picture = np.ndarray
Random = np.random.Generator
Maker = Callable[[Random], Picture]

WORDS = (
    "patient chest film report left right lung clear no acute finding the of and heart size normal follow up date "
    "hospital radiology department dear colleague thank you for referring pain since weeks history blood pressure "
    "medication daily dose tablets laboratory values invoice total amount due page"
).split()


# ---- Patterns --------------------------------------------------------------------------------------


def draw_white_noise(random: Random) -> Picture:
    """Uniform, normal or black-and-white noise, of 64 to 1024 px."""
    side = int(random.choice([64, 128, 256, 512, 1024]))
    sort = random.integers(3)
    if sort == 0:
        return random.random((side, side))
    if sort == 1:
        return random.normal(0.5, random.uniform(0.05, 0.3), (side, side))
    return (random.random((side, side)) < random.uniform(0.1, 0.9)).astype(float)


def draw_coloured_noise(random: Random) -> Picture:
    """Noise whose amplitude falls with the frequency to the power of 0.5 to 2.5: clouds, in the end."""
    side = int(random.choice([128, 256, 512]))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(random.normal(size=(side, side)))
    noise = np.fft.ifft2(spectrum / frequency ** random.uniform(0.5, 2.5)).real
    return 0.5 + (noise - noise.mean()) / noise.std() * random.uniform(0.12, 0.25)


def draw_gradient(random: Random) -> Picture:
    """A ramp in any direction, or around a point."""
    down, right = np.mgrid[:256, :256] / 255
    turn = random.uniform(0, 2 * np.pi)
    ramp = right * np.cos(turn) + down * np.sin(turn)
    if random.integers(2):
        ramp = np.hypot(right - random.random(), down - random.random())
    return ((ramp - ramp.min()) / np.ptp(ramp)) ** random.uniform(0.5, 2)


def draw_checkers(random: Random) -> Picture:
    """A checkerboard, or stripes."""
    width = int(random.choice([4, 8, 16, 32, 64]))
    height = int(random.choice([width, 10**6]))
    down, right = np.mgrid[:256, :256]
    return ((right // width + down // height) % 2) * random.uniform(0.4, 1)


def draw_shapes(random: Random) -> Picture:
    """Ellipses and rectangles of any gray."""
    image = PilImage.new("L", (400, 400), int(random.integers(256)))
    canvas = ImageDraw.Draw(image)
    for _ in range(int(random.integers(1, 20))):
        left, top = random.integers(0, 350, 2)
        right, bottom = left + random.integers(10, 200), top + random.integers(10, 200)
        draw = canvas.ellipse if random.integers(2) else canvas.rectangle
        draw([int(left), int(top), int(right), int(bottom)], fill=int(random.integers(256)))
    return np.asarray(image) / 255


def draw_text_page(random: Random) -> Picture:
    """Lines of words, dense or sparse, dark on light or the other way round, as printed or as scanned."""
    width, height = int(random.integers(400, 900)), int(random.integers(400, 1200))
    image = PilImage.new("L", (width, height), 255)
    canvas = ImageDraw.Draw(image)
    font_size, margin = int(random.integers(9, 30)), int(random.integers(10, 80))
    font = ImageFont.load_default(font_size)
    blank_lines = 0.05 if random.random() > 0.3 else 0.6
    top = margin
    while top < height - margin - font_size:
        if random.random() > blank_lines:
            line, length = "", (width - 2 * margin - 40) * random.uniform(0.5, 1)
            while canvas.textlength(line, font) < length:
                line += str(random.choice(WORDS)) + " "
            canvas.text((margin, top), line, fill=int(random.integers(90)), font=font)
        top += int(font_size * random.uniform(1.2, 1.6))
    page = np.asarray(image) / 255
    if random.random() < 0.35:
        page = 1 - page
    if random.random() < 0.4:
        page = page * random.uniform(0.7, 1) + random.normal(0, 0.02, page.shape)
        page = page + np.linspace(0, random.uniform(0, 0.2), width)
    return page


# ---- Other radiographs -----------------------------------------------------------------------------


def draw_hand(random: Random) -> Picture:
    """A hand: fingers with their bones, spread, on an empty field."""
    side = 512
    flesh_image, bone_image = (PilImage.new("L", (side, side), 0) for _ in range(2))
    flesh, bones = ImageDraw.Draw(flesh_image), ImageDraw.Draw(bone_image)
    middle, wrist = side / 2 + random.uniform(-40, 40), side * random.uniform(0.6, 0.68)
    palm, finger = side * random.uniform(0.1, 0.14), side * random.uniform(0.28, 0.38)
    box = (middle - palm, wrist - palm * 1.1, middle + palm, wrist + palm * 1.1)
    flesh.rounded_rectangle(box, radius=30, fill=120)
    flesh.rectangle([middle - palm * 0.7, wrist, middle + palm * 0.7, side], fill=120)
    for offset in (-0.35, 0.35):
        start = (middle + offset * palm, wrist + palm * 1.3)
        _capsule(bones, start, (start[0], side + 30), palm * 0.42, 200)
    for _ in range(8):
        right = middle + random.uniform(-0.7, 0.7) * palm
        _disc(bones, (right, wrist + palm * random.uniform(0.6, 1.1)), 28, 190)

    # Root of each finger beside the middle, in palms; its turn; its length.
    fingers = [(-0.78, -0.33, 0.8), (-0.26, -0.12, 0.97), (0.26, 0.05, 1.05), (0.78, 0.25, 0.9)]
    for root, turn, length in [*fingers, (1.0, 0.8, 0.75)]:
        turn += random.uniform(-0.05, 0.05)
        start = np.array([middle + root * palm, wrist - palm * 0.2])
        tip = start + finger * length * np.array([np.sin(turn), -np.cos(turn)])
        _capsule(flesh, tuple(start), tuple(tip), palm * 0.42, 110)
        for begin, end in ((0.03, 0.39), (0.45, 0.69), (0.75, 0.95)):
            ends = [tuple(start + (tip - start) * share) for share in (begin, end)]
            _capsule(bones, ends[0], ends[1], palm * 0.18, 210)
    picture = _finish_bones(random, flesh_image, bone_image, 4)
    if random.integers(2):
        picture = picture[:, ::-1]
    return np.rot90(picture, int(random.integers(4)) if random.random() < 0.3 else 0)


def draw_knees(random: Random) -> Picture:
    """One knee or two, from the front."""
    side = 512
    flesh_image, bone_image = (PilImage.new("L", (side, side), 0) for _ in range(2))
    flesh, bones = ImageDraw.Draw(flesh_image), ImageDraw.Draw(bone_image)
    # Half widths at heights, both as shares.
    leg = [(1.5, 0.0), (1.1, 0.5), (1.2, 1.0)]
    thigh = [(0.45, 0.0), (0.55, 0.35), (0.9, 0.46), (0.8, 0.5)]
    shin = [(0.85, 0.52), (0.8, 0.58), (0.5, 0.7), (0.4, 1.0)]
    for place in ((0.5,), (0.27, 0.73))[int(random.integers(2))]:
        middle = side * place + random.uniform(-10, 10)
        width = side * random.uniform(0.1, 0.14)
        for canvas, outline, level in ((flesh, leg, 115), (bones, thigh, 200), (bones, shin, 205)):
            left = [(middle - share * width, side * height) for share, height in outline]
            right = [(middle + share * width, side * height) for share, height in outline]
            canvas.polygon(left + right[::-1], fill=level)
        start = (middle + width * 0.85, side * 0.6)
        _capsule(bones, start, (middle + width * 0.7, side + 20), width * 0.22, 180)
    return _finish_bones(random, flesh_image, bone_image, 6)


def draw_ct_slice(random: Random) -> Picture:
    """A body across, with lungs or with a belly's organs, with or without the table below."""
    side = 512
    picture = np.zeros((side, side))
    middle = side / 2 + random.uniform(-15, 15, 2)
    wide, high = side * random.uniform(0.36, 0.47), side * random.uniform(0.25, 0.36)

    def put(right: float, down: float, size: tuple[float, float], level: float, turn: float = 0.0):
        centre = (middle[0] + right * wide, middle[1] + down * high)
        picture[_ellipse(side, centre, (size[0] * wide, size[1] * high), turn)] = level

    put(0, 0, (1, 1), 0.45)
    put(0, 0, (0.93, 0.92), 0.55)
    if random.integers(3):
        air = random.uniform(0.05, 0.2)
        for sign in (-1, 1):
            put(sign * 0.47, 0, (0.33, 0.68), air, sign * 0.1)
        put(0.1, -0.05, (0.22, 0.35), 0.6)
        for _ in range(60):
            sign, size = random.choice([-1, 1]), random.uniform(0.005, 0.02)
            right = sign * (0.47 + random.normal() * 0.12)
            put(right, random.normal() * 0.25, (size, size * 1.4), 0.5)
    else:
        for right, down, size in (
            (-0.45, 0, (0.38, 0.55)),
            (0.55, 0.2, (0.15, 0.25)),
            (0.3, -0.4, (0.2, 0.2)),
        ):
            put(right, down, size, random.choice([0.1, 0.5, 0.65, 0.66]))
    put(0, 0.68, (0.11, 0.16), 0.95)
    for turn in 2 * np.pi * (np.arange(12) + random.uniform(-0.2, 0.2, 12)) / 12:
        put(np.cos(turn) * 0.84, np.sin(turn) * 0.84, (0.05, 0.03), 0.9, turn + 1.5)
    if random.random() < 0.6:
        top = int(min(side - 5, middle[1] + high + random.uniform(5, 30)))
        picture[top : top + 4, 40:-40] = 0.3
    picture = _soften(picture, 1.2)
    grain = random.normal(0, random.uniform(0.005, 0.03), picture.shape)
    return picture + grain * (picture > 0.02)


def draw_head(random: Random) -> Picture:
    """A head across: a bright ring, gray inside, two dark ventricles."""
    side = 256
    middle, picture = (side / 2, side / 2), np.zeros((side, side))
    wide, high = side * random.uniform(0.3, 0.38), side * random.uniform(0.38, 0.46)
    picture[_ellipse(side, middle, (wide, high))] = 0.95
    picture[_ellipse(side, middle, (wide * 0.9, high * 0.92))] = 0.45
    for _ in range(40):
        centre = np.array(middle) + random.normal(size=2) * (wide, high) * 0.35
        spot = _ellipse(side, centre, random.uniform(2, 9, 2), random.uniform(0, 3))
        picture[spot] += random.uniform(-0.08, 0.08)
    for sign in (-1, 1):
        centre = (middle[0] + sign * 14, middle[1])
        picture[_ellipse(side, centre, (6, 30), sign * 0.3)] = 0.15
    return _soften(picture, 1.5)


MAKERS: dict[str, Maker] = {
    "white_noise": draw_white_noise,
    "coloured_noise": draw_coloured_noise,
    "gradient": draw_gradient,
    "checkers": draw_checkers,
    "shapes": draw_shapes,
    "text_page": draw_text_page,
    "hand_drawn": draw_hand,
    "knees_drawn": draw_knees,
    "ct_slice_drawn": draw_ct_slice,
    "head_drawn": draw_head,
}


def make(kind: str, number: int) -> Picture:
    """Draw picture `number` of a kind of MAKERS."""
    random = np.random.default_rng([list(MAKERS).index(kind), number])
    return np.clip(MAKERS[kind](random), 0, 1).astype(np.float32)


# ---- Brushes ---------------------------------------------------------------------------------------


def _disc(canvas: ImageDraw.ImageDraw, centre: tuple, width: float, level: int) -> None:
    left, top = (float(place - width / 2) for place in centre)
    canvas.ellipse([left, top, left + width, top + width], fill=level)


def _capsule(canvas: ImageDraw.ImageDraw, start: tuple, end: tuple, width: float, level: int):
    canvas.line([tuple(map(float, start)), tuple(map(float, end))], fill=level, width=int(width))
    for centre in (start, end):
        _disc(canvas, centre, width, level)


def _ellipse(side: int, centre: tuple, radii: tuple, turn: float = 0.0) -> np.ndarray:
    down, right = np.mgrid[:side, :side]
    down, right = down - centre[1], right - centre[0]
    first = right * np.cos(turn) + down * np.sin(turn)
    second = down * np.cos(turn) - right * np.sin(turn)
    return (first / radii[0]) ** 2 + (second / radii[1]) ** 2 < 1


def _soften(picture: Picture, radius: float) -> Picture:
    image = PilImage.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius))) / 255


def _finish_bones(
    random: Random, flesh: PilImage.Image, bones: PilImage.Image, radius: float
) -> Picture:
    picture = np.maximum(
        _soften(np.asarray(flesh) / 255, radius), _soften(np.asarray(bones) / 255, radius / 2)
    )
    cells = random.normal(size=(65, 65)).astype(np.float32)
    grain = PilImage.fromarray(cells).resize(flesh.size, PilImage.Resampling.BICUBIC)
    picture = picture + 0.03 * np.asarray(grain) * (picture > 0.1)
    return (picture + random.uniform(0, 0.1)) * random.uniform(0.7, 1)


# ---- Films, changed as films are -------------------------------------------------------------------


def change_film(film: Picture, random: Random) -> Picture:
    """Change a film in some of the ways in which real ones differ, several at once."""
    film = np.asarray(film, np.float32)
    height, width = film.shape
    if random.random() < 0.5:  # tone curve
        film = np.clip(film, 0, 1) ** random.uniform(0.5, 2)
    if random.random() < 0.5:  # crop
        top, bottom = (int(share * height) for share in random.uniform(0, 0.12, 2))
        left, right = (int(share * width) for share in random.uniform(0, 0.12, 2))
        film = film[top : height - bottom, left : width - right]
    if random.random() < 0.3:  # tilted, with black corners
        tilted = PilImage.fromarray(np.ascontiguousarray(film))
        film = np.asarray(tilted.rotate(random.uniform(-10, 10), PilImage.Resampling.BILINEAR))
    if random.random() < 0.3:  # mirrored
        film = film[:, ::-1]
    if random.random() < 0.3:  # turned
        film = np.rot90(film, int(random.integers(1, 4)))
    if random.random() < 0.25:  # inverted
        film = 1 - film
    if random.random() < 0.3:  # collimation or paper around
        borders = [
            tuple(int(share * side) for share in random.uniform(0, 0.15, 2)) for side in film.shape
        ]
        film = np.pad(film, borders, constant_values=float(random.choice([0, 0, 1])))
    if random.random() < 0.3:  # grain
        film = film + random.normal(0, random.uniform(0.005, 0.05), film.shape)
    if random.random() < 0.3:  # small, as previews are
        side = int(random.choice([48, 64, 96, 128]))
        small = PilImage.fromarray(np.ascontiguousarray(film, np.float32))
        film = np.asarray(small.resize((side, side), PilImage.Resampling.BOX))
    if random.random() < 0.3:  # little contrast
        film = random.uniform(0, 0.5) + film * random.uniform(0.2, 0.5)
    if random.random() < 0.2:  # out of focus
        film = _soften(film, random.uniform(0.5, 3) * film.shape[0] / 256)
    return np.clip(film, 0, 1).astype(np.float32)
