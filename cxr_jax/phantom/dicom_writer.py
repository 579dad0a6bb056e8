"""Write a phantom as a real digital radiograph: DICOM DX, 12 bits, MONOCHROME1 or 2, with a VOI window."""

import hashlib
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from cxr_jax.errors import UserError

# stored values the display range 0..1 is mapped to; the rest of the range is headroom, as on a real detector
_FOOT = 32  # per 4096


def _uid(*parts) -> str:
    """A UID under the UUID root 2.25, the same for the same parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:15], 'big')}"


def _stored(image, photometric, bits):
    """(stored uint16 [H,W], window centre, window width): the linear VOI window undoes it."""
    top = (1 << bits) - 1
    foot = _FOOT * (top + 1) // 4096
    span = top - 2 * foot
    shown = np.round(np.clip(image, 0.0, 1.0) * span)
    if photometric == "MONOCHROME1":  # lowest stored value is white
        shown = span - shown
    # DICOM linear window: y = (x - (c - 0.5)) / (w - 1) + 0.5
    return (shown + foot).astype(np.uint16), foot + span / 2 + 0.5, float(span + 1)


def write_dicom(path, image, *, hospital, photometric="MONOCHROME2", bits=12, ap, seed) -> None:
    """Write image float32 [H,W] in 0..1 (opacity bright) to path as Explicit VR little endian DX.

    hospital: "A" or "B", stated as the institution. ap: view position AP rather than PA. seed: any value that
    identifies the phantom; all UIDs and the patient follow from it and the hospital: files are reproducible.
    Raises UserError for a photometric interpretation, bit depth or image shape it cannot write.
    """
    image = np.asarray(image)
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise UserError(f"photometric must be MONOCHROME1 or MONOCHROME2, not {photometric!r}")
    if not 8 < bits <= 16:
        raise UserError(f"bits must be 9 to 16, not {bits}")
    if image.ndim != 2:
        raise UserError(f"a phantom image is [H, W], not of shape {image.shape}")
    pixels, centre, width = _stored(image, photometric, bits)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = _uid("image", hospital, seed, photometric, bits)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = _uid("cxr_jax phantom")
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    _describe(ds, meta, hospital, ap, seed)
    _pixel_module(ds, pixels, photometric, bits, centre, width)
    pydicom.dcmwrite(Path(path), ds, enforce_file_format=True)


def _describe(ds, meta, hospital, ap, seed):
    """Who, where and how; everything says that this is a synthetic picture."""
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    ds.StudyInstanceUID = _uid("study", hospital, seed)
    ds.SeriesInstanceUID = _uid("series", hospital, seed, ap)
    ds.PatientName, ds.PatientID = f"PHANTOM^{hospital}{seed}", f"PHANTOM-{hospital}-{seed}"
    ds.PatientBirthDate, ds.PatientSex = "", "O"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20000101", "000000", "", ""
    ds.ReferringPhysicianName = ""
    ds.InstitutionName = f"Phantom hospital {hospital}"
    ds.Manufacturer, ds.ManufacturerModelName = "cxr_jax", "phantom renderer"
    ds.StudyDescription, ds.SeriesDescription = "Synthetic chest radiograph", "AP" if ap else "PA"
    ds.Modality, ds.BodyPartExamined = "DX", "CHEST"
    ds.ViewPosition = "AP" if ap else "PA"
    ds.PatientOrientation = ["L", "F"]
    ds.ImageLaterality = "U"
    ds.SeriesNumber, ds.InstanceNumber = "1", "1"
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.ImageType = ["ORIGINAL", "PRIMARY", ""]
    ds.BurnedInAnnotation = "NO"


def _pixel_module(ds, pixels, photometric, bits, centre, width):
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, photometric
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, 0
    ds.ImagerPixelSpacing = [1.6, 1.6]
    ds.PixelIntensityRelationship = "LOG"
    ds.PixelIntensityRelationshipSign = -1 if photometric == "MONOCHROME2" else 1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.WindowCenter, ds.WindowWidth = f"{centre:g}", f"{width:g}"
    ds.VOILUTFunction = "LINEAR"
    ds.PresentationLUTShape = "INVERSE" if photometric == "MONOCHROME1" else "IDENTITY"
    ds.LossyImageCompression = "00"
    ds.PixelData = pixels.astype("<u2").tobytes()
