"""`kdguard sweep`: every guarded name of a registry, and everything that is wrong with one."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlflow_kdguard_cli import options

if TYPE_CHECKING:
    from mlflow_kdguard.plugin.server.settings import Settings
    from mlflow_kdguard.promoted.logs import Database, Server
    from mlflow_kdguard.promoted.report import Finding, Holding, SweepReport
    from mlflow_kdguard.promoted.sweep import Watch

_FILE = click.Path(path_type=Path)


@click.command()
@click.option(
    "--server-settings",
    "settings_file",
    type=_FILE,
    envvar="KDGUARD_SERVER",
    help="Settings of the gated server: its keys, revocations, policies and registry names.",
)
@click.option(
    "--key",
    "keys",
    type=_FILE,
    multiple=True,
    help="Without settings: public record of a trusted key (.pub), or a folder of them.",
)
@click.option("--revoked", type=_FILE, help="Without settings: list of what is taken back (YAML).")
@options.policy
@click.option(
    "--registry",
    "registries",
    multiple=True,
    metavar="URI",
    help="Without settings: what certificates call this registry, if not by the URI used here.",
)
@click.option(
    "--log-uri", metavar="DATABASE_URI", help="The registry's database, to verify the log in it."
)
@click.option("--log-key", type=_FILE, help="Record of the key that signs the log's head (.pub).")
@click.option("--log-head", type=_FILE, help="File that the log's heads are published to.")
@click.option(
    "--within",
    type=click.FloatRange(min=0),
    default=14,
    show_default=True,
    metavar="DAYS",
    help="How soon the end of a certificate is worth a word.",
)
@options.registry_options
@options.as_json
def sweep(**flags: Any) -> int:
    """Every guarded alias, and what is wrong with one.

    Exit code 3 where anything is. The bytes that each guarded alias or stage stands for are fetched
    and hashed again, the certificate is checked against today's keys, revocations and dates, and
    the alias table is held against the server's log, where there is one. Nothing is changed, and
    no model is loaded.

    \b
    kdguard sweep --server-settings server.yaml --log-uri sqlite:///mlflow.db --json
    """
    from mlflow_kdguard.promoted.sweep import sweep as swept
    from mlflow_kdguard_cli import render

    settings = _settings(flags)
    connection = options.connected(flags)
    watch = _watch(flags, settings, connection.identity)
    log = _log(flags, settings, connection)
    state = log.state()
    with render.progress() as progress:
        report = swept(
            connection,
            watch,
            now=datetime.now(UTC),
            log=state,
            history=None if state is None else log.history,
            progress=progress,
        )
    _show(report)
    render.document(report.document(), flags["as_json"])
    return 0 if report.clean else 3


def _settings(flags: dict[str, Any]) -> "Settings | None":
    from mlflow_kdguard.plugin.server.settings import Settings

    named = flags["settings_file"]
    if named is None:
        return None
    given = [name for name in ("keys", "revoked", "policy_file", "registries") if flags[name]]
    if given:
        raise click.UsageError("--server-settings states keys, revocations, policy and registry.")
    return Settings.load(named.absolute())


def _watch(flags: dict[str, Any], settings: "Settings | None", identity: str) -> "Watch":
    from mlflow_kdguard.promoted.sweep import Watch
    from mlflow_kdguard.promoted.trust import Trust, trusted

    within = timedelta(days=flags["within"])
    if settings is not None:
        return Watch(
            trust=Trust.of(settings.verifiers, settings.keys.revocations),
            registries=settings.stated.registry,
            policy_for=settings.policy_for,
            judged=True,
            within=within,
        )
    policy = options.named_policy(flags["policy_file"])
    return Watch(
        trust=trusted(flags["keys"] or None, flags["revoked"]),
        registries=flags["registries"] or (identity,),
        policy_for=lambda _model: policy,
        judged=bool(flags["policy_file"]),
        within=within,
    )


def _log(
    flags: dict[str, Any], settings: "Settings | None", connection: Any
) -> "Database | Server":
    from mlflow_kdguard.attest.signing import Verifier
    from mlflow_kdguard.promoted.logs import Database, Server

    if flags["log_uri"] is None:
        if flags["log_key"] or flags["log_head"]:
            raise click.UsageError("--log-key and --log-head need the database (--log-uri).")
        return Server(connection)
    verifiers = [Verifier.load(flags["log_key"])] if flags["log_key"] else []
    heads = flags["log_head"]
    if settings is not None:
        verifiers += [settings.signer.verifier, *settings.verifiers]
        heads = heads or settings.head
    return Database(flags["log_uri"], verifiers, heads)


def _show(report: "SweepReport") -> None:
    from mlflow_kdguard_cli import render

    if report.holdings:
        faults: dict[tuple[str, ...], list[str]] = {}
        for finding in report.findings:
            faults.setdefault(_key(finding), []).append(finding.kind)
        render.listed(
            f"Guarded names of {report.registry}",
            ("name", "version", "certificate until", "signed by", "state"),
            [_row(holding, faults.get(_key(holding), [])) for holding in report.holdings],
        )
    if report.findings:
        render.listed(
            "What is wrong",
            ("name", "what", "why", "what to do"),
            [(_named(f), f.kind, f.why, f.remedy) for f in report.findings],
        )
    if report.would_refuse:
        render.listed(
            "What enforcing would have refused (mode: audit)",
            ("when", "who", "name", "reasons"),
            [
                (e.time, e.actor, f"{e.model}@{e.alias} → {e.version}", "; ".join(e.reasons))
                for e in report.would_refuse
            ],
        )
    _conclude(report)


def _conclude(report: "SweepReport") -> None:
    from mlflow_kdguard_cli import render

    log = report.log
    if log is None:
        render.say("log: none was found; names that were moved past a gate do not show")
    else:
        verified = "verified" if log.verified and not log.problems else "NOT verified"
        render.say(f"log: {log.entries} entries at {log.source}, {verified}")
        for note in log.notes:
            render.say(f"  {note}")
    names = render.counted(len(report.holdings), "guarded name")
    looked = f"{names} of {render.counted(report.models, 'model')}"
    if report.clean:
        render.say(f"clean: {looked}")
    else:
        render.say(f"FOUND {render.counted(len(report.findings), 'fault')} among {looked}")


def _row(holding: "Holding", faults: list[str]) -> tuple[str, ...]:
    return (
        _named(holding),
        holding.version,
        holding.expires or "-",
        ", ".join(holding.signers) or "-",
        ", ".join(dict.fromkeys(faults)) or "ok",
    )


def _key(item: "Holding | Finding") -> tuple[str, ...]:
    return (item.workspace, item.model, item.name, item.version)


def _named(item: "Holding | Finding") -> str:
    place = "" if item.workspace in ("", "default") else f"{item.workspace}: "
    return f"{place}{item.model}@{item.name}" if item.model else "-"
