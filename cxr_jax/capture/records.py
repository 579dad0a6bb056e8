"""Thoughts in the store: who gave one over which film, what was heard, every corrected version, and their erasure.

The chain of events holds hashes of voices and texts, never these themselves: they lie in the tables `capture` and
`capture_text` and in the folder `captures/`, and can go without a gap in the chain.
"""

import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from cxr_jax.capture import audio, consent
from cxr_jax.capture.transcribe import Word
from cxr_jax.errors import UserError
from cxr_jax.store import sha256_of, tables, utc_now
from cxr_jax.store.records.actors import Actor

if TYPE_CHECKING:
    from cxr_jax.store import Store, Transaction

FOLDER = "captures"  # of the store
OPEN, HEARD, SAVED, ERASED = STATES = ("open", "heard", "saved", "erased")


class StaleError(Exception):
    """Another version was saved meanwhile, or the thought is erased; one line says which."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A text as it was saved, with what the reader set and what was changed since the version before it."""

    version: int
    text: str | None
    text_sha256: str
    labels: dict[str, Any] | None
    operations: list[dict[str, Any]] | None
    user: str
    created: str


@dataclass(frozen=True, kw_only=True)
class Capture:
    """A thought.

    Attributes:
        image: sha256 of the film; None where there was none.
        state: of STATES.
        asr: {engine, prompt, words}, or None where nothing was heard.
        versions: of its text, the first one first.
    """

    id: str
    user: str
    image: str | None
    state: str
    audio_sha256: str | None
    mime: str | None
    seconds: float | None
    asr: dict[str, Any] | None
    asr_model_sha256: str | None
    consent_sha256: str
    created: str
    erased_at: str | None
    versions: tuple[Version, ...]

    @property
    def words(self) -> list[Word]:
        """The words as they were heard."""
        return [Word(*word) for word in (self.asr or {}).get("words", ())]


