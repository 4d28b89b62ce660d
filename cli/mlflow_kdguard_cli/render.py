"""What people see: tables and progress on stderr, one JSON document on stdout. Only here is
anything printed."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mlflow_kdguard.records import (
    Asr,
    AuditReport,
    CertifyReport,
    Decision,
    Flips,
    Measurement,
    PatchReport,
    Rate,
    SmoothReport,
    silent,
)
from mlflow_kdguard.records import Progress as Listener

people = Console(stderr=True, highlight=False)
if not people.is_terminal:
    people = Console(stderr=True, highlight=False, width=100)  # logs and files: 80 is too narrow


def counted(number: int, noun: str) -> str:
    """So many of something: "1 model", "2 models"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def document(value: Mapping[str, Any], as_json: bool) -> None:
    """Print the JSON document where it was asked for."""
    if as_json:
        click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def say(text: str) -> None:
    """One line for people."""
    people.print(text, soft_wrap=True, markup=False)


@contextmanager
def progress() -> Iterator[Listener]:
    """A listener that draws bars on a terminal, and writes a line now and then elsewhere."""
    if not people.is_terminal:
        yield _lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=people, transient=False) as bars:
        tasks: dict[str, Any] = {}

        def listen(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, figures="")
            bars.update(tasks[what], completed=done, total=total, figures=_short(figures))

        yield listen


