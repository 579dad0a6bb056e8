"""The folder of a study: its files, its store, and how a study is made and sealed.

    protocol.json  cases.json  shown.json  allocation.json  films/     what the server reads
    inputs/                                                            phantom films as a model is given them
    sealed.json                                                        what it does not: truth and planted errors
    room.db  secret                                                    the store (`cxr_jax.store`)

The store may be a PostgreSQL database instead, `postgresql+pg8000://USER@HOST/DATABASE?folder=DIR`; the files lie in
DIR then. The hashes of all of them go into the chain when the study is sealed; from then on none can change unnoticed.
"""

import gzip
import hashlib
import json
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.runtime.whole_files import write_bytes, write_text
from cxr_jax.store import Store, canonical_json, folder_of, open_store, sha256_of
from cxr_jax.study import allocate
from cxr_jax.study.allocate import Place
from cxr_jax.study.plant import Plant
from cxr_jax.study.protocol import Protocol, read_protocol, write_protocol
from cxr_jax.study.shown import Frozen

if TYPE_CHECKING:
    from cxr_jax.study.cases import Case, CaseSet

PROTOCOL, CASES, SHOWN, ALLOCATION, SEALED = (
    "protocol.json",
    "cases.json",
    "shown.json",
    "allocation.json",
    "sealed.json",
)
# What the sealing names by hash beside the sealed file.
OPEN_FILES = (PROTOCOL, CASES, SHOWN, ALLOCATION)
_LEVELS = 65535  # films are kept with 16 bits


@dataclass(frozen=True, kw_only=True)
class SealedCase:
    """What nobody may know of a case before the study is unblinded."""

    case_no: int
    abnormal: bool
    truth: Mapping[str, str]
    truth_sides: Mapping[str, str]
    natural: Frozen
    plant: Plant | None


def place_of(name: str, store: str | None) -> str:
    """Name where a study is: ./NAME, the folder of `--store`, or the URL of a database with the folder of its files."""
    if store is None:
        return name
    # A URL that says nothing of a folder has it where a study without a database has it.
    _, is_url, rest = store.partition("://")
    if not is_url or "folder=" in rest.partition("?")[2]:
        return store
    return f"{store}{'&' if '?' in rest else '?'}folder={quote(str(Path(name).absolute()))}"