class Captures:
    """The thoughts of a store."""

    def __init__(self, store: "Store") -> None:
        """Look into `store`."""
        # Transactions are the store's: an event and what follows from it are committed together.
        self._store = store
        # A piece that is written while its recording is erased would stay.
        self._pieces = threading.Lock()

    def folder(self, capture_id: str) -> Path:
        """Give the folder of a recording's pieces; it need not be there."""
        return self._store.folder / FOLDER / capture_id

    # ---- Looking ----------------------------------------------------------------------------------

    def get(self, capture_id: str, user: str | None = None) -> Capture | None:
        """Return a thought with all its versions; None where there is none, or it is another user's."""
        # Another reader's is not refused but not there: nobody learns that it is.
        found = self._select(tables.capture.c.id == capture_id)
        return found[0] if found and user in (None, found[0].user) else None

    def of_user(self, user: str, image: str | None = None) -> list[Capture]:
        """Return a user's thoughts, over one film or all, the newest first; erased ones are left out."""
        table = tables.capture
        condition = (table.c.user == user) & (table.c.erased_at.is_(None))
        if image is not None:
            condition &= table.c.image == image
        return self._select(condition)[::-1]

    def saved(self) -> list[Capture]:
        """Return every thought that has a text and is not erased, the oldest first."""
        table = tables.capture
        return self._select((table.c.state == SAVED) & (table.c.erased_at.is_(None)))

    def film_file(self, sha256: str) -> Path | None:
        """Find the file of a film in the store's folder as it was uploaded; None where it is erased."""
        # As uploaded, for training reads films by itself. The shelf and the store's records call it differently.
        for suffix in ("original", "film"):
            path = self._store.image_file(sha256, suffix)
            if path.is_file():
                return path
        return None

    def study_images(self) -> dict[str, list[str]]:
        """Return the films of reader studies: sha256 -> the studies' names."""
        # In whatever state the study is: a draft's cases will be read, a closed one's may be published.
        case, study = tables.study_case, tables.study
        selection = sa.select(case.c.image, study.c.slug).join(study, study.c.id == case.c.study)
        found: dict[str, list[str]] = {}
        with self._store.read() as connection:
            for image, slug in connection.execute(selection):
                found.setdefault(image, []).append(slug)
        return found

    def _select(self, condition: Any) -> list[Capture]:
        table, texts = tables.capture, tables.capture_text
        with self._store.read() as connection:
            # By time, and by id where two began in one microsecond, so that exports are the same each time.
            selection = sa.select(table).where(condition).order_by(table.c.created, table.c.id)
            found = [dict(stored) for stored in connection.execute(selection).mappings()]
            # A reader has some hundred thoughts: one question for the texts of each is quick enough.
            captures = []
            for stored in found:
                of_capture = (
                    sa.select(texts)
                    .where(texts.c.capture == stored["id"])
                    .order_by(texts.c.version)
                )
                versions = [
                    Version(**{name: value for name, value in row.items() if name != "capture"})
                    for row in connection.execute(of_capture).mappings()
                ]
                captures.append(Capture(**stored, versions=tuple(versions)))
        return captures

    # ---- Keeping ----------------------------------------------------------------------------------

    def begin(self, author: Actor, image: str | None, consent_sha256: str) -> str:
        """Begin a thought over a film; return its id.

        Raises:
            UserError: without consent to the text of `consent.py`, or for a film that is not there.
        """
        # To this text, and not to an earlier one: who agreed to less has not agreed to it.
        if consent_sha256 != consent.SHA256:
            raise UserError("without consent nothing is kept")
        # Random: an id in a provenance tells neither when nor how many.
        capture_id = secrets.token_hex(16)
        with self._store.write() as transaction:
            # Of an erased film only the hash is left: nobody looks at it.
            if image is not None:
                table = tables.image
                there = (table.c.sha256 == image) & table.c.erased_at.is_(None)
                selection = sa.select(table.c.sha256).where(there)
                if transaction.connection.execute(selection).first() is None:
                    raise UserError("there is no such film")
            transaction.connection.execute(
                tables.capture.insert(),
                {
                    "id": capture_id,
                    "user": author.id,
                    "image": image,
                    "state": OPEN,
                    "consent_sha256": consent_sha256,
                    "created": utc_now(),
                },
            )
            body = {"capture": capture_id, "image": image, "consent_sha256": consent_sha256}
            _append(transaction, "capture.begun", body, author)
        return capture_id

    def put_piece(self, capture_id: str, number: int, key: str, piece: bytes) -> bool:
        """Keep a piece of a recording: `audio.put_piece` in its folder.

        Raises:
            StaleError: for a thought that is erased, or whose text is saved already.
        """
        with self._pieces:
            capture = self.get(capture_id)
            if capture is None or capture.state == ERASED:
                raise StaleError("the thought is erased")
            if capture.state == SAVED:
                raise StaleError("the text is saved already")
            return audio.put_piece(self.folder(capture_id), number, key, piece)

    def keep_heard(
        self,
        author: Actor,
        capture_id: str,
        recording: audio.Recording,
        *,
        mime: str,
        seconds: float,
        asr: Mapping[str, Any],
        model_sha256: str | None,
    ) -> None:
        """Keep what was heard in a recording; what was heard before, in fewer pieces, is replaced.

        Raises:
            StaleError: for a thought that is erased, or whose text is saved already.
        """
        with self._store.write() as transaction:
            state = self._state_for_update(transaction, capture_id)
            # A version stands on the words that were heard: these may not change under it.
            if state == SAVED:
                raise StaleError("the text is saved already")
            table = tables.capture
            values = {
                "state": HEARD,
                "audio_sha256": recording.sha256,
                "mime": mime,
                "seconds": seconds,
                "asr": dict(asr),
                "asr_model_sha256": model_sha256,
            }
            transaction.connection.execute(
                table.update().where(table.c.id == capture_id).values(**values)
            )
            # Hashes and counts: what was said stands in the table alone.
            body = {
                "capture": capture_id,
                "audio_sha256": recording.sha256,
                "pieces": recording.pieces,
                "seconds": seconds,
                "engine": asr.get("engine"),
                "model_sha256": model_sha256,
                "words_sha256": sha256_of(asr.get("words")),
            }
            _append(transaction, "capture.heard", body, author)

    def save(
        self,
        author: Actor,
        capture_id: str,
        *,
        after_version: int,
        text: str,
        labels: Mapping[str, Any],
        operations: Sequence[Mapping[str, Any]],
    ) -> int:
        """Keep a corrected text as the next version; return its number, from 1.

        Args:
            after_version: the number of the version that was corrected; 0 of what was heard or of nothing.

        Raises:
            StaleError: if that is not the newest any more, or the thought is erased.
        """
        with self._store.write() as transaction:
            self._state_for_update(transaction, capture_id)
            texts, table = tables.capture_text, tables.capture
            newest = sa.select(sa.func.max(texts.c.version)).where(texts.c.capture == capture_id)
            # Inside the writing lock: of two tabs that save at once, one is told.
            latest = transaction.connection.execute(newest).scalar() or 0
            if latest != after_version:
                raise StaleError(f"version {latest} was saved meanwhile")
            stored = {
                "capture": capture_id,
                "version": latest + 1,
                "text": text,
                "text_sha256": sha256_of(text),
                "labels": dict(labels),
                "operations": [dict(operation) for operation in operations],
                "user": author.id,
                "created": utc_now(),
            }
            transaction.connection.execute(texts.insert(), stored)
            transaction.connection.execute(
                table.update().where(table.c.id == capture_id).values(state=SAVED)
            )
            body = {
                "capture": capture_id,
                "version": latest + 1,
                "text_sha256": stored["text_sha256"],
                "labels_sha256": sha256_of(stored["labels"]),
                "operations_sha256": sha256_of(stored["operations"]),
            }
            _append(transaction, "capture.saved", body, author)
        return latest + 1

    @staticmethod
    def _state_for_update(transaction: "Transaction", capture_id: str) -> str:
        selection = sa.select(tables.capture.c.state).where(tables.capture.c.id == capture_id)
        state = transaction.connection.execute(selection).scalar()
        if state is None or state == ERASED:
            raise StaleError("the thought is erased")
        return state

    # ---- Erasing ----------------------------------------------------------------------------------

    def erase(self, author: Actor, capture_id: str) -> None:
        """Erase voice, words and texts of a thought; hashes stay in the chain. Erasing again does it again.

        Raises:
            UserError: if there is no such thought.
        """
        # Shut first, so that no piece and no version comes after the erasure; the files next, so that a kill leaves
        # what can be erased again, and only then the word that it is done.
        texts, table = tables.capture_text, tables.capture
        with self._store.write() as transaction:
            connection = transaction.connection
            if connection.execute(sa.select(table).where(table.c.id == capture_id)).first() is None:
                raise UserError("there is no such thought")
            if connection.dialect.name == "sqlite":
                # Pages that are freed are overwritten, not only forgotten.
                connection.exec_driver_sql("PRAGMA secure_delete=ON")
            connection.execute(
                table.update()
                .where(table.c.id == capture_id)
                .values(state=ERASED, asr=None, mime=None, seconds=None)
            )
            # The hash of each text stays, so that the chain can be held against the table.
            nothing = {"text": None, "labels": None, "operations": None}
            connection.execute(texts.update().where(texts.c.capture == capture_id).values(nothing))
        with self._pieces:
            audio.erase(self.folder(capture_id))
        with self._store.write() as transaction:
            transaction.connection.execute(
                table.update().where(table.c.id == capture_id).values(erased_at=utc_now())
            )
            _append(transaction, "capture.erased", {"capture": capture_id}, author)
        # Last, so that both transactions' pages are in the file.
        self._empty_log()

    def _empty_log(self) -> None:
        """Move what SQLite's log still holds into the file, and empty the log: erased texts stand in it, too."""
        if self._store.engine.dialect.name == "sqlite":
            # No transaction of ours: a checkpoint cannot run inside of one.
            connection = self._store.engine.raw_connection()
            try:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                connection.close()

    # ---- Checking ---------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Compare voices and texts with their hashes in the chain; return what does not agree, a line each."""
        # What the chain says of each version, and of the newest hearing of each recording.
        events = {
            (event.body.get("capture"), event.body.get("version")): event.body
            for event in self._store.events("capture.saved")
        }
        heard = {event.body["capture"]: event.body for event in self._store.events("capture.heard")}
        problems = []
        for capture in self._select(tables.capture.c.erased_at.is_(None)):
            for version in capture.versions:
                body = events.get((capture.id, version.version), {})
                stored = {
                    "text_sha256": sha256_of(version.text),
                    "labels_sha256": sha256_of(version.labels),
                    "operations_sha256": sha256_of(version.operations),
                }
                for name, value in stored.items():
                    if body.get(name) != value:
                        part = name.removesuffix("_sha256")
                        problems.append(
                            f"capture {capture.id}: {part} of version {version.version} is not what was saved"
                        )
            heard_body = heard.get(capture.id)
            if heard_body is not None and capture.state != ERASED:
                problems += self._verify_audio(capture.id, heard_body)
        return problems

    def _verify_audio(self, capture_id: str, body: Mapping[str, Any]) -> list[str]:
        try:
            recording = audio.assemble(self.folder(capture_id), body["pieces"])
        except UserError as error:
            return [f"capture {capture_id}: {error}"]
        if recording.sha256 != body["audio_sha256"]:
            return [f"capture {capture_id}: the recording is not the one that was heard"]
        return []


def _append(transaction: "Transaction", kind: str, body: Mapping[str, Any], author: Actor) -> None:
    transaction.append(kind, body, **author.as_arguments())