def _lines(every: float = 5.0) -> Listener:
    started: dict[str, float] = {}
    last: dict[str, float] = {}

    def listen(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        begun = started.setdefault(what, now)
        if done >= total or now - last.get(what, -every) >= every:
            if last.get(what) == float("inf"):
                return
            last[what] = float("inf") if done >= total else now
            say(f"{what}: {done}/{total}  {now - begun:.0f} s  {_short(figures)}".rstrip())

    return listen


def no_progress() -> Listener:
    """The listener for callers who asked for silence."""
    return silent


def _short(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: bool = False
) -> None:
    """A table for people; figures stand to the right, words (`left`) to the left."""
    drawn = Table(
        title=title, title_justify="left", title_style="bold", pad_edge=False, box=SIMPLE_HEAD
    )
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 or left else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    people.print(drawn)


def listed(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of texts that others may have written: no markup and no control codes of theirs."""
    drawn = _titled(_plain(title))
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*map(_plain, row))
    people.print(drawn)


def _plain(text: str) -> str:
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _titled(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", pad_edge=False, box=SIMPLE_HEAD
    )


def rate(value: Rate) -> str:
    """k of n and the rate."""
    return f"{value.rate:.3f} ({value.k}/{value.n})"


def decision(value: Decision, of: str) -> None:
    """Every rule with its limit, its figure and its reason; the verdict last."""
    drawn = Table(
        title=f"Gate: {of}",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        box=SIMPLE_HEAD,
    )
    for column in ("rule", "", "why"):
        drawn.add_column(column, overflow="fold")
    for rule in value.rules:
        drawn.add_row(rule.rule, "[green]ok[/]" if rule.ok else "[red]no[/]", rule.why)
    people.print(drawn)
    if value.passed:
        say(f"pass: {of} may be promoted")
    else:
        say(f"REFUSED: {of} fails {', '.join(value.failed)}")


def measurement(value: Measurement, of: str) -> None:
    """Accuracy and attack success rates with their bounds."""
    say(f"{of}: accuracy {rate(value.accuracy)} on {value.data.uri} ({value.provider})")
    if value.paired is not None:
        drop = value.paired.drop_upper()
        say(f"  accuracy lost against the teacher: at most {drop:.3f} (95 %, same images)")
    table(
        "Attack success",
        ("trigger", "target", "source", "ASR", "k/n", "upper bound", "lift"),
        [_asr_row(figure) for figure in value.asr],
    )


def _asr_row(figure: Asr) -> Sequence[str]:
    lift = "-" if figure.lift is None else f"{figure.lift:+.3f}"
    return (
        figure.name,
        str(figure.target),
        figure.source,
        f"{figure.rate:.3f}",
        f"{figure.k}/{figure.n}",
        f"{figure.upper:.3f}",
        lift,
    )


def audit(value: AuditReport, of: str) -> None:
    """Each detector's score and the verdict."""
    rows = [
        (
            f.name,
            f"{f.score:.4g}",
            "-" if f.p_value is None else f"{f.p_value:.3g}",
            "-" if f.target is None else str(f.target),
            "yes" if f.flagged else "no",
            f"{f.seconds:.1f}",
        )
        for f in value.detectors
    ]
    table(f"Audit of {of}", ("detector", "score", "p", "class", "flagged", "s"), rows)
    if value.asr:
        table(
            "Triggers on this model",
            ("trigger", "target", "source", "ASR", "k/n", "upper bound", "lift"),
            [_asr_row(figure) for figure in value.asr],
        )
    for f in value.detectors:
        why = f.details.get("calibration", {}).get("why")
        if why:
            say(f"{f.name} is {why}")
    target = "" if value.target is None else f", class {value.target}"
    say(f"verdict: {value.verdict}{target}")


def certified(value: CertifyReport) -> None:
    """Bounds on the confidence gap."""
    s = value.summary
    table(
        f"Confidence gap, {value.norm} eps {value.eps:g}, {value.classes} classes, {s.n} images",
        ("", "mean", "95th percentile", "largest"),
        [
            ("witness (lower)", f"{s.lower_mean:.4f}", "", ""),
            ("bound of the real functions", f"{s.bound_mean:.4f}", "", ""),
            ("float32 margin", f"{s.float32_margin_mean:.4f}", "", ""),
            (
                "certified (upper)",
                f"{s.upper_mean:.4f}",
                f"{s.upper_p95:.4f}",
                f"{s.upper_max:.4f}",
            ),
            ("constant network", f"{value.control.gap_mean:.4f}", "", ""),
        ],
    )
    ended = Counter[str](sample.stopped for sample in value.samples if sample.stopped is not None)
    if ended:
        told = (f"{counted(n, 'image')} (limit: {limit})" for limit, n in sorted(ended.items()))
        say(f"not searched to the end: {', '.join(told)}")
    if value.interrupted:
        late = sum(sample.method == "skipped" for sample in value.samples)
        say(f"INTERRUPTED: {late} of {s.n} images were not bounded; this report is not attested")
    proved = Rate(k=sum(sample.status == "PROVED" for sample in value.samples), n=s.n)
    say(
        f"gap <= {value.delta:g} proved on {rate(proved)}, at least {proved.lower():.3f} of the "
        f"population (95 %); {s.seconds_mean:.2f} s an image on {value.device}"
    )


def smoothed(value: SmoothReport) -> None:
    """Bounds on the gap of a smoothed pair, at several radii."""
    table(
        f"Gap of the pair smoothed with {value.sigma:g}, {value.classes} classes, "
        f"{len(value.samples)} images of {value.draws} draws",
        ("l2 radius", "certified, mean", f"within {value.delta:g}"),
        [(f"{p.radius:g}", f"{p.upper_mean:.4f}", rate(p.within)) for p in value.curve],
    )
    if not value.complete:
        say("stopped early: what was not looked at is undecided")
    say(
        f"smoothed gap <= {value.delta:g} within l2 {value.radius:g} on {rate(value.within)}, at "
        f"least {value.share_lower():.3f} of the population (95 %, noise included); a constant "
        f"network {value.control.gap_mean:.3f}; {value.seconds:.1f} s on {value.device}. Of the "
        "mean over noise, and of no answer without it"
    )


def patched(value: PatchReport) -> None:
    """What patches of any content can do, position by position."""
    rows = [(f"{row},{column}", each, all_) for (row, column), each, all_ in _places(value)]
    if len(rows) > 1:
        rows.append(("any of them", value.each, value.universal))
    side, n = value.size, value.each.n
    table(
        f"Images sent to class {value.target} by a patch of {side}×{side} pixels, of {n}",
        ("position", "one each: found", "certified", "one for all: found", "certified"),
        [(name, *_range(each), *_range(all_)) for name, each, all_ in rows],
    )
    if not value.complete:
        say("stopped early: what was not looked at counts as unproved")
    say(
        f"certified attack success {rate(value.each.unproved)}, in the population between "
        f"{value.each_lower:.3f} and {value.each.upper:.3f} (95 % each); one patch for all: "
        f"{rate(value.universal.unproved)}, at most "
        f"{value.universal.upper:.3f}; without a patch {rate(value.clean)}; "
        f"{value.seconds:.1f} s on {value.device}"
    )


def _places(value: PatchReport) -> list[tuple[tuple[int, int], Flips, Flips]]:
    return [(place.position, place.each, place.universal) for place in value.places]


def _range(flips: Flips) -> tuple[str, str]:
    return str(flips.attack), str(flips.certified)