class StudyFolder:
    """The files of one study. Nothing of the sealed file is read but by `read_sealed`.

    Attributes:
        path: the folder.
        store_place: what `open_store` is given: the folder again, or the URL of a database.
    """

    def __init__(self, path: Path, store_place: str | None = None) -> None:
        self.path = path
        self.store_place = store_place or str(path)

    @classmethod
    def at(cls, place: str | Path) -> "StudyFolder":
        """Find a study by its folder, or by the URL of its database.

        Raises:
            UserError: for a URL that is none of a store.
        """
        # As it was typed, so that messages name it as its reader knows it.
        if "://" not in str(place):
            return cls(Path(place))
        return cls(folder_of(place), str(place))

    def open_store(self, *, exclusive: bool = False) -> Store:
        """Open the study's store; not exclusive: a server may have it at the same time."""
        return open_store(self.store_place, exclusive=exclusive)

    # ---- What the server may read ----

    @cached_property
    def protocol(self) -> Protocol:
        """The protocol."""
        return read_protocol(self.path / PROTOCOL)

    @cached_property
    def places(self) -> list[Place]:
        """The allocation, in the order of readers, sessions and positions."""
        # Lists, since JSON has no tuples with names.
        return [Place(*case_values) for case_values in self._json(ALLOCATION)]

    @cached_property
    def shown(self) -> list[Frozen]:
        """What the AI says of each case, as it is shown."""
        return [Frozen.from_json(case_values) for case_values in self._json(SHOWN)]

    @cached_property
    def films(self) -> list[dict[str, Any]]:
        """Of each case: rows, columns, sha256 of the film and, of phantoms, of the model's input."""
        return self._json(CASES)

    def film_bytes(self, case_no: int) -> bytes:
        """A film's levels, gzip of little-endian uint16, row by row."""
        return self._levels("films", self.films[case_no]["sha256"])

    def _levels(self, kind: str, digest: str) -> bytes:
        film_path = self._levels_path(kind, digest)
        try:
            return film_path.read_bytes()
        except OSError as error:
            raise UserError(f"{film_path}: no film can be read ({error.strerror})") from None

    def _levels_path(self, kind: str, digest: str) -> Path:
        return self.path / kind / f"{digest}.u16.gz"

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{self.path / name}: no study can be read ({error.strerror})"
            ) from None
        except ValueError:
            raise UserError(f"{self.path / name}: no JSON") from None

    # ---- Hashes ----

    def hashes(self) -> dict[str, str]:
        """Hash every file that the sealing names, films by their sum."""
        # By content and not by bytes: a blank more in a file changes nothing that is read.
        hashes_found = {name: sha256_of(self._json(name)) for name in OPEN_FILES}
        # Films are named by what is in them, so their list is their hash if each still is what its name says.
        named = [("films", film["sha256"]) for film in self.films]
        named += [
            ("inputs", film["input_sha256"]) for film in self.films if film.get("input_sha256")
        ]
        digests = [
            digest if self._levels_sha256(kind, digest) == digest else "changed"
            for kind, digest in named
        ]
        return hashes_found | {"films": sha256_of(digests)}

    def _levels_sha256(self, kind: str, digest: str) -> str | None:
        """Hash a film's levels; None for a file that holds none any more."""
        try:
            levels = gzip.decompress(self._levels(kind, digest))
        # A byte of the file that was turned round: zlib, gzip and the end of the file each say it in their own way.
        except (OSError, EOFError, zlib.error):
            return None
        return hashlib.sha256(levels).hexdigest()

    def sealed_sha256(self) -> str:
        """Hash of the sealed file's canonical JSON; whether it is JSON is all that is looked at.

        Raises:
            UserError: if it is gone or no JSON.
        """
        return sha256_of(self._json(SEALED))

    def read_sealed(self) -> list[SealedCase]:
        """Read the sealed file; only a study that is unblinded may (`ledger` knows)."""
        return [
            SealedCase(
                case_no=case_values["case_no"],
                abnormal=case_values["abnormal"],
                truth=case_values["truth"],
                truth_sides=case_values["truth_sides"],
                natural=Frozen.from_json(case_values["natural"]),
                plant=Plant(
                    **(
                        case_values["plant"]
                        | {"sentences": tuple(case_values["plant"]["sentences"])}
                    )
                )
                if case_values["plant"]
                else None,
            )
            for case_values in self._json(SEALED)["cases"]
        ]

    # ---- Making it ----

    def check_is_free(self) -> None:
        """Refuse a folder that has a study. Raises UserError."""
        # By the file that is written last.
        if (self.path / PROTOCOL).exists():
            raise UserError(f"{self.path}: there is a study already")

    def create(self, protocol: Protocol, gathered: "CaseSet") -> None:
        """Write a new study. Everything is decided here: blocks, orders, plants.

        Raises:
            UserError: if there is a study already.
        """
        self.check_is_free()
        # Each block gets its share of sick and of planted cases.
        strata = [
            (study_case.is_abnormal, study_case.plant is not None) for study_case in gathered.cases
        ]
        places = allocate.allocate(protocol, strata)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for kind in ("films", "inputs"):
            (self.path / kind).mkdir(mode=0o700, exist_ok=True)
        # Practice cases have the numbers behind the last one.
        every_case = [*gathered.cases, *gathered.practice]
        # Films first: lists that name them come after they are there.
        films = [self._write_film(study_case) for study_case in every_case]
        write_text(self.path / CASES, canonical_json(films))
        write_text(
            self.path / SHOWN,
            canonical_json([study_case.shown.as_json() for study_case in every_case]),
        )
        write_text(self.path / ALLOCATION, canonical_json([list(place) for place in places]))
        self._write_sealed(gathered)
        # Last: a folder without a protocol is no study, so a kill leaves none that is half made.
        write_protocol(self.path / PROTOCOL, protocol)

    def _write_film(self, study_case: "Case") -> dict[str, Any]:
        rows, columns = study_case.pixels.shape
        film = {
            "rows": rows,
            "columns": columns,
            "sha256": self._write_levels("films", study_case.pixels),
        }
        if study_case.model_input is None:
            return film
        return film | {"input_sha256": self._write_levels("inputs", study_case.model_input)}

    def _write_levels(self, kind: str, pixels: np.ndarray) -> str:
        """Write a film's levels and give their hash, which names the file."""
        levels = np.rint(np.clip(pixels, 0, 1) * _LEVELS).astype("<u2").tobytes()
        digest = hashlib.sha256(levels).hexdigest()
        # Time 0 in the header: the same film is the same file.
        write_bytes(self._levels_path(kind, digest), gzip.compress(levels, 6, mtime=0))
        return digest

    def _write_sealed(self, gathered: "CaseSet") -> None:
        cases = [
            {
                "case_no": case_no,
                "abnormal": study_case.is_abnormal,
                "truth": dict(study_case.truth),
                "truth_sides": dict(study_case.truth_sides),
                "natural": study_case.natural.as_json(),
                "plant": asdict(study_case.plant) if study_case.plant else None,
            }
            for case_no, study_case in enumerate([*gathered.cases, *gathered.practice])
        ]
        # With a salt, since the hash is public: nobody may try out plants until one fits.
        content = {"cases": cases, "is_phantom": gathered.is_phantom, "salt": secrets.token_hex(16)}
        path = self.path / SEALED
        write_text(path, canonical_json(content))
        # Whoever may read the rest of the folder may not read this.
        path.chmod(0o600)
