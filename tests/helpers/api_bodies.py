"""Bodies of chat completions, and films as data URLs."""

import base64
import io

import numpy as np
from films import draw_film
from PIL import Image as PilImage

QUESTION = "Find abnormalities and support devices."


def png_bytes(pixels):
    buffer = io.BytesIO()
    PilImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def film_url(seed=0, height=260, width=240):
    return data_url(png_bytes(draw_film(height, width, seed)))


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def user(*urls, text=QUESTION):
    parts = [*map(image_part, urls), {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def body(*urls, text=QUESTION, **fields):
    """A request about films, or about none."""
    return {"model": "phantom", "messages": [user(*urls, text=text)], **fields}


NOISE = data_url(
    png_bytes((np.random.default_rng(5).integers(0, 256, (300, 260))).astype(np.uint8))
)
BLANK = data_url(png_bytes(np.full((260, 240), 90, np.uint8)))
COLOUR = data_url(
    png_bytes(
        np.stack([draw_film(260, 240), np.zeros((260, 240), np.uint8), draw_film(260, 240, 3)], -1)
    )
)
