"""A reward in Python, as a user may bring it, that differs for all texts and rows: it shows any that are mixed up."""

import zlib


def of_text(texts, rows):
    """A number from 0 to 1 of what a completion says and whose it is."""
    pairs = zip(texts, rows, strict=True)
    return [zlib.crc32(f"{row['id']}: {text}".encode()) / 2**32 for text, row in pairs]
