"""What a document becomes, by name: one door for the command line and the room, so that both give the same bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cxr_jax.data import images, radiograph
from cxr_jax.errors import UserError
from cxr_jax.outputs import document as documents
from cxr_jax.outputs import told
from cxr_jax.outputs.dicom_source import Source, is_dicom, read_source

# highdicom takes a second to import, and most calls want no DICOM: their writers are imported where they are asked for.


class FilmFile(NamedTuple):
    """A film as it came: a name for messages, and the bytes of the file."""

    name: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """How an output is made.

    Attributes:
        at: when a draft was made, "2026-11-30T12:00:00Z"; a signed document has a time of its own.
        codes: of `codes.CHOICES`.
        subject: an opaque identifier of the patient, for FHIR.
        verifying_organisation: who answers for a reader's signature, for SR.
    """

    at: str
    codes: str = "standard"
    subject: str | None = None
    verifying_organisation: str | None = None


def read_films(paths: Sequence[str | Path]) -> list[FilmFile]:
    """Read films from files, as large as a film may be. Raises UserError."""
    return [FilmFile(str(path), radiograph.read_bytes(path)) for path in paths]


def export(
    kind: str, reading: Mapping[str, Any], films: Sequence[FilmFile], settings: ExportSettings
) -> bytes:
    """Make one output.

    Args:
        kind: of KINDS.
        reading: a `cxr_reading` document.
        films: its films in its order; for FHIR and JSON () will do.
        settings: how.

    Returns:
        The bytes of a file.

    Raises:
        UserError: for another kind, a document that is none, films that it was not made from, pictures where a DICOM's
            identity is needed.
    """
    if kind not in KINDS:
        raise UserError(f"export: {kind!r} is unknown, use one of {', '.join(KINDS)}")
    try:
        return KINDS[kind](reading, films, settings)
    except ModuleNotFoundError as error:
        # An installation without the extra reads films, and writes no DICOM.
        if (error.name or "").partition(".")[0] != "highdicom":
            raise
        raise UserError("DICOM outputs need highdicom: pip install 'cxr_jax[serve]'") from None


def _sources(films: Sequence[FilmFile]) -> list[Source]:
    return [read_source(film.name, film.data) for film in films]


def _json(reading: Mapping[str, Any], films: Sequence[FilmFile], settings: ExportSettings) -> bytes:
    # What is handed out is what the schema says, whoever has kept it.
    documents.check(reading)
    return documents.to_bytes(reading)


def _structured(writer: str) -> Callable[..., bytes]:
    """Make the output of a writer of `outputs.sr`, by its name; its library is imported when it is asked for."""

    def make(
        reading: Mapping[str, Any], films: Sequence[FilmFile], settings: ExportSettings
    ) -> bytes:
        from cxr_jax.outputs import sr

        return getattr(sr, writer)(
            reading,
            _sources(films),
            at=told.time_of(reading, settings.at),
            codes=settings.codes,
            verifying_organisation=settings.verifying_organisation,
        )

    return make


def _capture(
    reading: Mapping[str, Any], films: Sequence[FilmFile], settings: ExportSettings
) -> bytes:
    from cxr_jax.outputs import secondary_capture

    sources = _sources(films)
    # As its maker meant it: a page is for people, whatever the model was shown.
    shown = images.image_from_bytes(films[0].name, films[0].data)
    at = told.time_of(reading, settings.at)
    return secondary_capture.write(reading, sources, shown.pixels, at=at)


def _bundle(
    reading: Mapping[str, Any], films: Sequence[FilmFile], settings: ExportSettings
) -> bytes:
    from cxr_jax.outputs import fhir

    # Pictures belong to no imaging study: the bundle says so by leaving it out.
    are_dicom = films and all(is_dicom(film.data) for film in films)
    made = fhir.bundle(
        reading,
        _sources(films) if are_dicom else (),
        at=told.time_of(reading, settings.at),
        codes=settings.codes,
        subject=settings.subject,
    )
    return fhir.to_bytes(made)


KINDS: dict[str, Callable[[Mapping[str, Any], Sequence[FilmFile], ExportSettings], bytes]] = {
    "json": _json,
    "sr.dcm": _structured("write"),
    "text.dcm": _structured("write_text"),
    "sc.dcm": _capture,
    "fhir.json": _bundle,
}
