"""The log's first tables, and the head that an empty log has."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "kdguard_0001"
down_revision = None
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _texts(*names: str) -> list["sa.Column[str]"]:
    return [sa.Column(name, sa.Text(), nullable=False) for name in names]


def _short(name: str, length: int) -> "sa.Column[str]":
    return sa.Column(name, sa.String(length), nullable=False)


def _create(name: str, *columns: "sa.schema.SchemaItem") -> None:
    # MySQL commits every CREATE at once: what a killed start has left behind is found again.
    mysql = op.get_bind().dialect.name in ("mysql", "mariadb")
    op.create_table(name, *columns, if_not_exists=mysql, mysql_charset="utf8mb4")


def upgrade() -> None:
    """Create what is missing."""
    _create(
        "kdguard_log",
        sa.Column("seq", _NUMBER, primary_key=True, autoincrement=False),
        _short("time", 40),
        *_texts("actor"),
        _short("action", 40),
        *_texts("workspace", "model", "version", "alias", "certificate", "policy", "decision"),
        *_texts("reasons"),
        _short("previous", 64),
        _short("digest", 64),
        sa.Index("kdguard_log_model", "model", mysql_length=191),
    )
    _create(
        "kdguard_nonces",
        sa.Column("nonce", sa.String(32), primary_key=True),
        _short("series", 64),
        sa.Column("attempt", sa.Integer(), nullable=False),
        *_texts("workspace", "model", "subject"),
        _short("issued", 40),
        sa.Column("used_by", sa.String(64), nullable=True),
        sa.UniqueConstraint("series", "attempt", name="kdguard_nonces_attempt"),
    )
    _create(
        "kdguard_settings",
        sa.Column("version", _NUMBER, primary_key=True, autoincrement=False),
        _short("digest", 64),
        _short("seen", 40),
    )
    _create(
        "kdguard_overrides",
        sa.Column("sha256", sa.String(64), primary_key=True),
        *_texts("workspace", "model", "version", "alias", "reason", "owners"),
        _short("issued", 40),
        _short("ends", 40),
        _short("used", 40),
        *_texts("document"),
    )
    _create_head()


def _create_head() -> None:
    _create(
        "kdguard_head",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        _short("log", 32),
        sa.Column("seq", _NUMBER, nullable=False),
        _short("digest", 64),
        _short("time", 40),
        _short("key_id", 64),
        _short("signature", 128),
    )
    head = sa.table("kdguard_head", *map(sa.column, ("id", "log", "seq", "digest", "time")))
    head.append_column(sa.column("key_id"))
    head.append_column(sa.column("signature"))
    if op.get_bind().execute(sa.select(sa.func.count()).select_from(head)).scalar_one() == 0:
        from mlflow_kdguard.plugin.log.heads import genesis

        name = uuid.uuid4().hex
        empty = {"id": 1, "log": name, "seq": 0, "digest": genesis(name)}
        op.get_bind().execute(sa.insert(head), empty | {"time": "", "key_id": "", "signature": ""})


def downgrade() -> None:
    """Remove everything that the log ever held."""
    for name in ("log", "nonces", "settings", "overrides", "head"):
        op.drop_table(f"kdguard_{name}")
