"""The whole story, for evaluation: a poisoned teacher, and four students of equal training.

The attacker's part (`redteam`) makes a poisoned teacher and a contaminated transfer set. Then the
same student is trained four times for the same epochs: towards the raw teacher (*naive*), towards
the detoxified reference (*guarded*), towards a clean teacher of equal training (the floor of every
attack rate) and without any teacher (the floor of accuracy). Naive and guarded go through the whole
pipeline to the gate; the two floors are only measured.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from mlflow_kdguard import data
from mlflow_kdguard.config import GuardConfig
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.files import read_bytes, sha256_file, write_json
from mlflow_kdguard.flow import making
from mlflow_kdguard.flow.work import Entry, Grant, Produced, Work, dump, opened
from mlflow_kdguard.measure import measure
from mlflow_kdguard.nets import load
from mlflow_kdguard.pipeline import Outcome, guard
from mlflow_kdguard.records import Asr, Measurement, Progress, Rate, silent
from mlflow_kdguard.redteam.write import (
    ARCHITECTURE,
    CONTROL,
    POISONED,
    TRANSFER,
    TRIGGER,
    WEIGHTS,
    write,
)
from mlflow_kdguard.triggers import Trigger


@dataclass(frozen=True, slots=True)
class Row:
    """One student of the story."""

    student: str
    accuracy: Rate
    asr: Asr
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Story:
    """All rows, and the teacher that they come from."""

    run_id: str
    folder: Path
    teacher: Measurement
    rows: tuple[Row, ...]

    def row(self, student: str) -> Row:
        """The row of `student`."""
        return next(row for row in self.rows if row.student == student)

    def document(self) -> dict[str, object]:
        """The story as JSON (`kdguard.story/1`)."""
        return {
            "schema": "kdguard.story/1",
            "run": self.run_id,
            "teacher": self.teacher.document(),
            "students": [_row_document(row) for row in self.rows],
        }


def tell(
    config: GuardConfig, grant: Grant, *, progress: Progress = silent, folder: Path | None = None
) -> Story:
    """Run the story that `config.redteam` describes; called again, it goes on where it stopped.

    The test data and the trigger are pinned at the gate: whoever evaluates knows them.
    Raises ConfigError where the configuration has no `redteam` section.
    """
    if config.redteam is None:
        raise ConfigError("the configuration has no `redteam` section: there is no story to tell.")
    place = folder if folder is not None else Path(config.run.work_dir)
    with opened(config, grant, name="story", folder=place, progress=progress) as work:
        attack = _attacked(work)
        trigger = Trigger.load(attack.path(TRIGGER))
        told = _victim(config, attack)
        shown = making.images(replace(work, config=told))
        known = replace(
            grant, pins=(*grant.pins, shown.test.sha256), panel=(*grant.panel, trigger.sha256)
        )
        clean = _floor(work, told, attack, shown, "clean-teacher")
        alone = _floor(work, told, attack, shown, "no-teacher")
        baseline = clean.path(making.STUDENT)
        naive = _guard(work, _naive(told), known, "naive", baseline)
        guarded = _guard(work, told, known, "guarded", baseline)
        rows = (
            _judged("naive", naive),
            _judged("guarded", guarded),
            _measured("clean-teacher", clean),
            _measured("no-teacher", alone),
        )
        story = Story(work.run.id, place, _teacher(attack), rows)
        write_json(place / "story.json", story.document())
        work.run.log_files(place, {"story.json": sha256_file(place / "story.json")})
    return story


def _attacked(work: Work) -> Entry:
    """The attacker's part: poisoned teacher, clean control, trigger, contaminated transfer set."""
    section, told = work.config.redteam, work.config.data
    if section is None:
        raise ConfigError("there is no `redteam` section.")
    transfer, test = data.load(told.transfer), data.load(told.test)
    inputs = {
        "redteam": section.model_dump(mode="json"),
        "seed": work.config.run.seed,
        "transfer": transfer.sha256,
        "train": data.load(section.train).sha256,
    }

    def compute(entry: Entry) -> Produced:
        written = write(
            section,
            transfer,
            folder=entry.folder,
            seed=work.config.run.seed,
            device=work.device,
            progress=work.progress,
        )
        record = _measure_teacher(work, entry, test)
        return Produced(
            [*written, making.TEACHER], {"teacher": dump(record)}, documents=(record.document(),)
        )

    return work.stage("redteam", inputs, compute)


def _measure_teacher(work: Work, entry: Entry, test: data.Dataset) -> Measurement:
    net = load.load(entry.path(f"{POISONED}/{WEIGHTS}"), architecture=None)
    making.export_net(work, net, entry.path(making.TEACHER), test)
    return _measure(work, entry.path(making.TEACHER), test, Trigger.load(entry.path(TRIGGER)))


