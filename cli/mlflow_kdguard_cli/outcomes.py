"""What a run or a story came to: tables for people, and what to try next."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from mlflow_kdguard_cli import render

if TYPE_CHECKING:
    from mlflow_kdguard.config import GuardConfig
    from mlflow_kdguard.pipeline import Grant, Outcome
    from mlflow_kdguard.story import Row, Story


def finish(story: "Story", as_json: bool) -> int:
    """Show a story; its exit code."""
    for row in story.rows:
        if row.outcome is not None:
            render.decision(row.outcome.decision, f"{row.student} student, {row.outcome.uri}")
    render.table(
        "Students of equal training on the same contaminated images",
        ("student", "accuracy", "ASR", "at most", "lift", "gap proved", "gate"),
        [_story_row(row) for row in story.rows],
    )
    teacher = story.teacher
    render.say(
        f"teacher: accuracy {render.rate(teacher.accuracy)}, "
        f"ASR {teacher.asr[0].rate:.3f} ({teacher.asr[0].k}/{teacher.asr[0].n})"
    )
    render.document(story.document(), as_json)
    guarded = story.row("guarded").outcome
    return 0 if guarded is not None and guarded.decision.passed else 3


@dataclass(frozen=True, slots=True)
class _Verdict:
    text: str
    share: str


def _story_row(row: "Row") -> tuple[str, ...]:
    asr = row.asr
    lift = "-" if asr.lift is None else f"{asr.lift:+.3f}"
    verdict = _verdict(row.outcome)
    return (
        row.student,
        f"{row.accuracy.rate:.3f}",
        f"{asr.rate:.3f} ({asr.k}/{asr.n})",
        f"{asr.upper:.3f}",
        lift,
        verdict.share,
        verdict.text,
    )


def _verdict(outcome: "Outcome | None") -> _Verdict:
    if outcome is None:
        return _Verdict("a floor", "-")
    share = render.rate(outcome.figures.faithful[0].within)
    if outcome.decision.passed:
        return _Verdict(f"promoted, @{outcome.alias}", share)
    return _Verdict(f"REFUSED: {', '.join(outcome.decision.failed)}", share)


def serves(story: "Story", config: "GuardConfig", grant: "Grant") -> str:
    """Load the promoted student as a consumer would, and classify real images with it."""
    from mlflow_kdguard import data, load_verified

    guarded = story.row("guarded").outcome
    if guarded is None or guarded.alias is None:
        return "the guarded student was not promoted: there is nothing to serve"
    uri = f"models:/{config.registry.model_name}@{guarded.alias}"
    x, y = data.load(config.data.test).batch(range(100))
    at = config.registry
    model = load_verified(
        uri, keys=grant.verifiers, tracking_uri=at.tracking_uri, registry_uri=at.registry_uri
    )
    right = int((model.predict(x).argmax(axis=1) == y).sum())
    return f"{uri} serves: load_verified classifies {right} of 100 test images right"


def afterwards(story: "Story", config: "GuardConfig", place: Path) -> str:
    """What to try next: the refusal by hand, and the runs in MLflow's own pages."""
    naive = story.row("naive").outcome
    uri, key = quote(config.registry.tracking_uri or ""), place / "keys" / "verifier.pem.pub"
    lines = [f"look around: mlflow ui --backend-store-uri {uri}"]
    if naive is not None:
        lines.append(
            f"try to promote the naive one (exit code 3): kdguard promote {naive.uri} "
            f"--key {quote(str(key))} --pin {quote(config.data.test)} "
            f"--tracking-uri {uri}"
        )
    return "\n".join(lines)


def unverified(outcome: "Outcome", config: "GuardConfig") -> str | None:
    """How to have a student verified that only its builder has measured; None where it is."""
    if "certificate.figures_from" not in outcome.decision.failed:
        return None
    at = _at(config)
    data = config.data
    return "\n".join(
        (
            f"only its builder has measured {outcome.uri}. A verifier, with a key and images of "
            "their own, measures and signs it, and then it can be promoted:",
            "  kdguard keygen verifier.pem --owner NAME --role verifier",
            f"  kdguard verify {outcome.uri} --key verifier.pem --test {quote(data.test)} "
            f"--clean {quote(data.clean)} -c {quote(str(outcome.folder / 'config.json'))}{at}",
            f"  kdguard promote {outcome.uri} --alias {quote(config.registry.alias)} "
            f"--key verifier.pem.pub --pin {quote(data.test)}{at}",
        )
    )


def _at(config: "GuardConfig") -> str:
    """The flags that name the servers, where the configuration names them."""
    named = {
        "--tracking-uri": config.registry.tracking_uri,
        "--registry-uri": config.registry.registry_uri,
    }
    return "".join(f" {flag} {quote(uri)}" for flag, uri in named.items() if uri is not None)


def outcome_document(outcome: "Outcome") -> dict[str, Any]:
    """The outcome as JSON (`kdguard.run/1`)."""
    return {
        "schema": "kdguard.run/1",
        "run": outcome.run_id,
        "folder": str(outcome.folder),
        "uri": outcome.uri,
        "alias": outcome.alias,
        "decision": outcome.decision.document(),
    }
