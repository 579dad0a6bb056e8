"""Make the first tables, and the triggers that keep events from being changed."""

from alembic import op

from cxr_jax.store import triggers

# Names of alembic's; numbers are in the order of the changes.
revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# As they were in this version, in SQL that both databases read: `tables.py` goes on, and this stays, so that the next
# migration finds what it is to change. A test compares the two.
_TABLES = """
CREATE TABLE answer (
    task TEXT NOT NULL,
    version INTEGER NOT NULL,
    body TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    idem_key TEXT NOT NULL,
    shown_sha256 TEXT,
    created TEXT NOT NULL,
    PRIMARY KEY (task, version),
    UNIQUE (task, idem_key)
)

CREATE TABLE api_key (
    sha256 TEXT NOT NULL,
    name TEXT NOT NULL,
    scopes TEXT NOT NULL,
    created TEXT NOT NULL,
    disabled_at TEXT,
    PRIMARY KEY (sha256),
    UNIQUE (name)
)

CREATE TABLE event (
    seq BIGINT NOT NULL,
    at_utc TEXT NOT NULL,
    mono_ns BIGINT NOT NULL,
    actor TEXT NOT NULL,
    role TEXT NOT NULL,
    login_ref TEXT,
    study TEXT,
    task TEXT,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    app_version TEXT NOT NULL,
    prev_hash TEXT NOT NULL,
    hash TEXT NOT NULL,
    PRIMARY KEY (seq)
)

CREATE INDEX ix_event_kind ON event (kind)

CREATE INDEX ix_event_study ON event (study)

CREATE INDEX ix_event_task ON event (task)

CREATE TABLE export (
    id TEXT NOT NULL,
    kind TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    "user" TEXT NOT NULL,
    params TEXT,
    head_seq BIGINT NOT NULL,
    head_hash TEXT NOT NULL,
    created TEXT NOT NULL,
    PRIMARY KEY (id)
)

CREATE TABLE idempotency (
    scope TEXT NOT NULL,
    idem_key TEXT NOT NULL,
    request_sha256 TEXT NOT NULL,
    answer TEXT NOT NULL,
    created TEXT NOT NULL,
    PRIMARY KEY (scope, idem_key)
)

CREATE TABLE image (
    sha256 TEXT NOT NULL,
    kind TEXT NOT NULL,
    rows INTEGER NOT NULL,
    cols INTEGER NOT NULL,
    bits INTEGER NOT NULL,
    voi TEXT,
    meta TEXT,
    gate TEXT,
    study_ref TEXT,
    created TEXT NOT NULL,
    erased_at TEXT,
    PRIMARY KEY (sha256)
)

CREATE TABLE login_try (
    handle_sha256 TEXT NOT NULL,
    failures INTEGER NOT NULL,
    last_failure TEXT NOT NULL,
    PRIMARY KEY (handle_sha256)
)

CREATE TABLE study (
    id TEXT NOT NULL,
    slug TEXT NOT NULL,
    protocol TEXT NOT NULL,
    protocol_sha256 TEXT NOT NULL,
    seed BIGINT NOT NULL,
    state TEXT NOT NULL,
    seal_sha256 TEXT,
    simulated BOOLEAN NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (slug)
)

CREATE TABLE "user" (
    id TEXT NOT NULL,
    handle TEXT NOT NULL,
    role TEXT NOT NULL,
    argon2 TEXT,
    created TEXT NOT NULL,
    disabled_at TEXT,
    PRIMARY KEY (id),
    UNIQUE (handle)
)

CREATE TABLE allocation (
    id TEXT NOT NULL,
    study TEXT NOT NULL,
    reader_no INTEGER NOT NULL,
    session_no INTEGER NOT NULL,
    position INTEGER NOT NULL,
    case_no INTEGER NOT NULL,
    arm TEXT NOT NULL,
    practice BOOLEAN DEFAULT false NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (study, reader_no, session_no, position),
    UNIQUE (study, reader_no, case_no, arm),
    FOREIGN KEY(study) REFERENCES study (id) ON DELETE RESTRICT
)

CREATE TABLE capture (
    id TEXT NOT NULL,
    "user" TEXT NOT NULL,
    image TEXT,
    state TEXT NOT NULL,
    audio_sha256 TEXT,
    mime TEXT,
    seconds FLOAT,
    asr TEXT,
    asr_model_sha256 TEXT,
    consent_sha256 TEXT,
    created TEXT NOT NULL,
    erased_at TEXT,
    PRIMARY KEY (id),
    FOREIGN KEY("user") REFERENCES "user" (id) ON DELETE RESTRICT,
    FOREIGN KEY(image) REFERENCES image (sha256) ON DELETE RESTRICT
)

CREATE TABLE login (
    id_sha256 TEXT NOT NULL,
    "user" TEXT NOT NULL,
    csrf_sha256 TEXT NOT NULL,
    created TEXT NOT NULL,
    last_seen TEXT NOT NULL,
    expires TEXT NOT NULL,
    revoked_at TEXT,
    PRIMARY KEY (id_sha256),
    FOREIGN KEY("user") REFERENCES "user" (id) ON DELETE RESTRICT
)

CREATE TABLE reading (
    sha256 TEXT NOT NULL,
    image TEXT NOT NULL,
    weights_sha256 TEXT,
    renderer TEXT,
    prompt TEXT,
    settings TEXT,
    seed BIGINT,
    text TEXT,
    tokens INTEGER,
    finish TEXT,
    labels TEXT,
    probs TEXT,
    sentences TEXT,
    document TEXT,
    events TEXT,
    app_version TEXT NOT NULL,
    created TEXT NOT NULL,
    PRIMARY KEY (sha256),
    FOREIGN KEY(image) REFERENCES image (sha256) ON DELETE RESTRICT
)

CREATE TABLE report_flag (
    report TEXT NOT NULL,
    flag_no INTEGER NOT NULL,
    sentence INTEGER,
    kind TEXT NOT NULL,
    note TEXT,
    "user" TEXT NOT NULL,
    created TEXT NOT NULL,
    PRIMARY KEY (report, flag_no),
    FOREIGN KEY("user") REFERENCES "user" (id) ON DELETE RESTRICT
)

CREATE TABLE study_reader (
    study TEXT NOT NULL,
    reader_no INTEGER NOT NULL,
    "user" TEXT,
    sequence TEXT,
    PRIMARY KEY (study, reader_no),
    FOREIGN KEY(study) REFERENCES study (id) ON DELETE RESTRICT,
    FOREIGN KEY("user") REFERENCES "user" (id) ON DELETE RESTRICT
)

CREATE TABLE capture_text (
    capture TEXT NOT NULL,
    version INTEGER NOT NULL,
    text TEXT,
    text_sha256 TEXT NOT NULL,
    labels TEXT,
    operations TEXT,
    "user" TEXT NOT NULL,
    created TEXT NOT NULL,
    PRIMARY KEY (capture, version),
    FOREIGN KEY(capture) REFERENCES capture (id) ON DELETE RESTRICT,
    FOREIGN KEY("user") REFERENCES "user" (id) ON DELETE RESTRICT
)

CREATE TABLE report (
    id TEXT NOT NULL,
    version INTEGER NOT NULL,
    image TEXT NOT NULL,
    reading TEXT,
    "user" TEXT NOT NULL,
    state TEXT NOT NULL,
    fields TEXT NOT NULL,
    body TEXT,
    prev INTEGER,
    shown_sha256 TEXT,
    signed_at TEXT,
    meaning TEXT,
    confidence INTEGER,
    created TEXT NOT NULL,
    PRIMARY KEY (id, version),
    FOREIGN KEY(image) REFERENCES image (sha256) ON DELETE RESTRICT,
    FOREIGN KEY(reading) REFERENCES reading (sha256) ON DELETE RESTRICT,
    FOREIGN KEY("user") REFERENCES "user" (id) ON DELETE RESTRICT
)

CREATE TABLE study_case (
    study TEXT NOT NULL,
    case_no INTEGER NOT NULL,
    image TEXT NOT NULL,
    reading TEXT,
    block INTEGER NOT NULL,
    PRIMARY KEY (study, case_no),
    FOREIGN KEY(study) REFERENCES study (id) ON DELETE RESTRICT,
    FOREIGN KEY(image) REFERENCES image (sha256) ON DELETE RESTRICT,
    FOREIGN KEY(reading) REFERENCES reading (sha256) ON DELETE RESTRICT
)

CREATE TABLE task (
    id TEXT NOT NULL,
    allocation TEXT NOT NULL,
    state TEXT NOT NULL,
    opened_at TEXT,
    signed_at TEXT,
    shown_sha256 TEXT,
    client TEXT,
    PRIMARY KEY (id),
    UNIQUE (allocation),
    FOREIGN KEY(allocation) REFERENCES allocation (id) ON DELETE RESTRICT
)
"""


def upgrade() -> None:
    """Make all tables of the first version."""
    # A blank line parts the statements.
    for statement in [
        *_TABLES.strip().split("\n\n"),
        *triggers.statements(op.get_bind().dialect.name),
    ]:
        op.execute(statement)


def downgrade() -> None:
    """Refuse: a store is never made older."""
    raise NotImplementedError
