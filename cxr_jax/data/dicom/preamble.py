"""The start of a DICOM file: the mark and the transfer syntax, made up for old files that have none.

Files from before 1993's PS3.10, and what some archives hand out, begin with their first element: no preamble, no
mark, often no transfer syntax. What is read after this module has all three.
"""

import io
import struct
from pathlib import Path

from pydicom.filereader import _read_file_meta_info
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from cxr_jax.data import radiograph
from cxr_jax.errors import UserError

PREAMBLE = bytes(128) + radiograph.DICOM_MAGIC
SHORT_VRS = frozenset(
    b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split()
)  # explicit: a length of 2 bytes
LONG_VRS = frozenset(
    b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split()
)  # of 4 bytes, after 2 of padding
UNDEFINED_LENGTH = 0xFFFFFFFF
# A data set begins with what identifies it (group 8) or, stripped of that, with a group soon after.
FIRST_GROUPS = range(0x0008, 0x0030, 2)
ELEMENTS_LOOKED_AT = (
    4  # enough to tell the three encodings apart, and any other kind of file from all of them
)


def complete(path: str | Path, file_bytes: bytes) -> bytes:
    """Return the bytes of a DICOM file with its preamble, mark and transfer syntax, whichever of them it lacks.

    Args:
        path: only the name used in messages.

    Raises:
        UserError: for what is no DICOM file, or does not let its transfer syntax be told.
    """
    if file_bytes[128:132] == radiograph.DICOM_MAGIC:
        start = len(PREAMBLE)
    elif file_bytes.startswith(radiograph.DICOM_MAGIC):
        start = len(radiograph.DICOM_MAGIC)
    else:
        start = 0

    # ---- The file's own header (group 2), which is never deflated ----
    data_start, has_meta = start, file_bytes[start : start + 2] == b"\x02\x00"
    if has_meta:
        stream = io.BytesIO(file_bytes)
        stream.seek(start)
        if "TransferSyntaxUID" in _read_file_meta_info(stream):
            return file_bytes if start == len(PREAMBLE) else PREAMBLE + file_bytes[start:]
        data_start = stream.tell()

    # ---- Without a transfer syntax, the first elements show how they are written ----
    syntax = guess_syntax(file_bytes, data_start)
    if syntax is None:
        if start or has_meta:
            raise UserError(f"{path}: the DICOM file does not say its transfer syntax")
        raise UserError(f"{path}: {radiograph.NO_PICTURE}")
    # Values have an even number of bytes.
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    meta = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(value)) + value
    return PREAMBLE + meta + file_bytes[data_start:]


def guess_syntax(file_bytes: bytes, start: int) -> UID | None:
    """Tell the transfer syntax of the data set at `start` by its first elements; None if there is no data set."""
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian):
        if _holds_elements(file_bytes, start, syntax):
            return syntax
    return None


def _holds_elements(file_bytes: bytes, start: int, syntax: UID) -> bool:
    """Whether elements of this syntax, with growing tags, follow each other from `start`."""
    order = "<" if syntax.is_little_endian else ">"
    position, last_tag = start, (0, 0)
    for _ in range(ELEMENTS_LOOKED_AT):
        if position == len(file_bytes) and position > start:
            return True
        if len(file_bytes) - position < 8:
            return False
        tag = struct.unpack_from(order + "HH", file_bytes, position)
        # Tags of a data set grow. Bytes of another kind of file seldom do,
        # and lengths that lead past its end betray it.
        if tag <= last_tag or (position == start and tag[0] not in FIRST_GROUPS):
            return False
        vr, header_size = file_bytes[position + 4 : position + 6], 8
        if syntax.is_implicit_VR:
            (length,) = struct.unpack_from(order + "I", file_bytes, position + 4)
        elif vr in SHORT_VRS:
            (length,) = struct.unpack_from(order + "H", file_bytes, position + 6)
        elif vr in LONG_VRS and len(file_bytes) - position >= 12:
            (length,) = struct.unpack_from(order + "I", file_bytes, position + 8)
            header_size = 12
        else:
            return False
        if length == UNDEFINED_LENGTH:  # a sequence: what came before is enough
            return True
        position, last_tag = position + header_size + length, tag
        if position > len(file_bytes):
            return False
    return True
