"""The tables that the log keeps in the registry's database.

They live beside MLflow's own, under names that MLflow never uses, and nothing in them refers to
MLflow's: its migrations may change what they like. Free text is kept in TEXT columns, so that no
database cuts or refuses what somebody tried to pass off as a name.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import Session

Database = Session | Connection
"""What runs our statements: the caller's open session or connection, and so its transaction."""

VERSION_TABLE = "kdguard_alembic_version"
"""Where our own migrations remember how far they got; MLflow's is `alembic_version`."""

metadata = MetaData()

_NUMBER = BigInteger().with_variant(Integer, "sqlite")
"""In SQLite only INTEGER makes the row id itself the key, which no text can be stored in."""


def _hex(name: str) -> Column[str]:
    return Column(name, String(64), nullable=False)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


log = Table(
    "kdguard_log",
    metadata,
    Column("seq", _NUMBER, primary_key=True, autoincrement=False),
    Column("time", String(40), nullable=False),
    _text("actor"),
    Column("action", String(40), nullable=False),
    _text("workspace"),
    _text("model"),
    _text("version"),
    _text("alias"),
    _text("certificate"),
    _text("policy"),
    _text("decision"),
    _text("reasons"),
    _hex("previous"),
    _hex("digest"),
    Index("kdguard_log_model", "model", mysql_length=191),
    mysql_charset="utf8mb4",
)
"""One row an entry, never changed once written; `reasons` is a JSON list of texts."""

head = Table(
    "kdguard_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("log", String(32), nullable=False),
    Column("seq", _NUMBER, nullable=False),
    _hex("digest"),
    Column("time", String(40), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("signature", String(128), nullable=False),
    mysql_charset="utf8mb4",
)
"""The one row (id 1) that every writer locks first: where the chain ends, signed."""

nonces = Table(
    "kdguard_nonces",
    metadata,
    Column("nonce", String(32), primary_key=True),
    _hex("series"),
    Column("attempt", Integer, nullable=False),
    _text("workspace"),
    _text("model"),
    _text("subject"),
    Column("issued", String(40), nullable=False),
    Column("used_by", String(64), nullable=True),
    UniqueConstraint("series", "attempt", name="kdguard_nonces_attempt"),
    mysql_charset="utf8mb4",
)
"""One row a nonce; `series` is the digest of workspace and model, whose attempts are counted."""

settings = Table(
    "kdguard_settings",
    metadata,
    Column("version", _NUMBER, primary_key=True, autoincrement=False),
    _hex("digest"),
    Column("seen", String(40), nullable=False),
    mysql_charset="utf8mb4",
)
"""Every version of the server's settings that was in force, with the digest it had."""

overrides = Table(
    "kdguard_overrides",
    metadata,
    Column("sha256", String(64), primary_key=True),
    _text("workspace"),
    _text("model"),
    _text("version"),
    _text("alias"),
    _text("reason"),
    _text("owners"),
    Column("issued", String(40), nullable=False),
    Column("ends", String(40), nullable=False),
    Column("used", String(40), nullable=False),
    _text("document"),
    mysql_charset="utf8mb4",
)
"""Break-glass documents that were accepted, by the digest of their bytes."""

TABLES = (log, head, nonces, settings, overrides)
