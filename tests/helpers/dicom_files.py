"""Synthetic DICOM files, whole or with the faults that a test asks for."""

import io
import warnings

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
)

SECRET = "SECRETNAME"


def ramp(bits=12, h=64, w=80):
    """Every row runs from 0 to the top of the stored range."""
    return np.tile(np.linspace(0, 2**bits - 1, w).astype(np.uint16), (h, 1))


def build(pixels=None, *, bits=12, syntax=ExplicitVRLittleEndian, remove=(), **elements):
    """Bytes of a synthetic DX file. `elements` override or add header elements by keyword."""
    pixels = ramp(bits) if pixels is None else pixels
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    ds.SOPClassUID, ds.SOPInstanceUID = DigitalXRayImageStorageForPresentation, "1.2.3.4"
    ds.PatientName, ds.PatientID, ds.InstitutionName = SECRET, SECRET, SECRET
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition = "DX", "CHEST", "PA"
    ds.Rows, ds.Columns = pixels.shape[-2:] if pixels.shape[-1] != 3 else pixels.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = 8 * pixels.dtype.itemsize
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = (
        bits,
        bits - 1,
        int(pixels.dtype.kind == "i"),
    )
    big = syntax == ExplicitVRBigEndian
    ds.PixelData = (pixels.byteswap() if big else pixels).tobytes()
    ds["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    for name, value in elements.items():
        # An overlay in the bits of the pixels (retired): OverlayBitPosition_0 .. _15.
        if name.startswith("OverlayBitPosition_"):
            group = 0x6000 + 2 * int(name.rpartition("_")[2])
            ds.add_new((group, 0x0100), "US", ds.BitsAllocated)
            ds.add_new((group, 0x0102), "US", value)
        else:
            setattr(ds, name, value)
    for name in remove:
        delattr(ds, name)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()
