"""The whole story, for evaluation: a poisoned teacher, and four students of equal training.

The attacker's part (`redteam`) makes a poisoned teacher and a contaminated transfer set. Then the
same student is trained four times for the same epochs: towards the raw teacher (*naive*), towards
the detoxified reference (*guarded*), towards a clean teacher of equal training (the floor of every
attack rate) and without any teacher (the floor of accuracy). Naive and guarded go through the whole
pipeline to the gate; the two floors are only measured.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from mlflow_kdguard.config import GuardConfig
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.data.uri import quote
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.files import read_bytes, sha256_file, write_json
from mlflow_kdguard.flow import given, making
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
        attack = attacked(work)
        teacher = _measured_teacher(work, attack)
        trigger = Trigger.load(attack.path(TRIGGER))
        told = victim(config, attack)
        shown = given.images(replace(work, config=told))
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
        story = Story(work.run.id, place, teacher, rows)
        write_json(place / "story.json", story.document())
        work.run.log_files(place, {"story.json": sha256_file(place / "story.json")})
        work.run.log_metrics(_figures(rows))
    return story


def attacked(work: Work) -> Entry:
    """The attacker's part: poisoned teacher, clean control, trigger, contaminated transfer set."""
    section = work.config.redteam
    if section is None:
        raise ConfigError("there is no `redteam` section.")
    transfer = given.load_data(work, work.config.data.transfer)
    train = given.load_data(work, section.train)
    inputs = {
        "redteam": section.model_dump(mode="json", exclude={"train"}),
        "seed": work.config.run.seed,
        "transfer": transfer.sha256,
        "train": train.sha256,
    }

    def compute(entry: Entry) -> Produced:
        written = write(
            section,
            transfer,
            train=train,
            folder=entry.folder,
            seed=work.config.run.seed,
            device=work.device,
            progress=work.progress,
        )
        return Produced(list(written), {})

    return work.stage("redteam", inputs, compute)


def _measured_teacher(work: Work, attack: Entry) -> Measurement:
    """What the attack came to: the poisoned teacher's accuracy and attack success rate."""
    test = given.load_data(work, work.config.data.test)
    source = attack.path(f"{POISONED}/{WEIGHTS}")
    inputs = {
        "teacher": sha256_file(source),
        "trigger": sha256_file(attack.path(TRIGGER)),
        "test": test.sha256,
        "export": work.config.export.model_dump(mode="json"),
        "target": None if work.config.redteam is None else work.config.redteam.target,
    }

    def compute(entry: Entry) -> Produced:
        net = load.load(source, architecture=None)
        given.export_net(work, net, entry.path(given.TEACHER), test)
        trigger = Trigger.load(attack.path(TRIGGER))
        record = _measure(work, entry.path(given.TEACHER), test, trigger)
        return Produced([given.TEACHER], {"measure": dump(record)}, documents=(record.document(),))

    entry = work.stage("poisoned-teacher", inputs, compute)
    return Measurement.model_validate(entry.recorded["measure"])


def _measure(work: Work, model: Path, test: Dataset, trigger: Trigger) -> Measurement:
    section = work.config.redteam
    target = 0 if section is None else section.target
    return measure(
        read_bytes(model, what="the model"),
        test,
        device=work.device,
        triggers=[(trigger, target, "supplied")],
        batch=work.config.measure.batch,
    )


def victim(config: GuardConfig, attack: Entry) -> GuardConfig:
    """The configuration of a team that got this teacher and scraped these images."""
    target = 0 if config.redteam is None else config.redteam.target
    return config.model_copy(
        update={
            "redteam": None,
            "teacher": config.teacher.model_copy(
                update={"model": str(attack.path(f"{POISONED}/{WEIGHTS}"))}
            ),
            "data": config.data.model_copy(
                update={"transfer": f"npz:{quote(attack.path(TRANSFER))}"}
            ),
            "measure": config.measure.model_copy(
                update={"triggers": (f"{attack.path(TRIGGER)}:{target}", *config.measure.triggers)}
            ),
        }
    )


def _naive(config: GuardConfig) -> GuardConfig:
    """The same distillation towards the raw teacher, which is registered once: no detox chain."""
    name = f"{config.registry.model_name}-naive"
    return config.model_copy(
        update={
            "detox": config.detox.model_copy(update={"chain": ()}),
            "registry": config.registry.model_copy(update={"model_name": name}),
            "teacher": config.teacher.model_copy(update={"name": None}),
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


def _floor(work: Work, config: GuardConfig, attack: Entry, shown: given.Images, name: str) -> Entry:
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
        "export": told.export.model_dump(mode="json"),
    }

    def compute(entry: Entry) -> Produced:
        towards = load.load(source, architecture=None)
        given.export_net(inner, towards, entry.path(making.REFERENCE), shown.test)
        making.distilled(inner, entry, entry.path(making.REFERENCE), None, shown)
        net = load.load(entry.path(WEIGHTS), architecture=None)
        given.export_net(inner, net, entry.path(making.STUDENT), shown.test)
        record = _measure(
            work, entry.path(making.STUDENT), shown.test, Trigger.load(attack.path(TRIGGER))
        )
        return Produced(
            [making.STUDENT, making.REFERENCE, WEIGHTS, ARCHITECTURE],
            {"measure": dump(record)},
            documents=(record.document(),),
        )

    return work.stage(name, inputs, compute)


def _untaught(config: GuardConfig, shown: given.Images) -> GuardConfig:
    """The same epochs on the same images, where only the labelled ones teach."""
    labelled = int((shown.transfer.y >= 0).sum() + (shown.clean.y >= 0).sum())
    weight = (len(shown.transfer) + len(shown.clean)) / labelled
    changes = {"loss": "none", "feature": None, "label_weight": weight}
    return config.model_copy(update={"distill": config.distill.model_copy(update=changes)})


def _judged(name: str, outcome: Outcome) -> Row:
    figures = outcome.figures
    supplied = next(figure for figure in figures.asr if figure.source == "supplied")
    accuracy = figures.accuracy if figures.accuracy is not None else Rate(k=0, n=0)
    return Row(name, accuracy, supplied, outcome)


def _measured(name: str, floor: Entry) -> Row:
    taken = Measurement.model_validate(floor.recorded["measure"])
    return Row(name, taken.accuracy, taken.asr[0], None)


def _figures(rows: tuple[Row, ...]) -> dict[str, float]:
    """Every student's accuracy and attack success rate, for the story's own run."""
    found = {f"kdguard/accuracy/{row.student}": row.accuracy.rate for row in rows}
    return found | {f"kdguard/asr/{row.student}": row.asr.rate for row in rows}


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
