"""Describe the tables of the reading room: the chain of events, what folds of it, people, films and studies.

Every text that a person or a model wrote lies in a column of JSON or in a text column of a fold; names of columns say
the rest. Times are text (`2026-11-30T13:30:00.123456Z`), so that both databases compare and hash them alike.
"""

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

# Two collections, since they lie in two databases: what a server may open, and what it may not.
metadata = sa.MetaData()
"""The tables of room.db, or of the PostgreSQL database."""

sealed_metadata = sa.MetaData()
"""The tables of sealed.db, which no server opens before a study is unblinded."""


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no blanks, ASCII alone.

    Raises:
        ValueError: for a number that JSON does not have (NaN, infinity).
    """
    # ASCII, since PostgreSQL holds neither NUL nor half a character, and a model may write both.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


class CanonicalJson(TypeDecorator[Any]):
    """A column of JSON that is kept as its canonical text, byte for byte, in both databases."""

    # Text in both databases: JSONB would order keys its own way, and a hash would no longer fit.
    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        """Return the text of a value; None stays NULL."""
        return None if value is None else canonical_json(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        """Return the value of a text."""
        return None if value is None else json.loads(value)


def _key(target: str) -> sa.ForeignKey:
    # Nothing that a report or a task stands on may be deleted under it.
    return sa.ForeignKey(target, ondelete="RESTRICT")


# ---- The chain -------------------------------------------------------------------------------------------------------

# Written once and never changed: a trigger refuses the attempt, and the hashes tell of whoever gets around it.
event = sa.Table(
    "event",
    metadata,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("at_utc", sa.Text, nullable=False),
    # Beside the wall clock, which jumps; the order of events is that of `seq`.
    sa.Column("mono_ns", sa.BigInteger, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    # The first half of the login's sha256: enough to tell logins apart, and of no use to whoever reads the chain.
    sa.Column("login_ref", sa.Text),
    sa.Column("study", sa.Text, index=True),
    sa.Column("task", sa.Text, index=True),
    sa.Column("kind", sa.Text, nullable=False, index=True),
    # The text that is hashed, and no JSON column, which PostgreSQL may give back in other bytes.
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("app_version", sa.Text, nullable=False),
    sa.Column("prev_hash", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
)

# ---- People ----------------------------------------------------------------------------------------------------------

# Pseudonyms only: who is behind a handle stands in no table.
user = sa.Table(
    "user",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("handle", sa.Text, nullable=False, unique=True),
    sa.Column("role", sa.Text, nullable=False),
    # None: nobody can log in as this user.
    sa.Column("argon2", sa.Text),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("disabled_at", sa.Text),
)

# The token itself is in the reader's cookie alone; who reads this table cannot log in with it.
login = sa.Table(
    "login",
    metadata,
    sa.Column("id_sha256", sa.Text, primary_key=True),
    sa.Column("user", sa.Text, _key("user.id"), nullable=False),
    sa.Column("csrf_sha256", sa.Text, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("last_seen", sa.Text, nullable=False),
    sa.Column("expires", sa.Text, nullable=False),
    sa.Column("revoked_at", sa.Text),
)

# In the database and not in memory, so that a restart does not give ten tries more.
login_try = sa.Table(
    "login_try",
    metadata,
    # Of a handle whether it exists or not, so that a delay tells nobody which do.
    sa.Column("handle_sha256", sa.Text, primary_key=True),
    # Of the last row of wrong passwords; a right one deletes the row.
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("last_failure", sa.Text, nullable=False),
)

# Names are never used again, so that an event which names a key means one key.
api_key = sa.Table(
    "api_key",
    metadata,
    sa.Column("sha256", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    # A list of `chat` and `read`.
    sa.Column("scopes", CanonicalJson, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("disabled_at", sa.Text),
)

# ---- Films, readings, reports ----------------------------------------------------------------------------------------

# A film is its bytes: the same file twice is one film. The files lie in the folder, images/SHA.*.
image = sa.Table(
    "image",
    metadata,
    sa.Column("sha256", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("cols", sa.Integer, nullable=False),
    sa.Column("bits", sa.Integer, nullable=False),
    # Windows of the file, by name, for the page's presets.
    sa.Column("voi", CanonicalJson),
    # What the page needs of a film; never the text of a header, never a name of a file.
    sa.Column("meta", CanonicalJson),
    # Whether it is a chest film that can be read, and the reasons.
    sa.Column("gate", CanonicalJson),
    # An HMAC of the study's UID: two films of one study are known as such, and nobody is named.
    sa.Column("study_ref", sa.Text),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("erased_at", sa.Text),
)

# Who may see what: a film is for whoever brought it, a reading for whoever asked for it. Both are named by hashes that
# others may know, so knowing a name opens nothing.
access = sa.Table(
    "access",
    metadata,
    sa.Column("user", sa.Text, primary_key=True),
    # image or reading.
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    # What a film takes on the disk, for its reader's quota; 0 of a reading.
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)

# Named by the sha256 of all that it is a function of, so asking twice gives one reading.
reading = sa.Table(
    "reading",
    metadata,
    sa.Column("sha256", sa.Text, primary_key=True),
    sa.Column("image", sa.Text, _key("image.sha256"), nullable=False),
    sa.Column("weights_sha256", sa.Text),
    sa.Column("renderer", sa.Text),
    sa.Column("prompt", CanonicalJson),
    sa.Column("settings", CanonicalJson),
    sa.Column("seed", sa.BigInteger),
    sa.Column("text", CanonicalJson),
    sa.Column("tokens", sa.Integer),
    sa.Column("finish", sa.Text),
    # What the answer names, with what probability, and what each sentence says: as the document has it.
    sa.Column("labels", CanonicalJson),
    sa.Column("probs", CanonicalJson),
    sa.Column("sentences", CanonicalJson),
    # The finished cxr_reading document, whose sha256 is in the chain.
    sa.Column("document", CanonicalJson),
    # What a reader's page was told, in order: a page that comes back is told the rest.
    sa.Column("events", CanonicalJson),
    sa.Column("app_version", sa.Text, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)

# Every version is a row, so the draft that the model gave stands beside what the reader made of it.
report = sa.Table(
    "report",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("image", sa.Text, _key("image.sha256"), nullable=False),
    sa.Column("reading", sa.Text, _key("reading.sha256")),
    sa.Column("user", sa.Text, _key("user.id"), nullable=False),
    # draft, signed, or addendum: a version that adds to a signed one.
    sa.Column("state", sa.Text, nullable=False),
    # Name of a field of the form -> its text.
    sa.Column("fields", CanonicalJson, nullable=False),
    # The text of an addendum.
    sa.Column("body", CanonicalJson),
    # The version that this one was made from.
    sa.Column("prev", sa.Integer),
    # What the reader saw when this version was made: film and reading, bound together.
    sa.Column("shown_sha256", sa.Text),
    sa.Column("signed_at", sa.Text),
    # In words, such as "reviewed and agreed": a signature without one says nothing.
    sa.Column("meaning", CanonicalJson),
    # 1 to 7, None where it was not asked.
    sa.Column("confidence", sa.Integer),
    sa.Column("created", sa.Text, nullable=False),
)

# What a reader holds against a sentence of the model; flags are not taken back, they are answered by others.
report_flag = sa.Table(
    "report_flag",
    metadata,
    sa.Column("report", sa.Text, primary_key=True),
    sa.Column("flag_no", sa.Integer, primary_key=True, autoincrement=False),
    # The number of the sentence; None for what is missing from all of them.
    sa.Column("sentence", sa.Integer),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("note", CanonicalJson),
    sa.Column("user", sa.Text, _key("user.id"), nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)

# What left the house, and with which head.
export = sa.Table(
    "export",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("user", sa.Text, nullable=False),
    # Which report in which version, or which study.
    sa.Column("params", CanonicalJson),
    # The head of the chain as the export names it: a later chain without it has lost its tail.
    sa.Column("head_seq", sa.BigInteger, nullable=False),
    sa.Column("head_hash", sa.Text, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)

# What every request that may come twice carries; the same key gets the same answer again.
idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("scope", sa.Text, primary_key=True),
    sa.Column("idem_key", sa.Text, primary_key=True),
    # The same key with another request is a mistake of the client's, and refused.
    sa.Column("request_sha256", sa.Text, nullable=False),
    # Ids and versions alone: the texts are in the fold.
    sa.Column("answer", CanonicalJson, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)

# ---- Reader studies --------------------------------------------------------------------------------------------------

# The protocol is kept whole and by its hash, which is sealed: it cannot change after the first sitting.
study = sa.Table(
    "study",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("slug", sa.Text, nullable=False, unique=True),
    sa.Column("protocol", CanonicalJson, nullable=False),
    sa.Column("protocol_sha256", sa.Text, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    # draft, sealed, open, closed, unblinded.
    sa.Column("state", sa.Text, nullable=False),
    # Of sealed.db's canonical JSON, from the sealing on.
    sa.Column("seal_sha256", sa.Text),
    # Of readers that are programs; every page and export of such a study says so.
    sa.Column("simulated", sa.Boolean, nullable=False),
)

# Nothing here says whether a case is abnormal or planted: the server reads this table.
study_case = sa.Table(
    "study_case",
    metadata,
    sa.Column("study", sa.Text, _key("study.id"), primary_key=True),
    sa.Column("case_no", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("image", sa.Text, _key("image.sha256"), nullable=False),
    # What is shown, which may be a planted reading; that it is one stands in sealed.db alone.
    sa.Column("reading", sa.Text, _key("reading.sha256")),
    sa.Column("block", sa.Integer, nullable=False),
)

# The user is None until somebody takes the place.
study_reader = sa.Table(
    "study_reader",
    metadata,
    sa.Column("study", sa.Text, _key("study.id"), primary_key=True),
    sa.Column("reader_no", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("user", sa.Text, _key("user.id")),
    # Which order of arms this reader has.
    sa.Column("sequence", CanonicalJson),
)

# Who reads which case when and in which arm, decided before the first sitting; both constraints are the design's.
allocation = sa.Table(
    "allocation",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("study", sa.Text, _key("study.id"), nullable=False),
    sa.Column("reader_no", sa.Integer, nullable=False),
    sa.Column("session_no", sa.Integer, nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("case_no", sa.Integer, nullable=False),
    sa.Column("arm", sa.Text, nullable=False),
    # A case that opens a block and counts for nothing.
    sa.Column("practice", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.UniqueConstraint("study", "reader_no", "session_no", "position"),
    sa.UniqueConstraint("study", "reader_no", "case_no", "arm"),
)

# One allocation under way; the id is opaque and tells neither arm nor case.
task = sa.Table(
    "task",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("allocation", sa.Text, _key("allocation.id"), nullable=False, unique=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("opened_at", sa.Text),
    sa.Column("signed_at", sa.Text),
    sa.Column("shown_sha256", sa.Text),
    # What the browser said of itself at the opening: size of the window, its clock. No user agent.
    sa.Column("client", CanonicalJson),
)

# Every version is kept; the key is the client's name of the answer, so that one sent twice is one.
answer = sa.Table(
    "answer",
    metadata,
    sa.Column("task", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("body", CanonicalJson, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("idem_key", sa.Text, nullable=False),
    # What the reader had before the eyes when this was answered.
    sa.Column("shown_sha256", sa.Text),
    sa.Column("created", sa.Text, nullable=False),
    sa.UniqueConstraint("task", "idem_key"),
)

# ---- Thought capture -------------------------------------------------------------------------------------------------

# The audio is a file of the folder; after an erasure its hash is all that is left.
capture = sa.Table(
    "capture",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("user", sa.Text, _key("user.id"), nullable=False),
    sa.Column("image", sa.Text, _key("image.sha256")),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("audio_sha256", sa.Text),
    sa.Column("mime", sa.Text),
    sa.Column("seconds", sa.Float),
    # Words with times and confidences, as the recogniser gave them.
    sa.Column("asr", CanonicalJson),
    sa.Column("asr_model_sha256", sa.Text),
    # Of the text that was agreed to.
    sa.Column("consent_sha256", sa.Text),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("erased_at", sa.Text),
)

# Every version of what was said, as it was corrected.
capture_text = sa.Table(
    "capture_text",
    metadata,
    sa.Column("capture", sa.Text, _key("capture.id"), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    # None once it is erased: events hold its sha256 alone, so that erasure leaves the chain whole.
    sa.Column("text", CanonicalJson),
    sa.Column("text_sha256", sa.Text, nullable=False),
    sa.Column("labels", CanonicalJson),
    # How this version came from the one before: what was inserted, deleted, replaced.
    sa.Column("operations", CanonicalJson),
    sa.Column("user", sa.Text, _key("user.id"), nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)

# ---- What is sealed --------------------------------------------------------------------------------------------------

# Sealed: its canonical JSON's sha256 goes into the chain before the first sitting.
case_truth = sa.Table(
    "case_truth",
    sealed_metadata,
    sa.Column("study", sa.Text, primary_key=True),
    sa.Column("case_no", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("abnormal", sa.Boolean, nullable=False),
    # The 14 states, and where the findings are.
    sa.Column("truth", CanonicalJson, nullable=False),
)

# The planted errors: what was written, what is shown instead.
plant = sa.Table(
    "plant",
    sealed_metadata,
    sa.Column("study", sa.Text, primary_key=True),
    sa.Column("case_no", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("side", sa.Text),
    sa.Column("sentence_no", sa.Integer),
    sa.Column("text_before", CanonicalJson),
    sa.Column("text_after", CanonicalJson),
    sa.Column("reading_shown", sa.Text, nullable=False),
)