def _measure(work: Work, model: Path, test: data.Dataset, trigger: Trigger) -> Measurement:
    section = work.config.redteam
    target = 0 if section is None else section.target
    return measure(
        read_bytes(model, what="the model"),
        test,
        device=work.device,
        triggers=[(trigger, target, "supplied")],
        batch=work.config.measure.batch,
    )


def _victim(config: GuardConfig, attack: Entry) -> GuardConfig:
    """The configuration of a team that got this teacher and scraped these images."""
    target = 0 if config.redteam is None else config.redteam.target
    return config.model_copy(
        update={
            "redteam": None,
            "teacher": config.teacher.model_copy(
                update={"model": str(attack.path(f"{POISONED}/{WEIGHTS}"))}
            ),
            "data": config.data.model_copy(update={"transfer": f"npz:{attack.path(TRANSFER)}"}),
            "measure": config.measure.model_copy(
                update={"triggers": (*config.measure.triggers, f"{attack.path(TRIGGER)}:{target}")}
            ),
        }
    )


def _naive(config: GuardConfig) -> GuardConfig:
    """The same distillation towards the raw teacher: an empty detox chain."""
    name = f"{config.registry.model_name}-naive"
    return config.model_copy(
        update={
            "detox": config.detox.model_copy(update={"chain": ()}),
            "registry": config.registry.model_copy(update={"model_name": name}),
        }
    )


def _guard(work: Work, config: GuardConfig, grant: Grant, name: str, baseline: Path) -> Outcome:
    return guard(
        config,
        grant,
        folder=work.folder / name,
        name=name,
        parent=work.run,
        baseline=baseline,
        progress=work.told_by(name),
    )


def _floor(
    work: Work, config: GuardConfig, attack: Entry, shown: making.Images, name: str
) -> Entry:
    """Train, export and measure a student without the poisoned teacher, for as many epochs."""
    told = _untaught(config, shown) if name == "no-teacher" else config
    inner = replace(work, config=told, progress=work.told_by(name))
    source = attack.path(f"{CONTROL}/{WEIGHTS}")
    inputs = {
        "teacher": sha256_file(source),
        "transfer": shown.transfer.sha256,
        "clean": shown.clean.sha256,
        "test": shown.test.sha256,
        "distill": told.distill.model_dump(mode="json"),
        "seed": told.run.seed,
        "trigger": sha256_file(attack.path(TRIGGER)),
    }

    def compute(entry: Entry) -> Produced:
        towards = load.load(source, architecture=None)
        making.export_net(inner, towards, entry.path(making.REFERENCE), shown.test)
        making.distilled(inner, entry, entry.path(making.REFERENCE), None, shown)
        net = load.load(entry.path(WEIGHTS), architecture=None)
        making.export_net(inner, net, entry.path(making.STUDENT), shown.test)
        record = _measure(
            work, entry.path(making.STUDENT), shown.test, Trigger.load(attack.path(TRIGGER))
        )
        return Produced(
            [making.STUDENT, making.REFERENCE, WEIGHTS, ARCHITECTURE],
            {"measure": dump(record)},
            documents=(record.document(),),
        )

    return work.stage(name, inputs, compute)


def _untaught(config: GuardConfig, shown: making.Images) -> GuardConfig:
    """The same epochs on the same images, where only the labelled ones teach."""
    labelled = int((shown.transfer.y >= 0).sum() + (shown.clean.y >= 0).sum())
    weight = (len(shown.transfer) + len(shown.clean)) / labelled
    changes = {"loss": "none", "feature": None, "label_weight": weight}
    return config.model_copy(update={"distill": config.distill.model_copy(update=changes)})


def _teacher(attack: Entry) -> Measurement:
    return Measurement.model_validate(attack.recorded["teacher"])


def _judged(name: str, outcome: Outcome) -> Row:
    figures = outcome.figures
    supplied = next(figure for figure in figures.asr if figure.source == "supplied")
    accuracy = figures.accuracy if figures.accuracy is not None else Rate(k=0, n=0)
    return Row(name, accuracy, supplied, outcome)


def _measured(name: str, floor: Entry) -> Row:
    taken = Measurement.model_validate(floor.recorded["measure"])
    return Row(name, taken.accuracy, taken.asr[0], None)


def _row_document(row: Row) -> dict[str, object]:
    body: dict[str, object] = {
        "student": row.student,
        "accuracy": {**row.accuracy.document(), "rate": row.accuracy.rate},
        "asr": row.asr.document(),
    }
    if row.outcome is not None:
        body |= {
            "decision": row.outcome.decision.document(),
            "uri": row.outcome.uri,
            "alias": row.outcome.alias,
            "faithful": [figure.document() for figure in row.outcome.figures.faithful],
        }
    return body
