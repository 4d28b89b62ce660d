"""The project backend without a server: manifests, parameters, plans, limits and processes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mlflow_kdguard import policy
from mlflow_kdguard.config import GuardConfig
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.plugin.backend import build, manifest, plan, settings, types, watch
from mlflow_kdguard.plugin.backend.manifest import Manifest
from mlflow_kdguard.plugin.backend.settings import Limits

ROOT = Path(__file__).parents[2]
NAMES = [stage.name for stage in manifest.packaged().stages]


def _project(folder: Path, stages: list[Any], **more: Any) -> Manifest:
    rows = [{"name": row} if isinstance(row, str) else row for row in stages]
    (folder / "plugin.yaml").write_text(yaml.safe_dump({"name": "p", "stages": rows, **more}))
    return manifest.load(folder)


def _plan(found: Manifest, entry: str = "main", **given: str) -> plan.Plan:
    return plan.make(
        found,
        entry,
        given,
        folder=Path("/project"),
        work_dir=Path("/place/of/work"),
        tracking_uri="http://127.0.0.1:1",
    )


def _config(made: plan.Plan) -> GuardConfig:
    return GuardConfig.model_validate(made.values)


def test_mlflow_finds_the_backend_by_its_name() -> None:
    from mlflow.projects.backend.abstract_backend import AbstractBackend
    from mlflow.projects.backend.loader import load_backend

    found = load_backend("kdguard")
    assert isinstance(found, AbstractBackend)
    assert type(found) is type(build())


# ── Types ───────────────────────────────────────────────────────────────────────────────────────

READ = [
    ("3", "int", 3),
    ("3", "float", 3),
    ("1e-3", "float", 0.001),
    ("3", "str", "3"),
    ("true", "bool", True),
    ("", "str?", None),
    ("null", "float?", None),
    ("2.5", "float?", 2.5),
    ("off", "off|bfloat16", "off"),
    ("auto", "[int]|auto", "auto"),
    ("[1, 2]", "[int]|auto", [1, 2]),
    ("[]", "[str]", []),
    ("{size: 2}", "{str: float}", {"size": 2}),
    ("{epochs: 2}", "mapping", {"epochs": 2}),
]
NOT_READ = [
    ("3.5", "int"),
    ("yes", "int"),
    ("true", "int"),
    ("three", "float"),
    (".inf", "float"),
    ("", "int"),
    ("fp8", "off|bfloat16"),
    ("[a]", "[int]"),
    ("{size: big}", "{str: float}"),
    ("[1", "[int]"),
    ("3", "bool"),
]


@pytest.mark.parametrize(("text", "kind", "value"), READ)
def test_values_are_read_by_their_type(text: str, kind: str, value: Any) -> None:
    read = types.read(text, kind, where="x")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(("text", "kind"), NOT_READ)
def test_values_of_another_type_are_refused_by_name(text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.key"):
        types.read(text, kind, where="section.key")


def test_every_packaged_parameter_is_of_its_type() -> None:
    shipped = manifest.packaged()
    tables = [*shipped.shared.values(), *(stage.parameters for stage in shipped.stages)]
    rows = [row for table in tables for row in table.values()]
    assert len(rows) > 100
    assert all(row.type and types.known(row.type) for row in rows)
    assert all(types.conforms(row.default, row.type or "") for row in rows)


# ── Manifests ───────────────────────────────────────────────────────────────────────────────────


def test_a_verbatim_copy_of_the_packaged_manifest_is_a_project(tmp_path: Path) -> None:
    (tmp_path / "plugin.yaml").write_bytes((ROOT / "plugin.yaml").read_bytes())
    made = _plan(manifest.load(tmp_path))
    expected = GuardConfig().model_copy(update={"run": _config(made).run})
    assert _config(made).digest == expected.digest
    assert [step.name for step in made.steps] == ["teacher", "promote"]
    assert _config(made).redteam is None, "an optional stage ran"


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        (["audit", "redteam"], "out of order"),
        (["distill", "audit"], "out of order"),
        (["audit", "distill", "register"], "needs the stage export"),
        (["gate"], "needs the stage audit"),
        (["audit", "audit"], "twice"),
        ([{"name": "audit", "command": "rm -rf x"}], "the command of the stage audit"),
        ([{"name": "audit", "section": "detox"}], "the section of the stage audit"),
        ([{"name": "mine"}], "needs a command"),
        ([{"name": "mine", "command": "echo 'x"}], "cannot be split"),
        ([{"name": "Mine!", "command": "x"}], "stages.0.name"),
        ([{"name": "mine", "command": "x", "shell": True}], "unknown key"),
        ([{"name": "mine", "command": "x", "parameters": {"a": {"type": "in t"}}}], "unknown type"),
        ([{"name": "redteam", "optional": True}], "nothing would run"),
        ([], "stages"),
    ],
)
def test_manifests_that_make_no_sense(tmp_path: Path, stages: list[Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        _project(tmp_path, stages)


def test_a_folder_without_a_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plugin\.yaml"):
        manifest.load(tmp_path)


def test_the_entry_point_says_where_to_stop(tmp_path: Path) -> None:
    found = _project(tmp_path, [*NAMES[1:]], main="attest")
    assert [stage.name for stage in found.through("main")][-1] == "attest"
    assert [stage.name for stage in found.through("promote")][-1] == "promote"
    with pytest.raises(ConfigError, match="runs no stage 'redteam'"):
        found.through("redteam")
    with pytest.raises(ConfigError, match="no stage 'nowhere'"):
        _project(tmp_path, ["audit"], main="nowhere")


# ── Parameters ──────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_a_projects_and_parameters_the_callers(tmp_path: Path) -> None:
    found = _project(
        tmp_path,
        [
            {"name": "audit", "parameters": {"steps": {"default": 7}}},
            {"name": "distill", "parameters": {"epochs": {"type": "int", "default": 3}}},
        ],
        shared={"data": {"test": {"default": "digits#test"}}},
    )
    told = _config(_plan(found))
    assert (told.audit.steps, told.distill.epochs, told.data.test) == (7, 3, "digits#test")
    given = {"distill.epochs": "5", "data.test": "npz:3", "teacher.model": "{work_dir}/t.onnx"}
    told = _config(_plan(found, **given))
    assert (told.audit.steps, told.distill.epochs, told.data.test) == (7, 5, "npz:3")
    assert told.teacher.model == "/place/of/work/t.onnx"
    assert told.run.work_dir == "/place/of/work"
    assert told.registry.tracking_uri == "http://127.0.0.1:1"


def test_a_part_of_a_mapping_leaves_its_other_parts(tmp_path: Path) -> None:
    found = _project(tmp_path, ["redteam"])
    told = _config(_plan(found, **{"redteam.poison_loop.epochs": "1", "redteam.options.size": "2"}))
    assert told.redteam is not None
    assert (told.redteam.poison_loop.epochs, told.redteam.poison_loop.lr) == (1, 0.03)
    assert told.redteam.options == {"size": 2.0}


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("distill.epochs", "many", r"distill\.epochs=many: a value of type int"),
        ("distill.epochs", "-1", "distill.epochs"),
        ("distill.epoch", "3", r"Did you mean .*distill\.epochs"),
        ("epochs", "3", "no such parameter"),
        ("distill.epochs.more", "3", "has no parts"),
        ("run.work_dir", "/tmp", "work_dir"),
        ("registry.tracking_uri", "http://elsewhere", "MLFLOW_TRACKING_URI"),
        ("redteam.target", "1", "does not run that stage"),
        ("policy.accuracy", "null", "no such parameter"),
    ],
)
def test_parameters_that_are_refused(tmp_path: Path, name: str, text: str, why: str) -> None:
    found = _project(tmp_path, ["audit", "distill"])
    with pytest.raises(ConfigError, match=why):
        _plan(found, **{name: text})


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"epochs": {"default": "many"}}, "not of type int"),
        ({"epochs": {"type": "str", "default": "3"}}, "of type int, not str"),
        ({"epoch": {"default": 3}}, r"no parameter distill\.epoch"),
    ],
)
def test_defaults_that_are_refused(tmp_path: Path, parameters: dict[str, Any], why: str) -> None:
    found = _project(tmp_path, ["audit", {"name": "distill", "parameters": parameters}])
    with pytest.raises(ConfigError, match=why):
        _plan(found)


def test_two_stages_of_one_section_must_agree(tmp_path: Path) -> None:
    stages: list[Any] = list(NAMES[1:8])
    stages[1] = {"name": "audit", "parameters": {"steps": {"default": 3}}}
    assert _config(_plan(_project(tmp_path, stages))).audit.steps == 3
    stages[-1] = {"name": "audit-student", "parameters": {"steps": {"default": 4}}}
    with pytest.raises(ConfigError, match="different defaults"):
        _plan(_project(tmp_path, stages))


def test_no_project_moves_its_own_place_or_server(tmp_path: Path) -> None:
    for section, key in (("run", "work_dir"), ("registry", "tracking_uri")):
        found = _project(tmp_path, ["audit"], shared={section: {key: {"default": "elsewhere"}}})
        with pytest.raises(ConfigError, match="cannot set"):
            _plan(found)


# ── Plans ───────────────────────────────────────────────────────────────────────────────────────


def test_the_teacher_is_loaded_in_a_process_of_its_own(tmp_path: Path) -> None:
    made = _plan(_project(tmp_path, NAMES))
    assert [(step.name, getattr(step, "limits", "")) for step in made.steps] == [
        ("redteam", "stages"),
        ("teacher", "teacher"),
        ("promote", "stages"),
    ]
    own = {"name": "mine", "command": "echo"}
    made = _plan(_project(tmp_path, [own, "audit", own | {"name": "other"}, "distill"]))
    assert [step.name for step in made.steps] == ["mine", "teacher", "audit", "other", "distill"]
    alone = _plan(_project(tmp_path, ["register-teacher"])).steps
    assert [step.name for step in alone] == ["teacher"]


def test_leaving_out_the_detox_empties_its_chain(tmp_path: Path) -> None:
    assert _config(_plan(_project(tmp_path, ["audit", "distill"]))).detox.chain == ()
    assert _config(_plan(_project(tmp_path, ["audit", "detox"]), "audit")).detox.chain


def test_no_value_becomes_a_word_or_a_placeholder(tmp_path: Path) -> None:
    """Values are filled in after the command is split, and are not filled in themselves."""
    stage = {
        "name": "mine",
        "command": "run --name {name} 'two words' {folder}/x {other} {unknown}",
        "parameters": {
            "name": {"type": "str", "default": "a"},
            "other": {"type": "int?", "default": None},
        },
    }
    evil = "x; rm -rf / $(id) {folder}"
    (step,) = _plan(_project(tmp_path, [stage]), **{"mine.name": evil}).steps
    assert isinstance(step, plan.Own)
    words = step.words(folder=Path("/f"), work_dir=Path("/w"))
    assert words == ["run", "--name", evil, "two words", "/f/x", "", "{unknown}"]


def test_a_parameter_without_a_default_is_asked_for(tmp_path: Path) -> None:
    stage = {"name": "mine", "command": "x {n}", "parameters": {"n": {"type": "int"}}}
    found = _project(tmp_path, [stage])
    with pytest.raises(ConfigError, match=r"mine\.n"):
        _plan(found)
    assert _plan(found, **{"mine.n": "3"}).steps


# ── Policy ──────────────────────────────────────────────────────────────────────────────────────


def test_a_projects_policy_tightens(tmp_path: Path) -> None:
    floor = policy.load()
    found = _project(tmp_path, ["audit"], policy={"accuracy": {"drop_upper_at_most": 0.01}})
    narrowed, loose = plan.policies(floor, found, "p")
    assert narrowed.accuracy is not None
    assert narrowed.accuracy.drop_upper_at_most == 0.01
    assert loose == ()


@pytest.mark.parametrize(
    ("block", "key"),
    [
        ({"accuracy": {"drop_upper_at_most": 0.9}}, "accuracy.drop_upper_at_most"),
        ({"accuracy": None}, "accuracy"),
        ({"data": {"allow_unpinned": True}}, "data.allow_unpinned"),
        ({"guarded": {"aliases": []}}, "guarded.aliases"),
        ({"faithful": None}, "faithful"),
        ({"certificate": {"signers_at_least": 1}}, ""),
    ],
)
def test_a_projects_policy_never_loosens(tmp_path: Path, block: dict[str, Any], key: str) -> None:
    floor = policy.load()
    narrowed, loose = plan.policies(floor, _project(tmp_path, ["audit"], policy=block), "p")
    assert narrowed == floor
    assert (key in loose) if key else not loose


def test_a_malformed_policy_is_refused(tmp_path: Path) -> None:
    found = _project(tmp_path, ["audit"], policy={"acuracy": {}})
    with pytest.raises(ConfigError, match="acuracy"):
        plan.policies(policy.load(), found, "p")


# ── The caller's configuration ──────────────────────────────────────────────────────────────────

FROM_MLFLOW = {
    "ENV_MANAGER": None,
    "SYNCHRONOUS": False,
    "DOCKER_ARGS": {},
    "STORAGE_DIR": None,
    "build_image": False,
    "docker_auth": None,
}


def test_mlflows_own_keys_are_not_ours() -> None:
    assert settings.read(FROM_MLFLOW) == settings.BackendConfig()
    given = settings.read({**FROM_MLFLOW, "teacher": {"seconds": 5}, "pins": ["digits#test"]})
    assert (given.teacher.seconds, given.teacher.memory_mib) == (5.0, None)
    assert given.pins == ("digits#test",)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"workdir": "x"}, "workdir: unknown key"),
        ({"teacher": {"seconds": 0}}, "teacher.seconds"),
        ({"teacher": {"memory_mib": "much"}}, "teacher.memory_mib"),
        ({"grace_seconds": -1}, "grace_seconds"),
        ({"grace_seconds": float("nan")}, "grace_seconds"),
        ({"work_dir": ""}, "work_dir"),
        ({"ENV_MANAGER": "virtualenv"}, "env-manager virtualenv"),
        ({"DOCKER_ARGS": {"gpus": "all"}}, "docker-args"),
        ({"build_image": True}, "build-image"),
    ],
)
def test_configurations_that_are_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        settings.read({**FROM_MLFLOW, **values})


# ── Processes ───────────────────────────────────────────────────────────────────────────────────


def _watched(tmp_path: Path, code: str, limits: Limits | None = None, **more: Any) -> watch.Ended:
    return watch.run(
        [sys.executable, "-c", code],
        folder=tmp_path,
        environment=os.environ,
        log=tmp_path / "logs" / "x.log",
        limits=limits or Limits(),
        grace=more.pop("grace", 4.0),
        **more,
    )


def _gone(pid: int) -> bool:
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_output_is_streamed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = _watched(tmp_path, "import sys; print('one'); sys.stderr.write('two\\n'); sys.exit(3)")
    assert (done.code, done.stopped) == (3, "")
    assert "exit code 3" in done.why
    shown = capsys.readouterr().out
    assert "one" in shown
    assert "two" in shown
    assert sorted((tmp_path / "logs" / "x.log").read_text().split()) == ["one", "two"]


def test_what_never_ends_is_stopped(tmp_path: Path) -> None:
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)"
    began = time.monotonic()
    done = _watched(tmp_path, code, Limits(seconds=1.0, memory_mib=None))
    assert "1 s, its limit of wall time" in done.stopped
    assert done.code == -signal.SIGKILL
    assert time.monotonic() - began < 30


def test_what_takes_too_much_memory_is_stopped(tmp_path: Path) -> None:
    code = "x = []\nwhile True: x.append(bytearray(8 << 20))"
    done = _watched(tmp_path, code, Limits(seconds=60.0, memory_mib=200))
    assert "200 MiB, its limit of memory" in done.stopped


def test_memory_of_children_counts(tmp_path: Path) -> None:
    inner = "x = bytearray(300 << 20); import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    done = _watched(tmp_path, code, Limits(seconds=60.0, memory_mib=200))
    assert "limit of memory" in done.stopped


def test_nothing_that_a_process_started_outlives_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "for new in (False, True):\n"
        "    p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'],\n"
        "                         start_new_session=new)\n"
        "    print(p.pid, flush=True)\n"
        "import time; time.sleep(300)\n"
    )
    done = _watched(tmp_path, code, Limits(seconds=3.0, memory_mib=None))
    pids = [int(line) for line in done.tail if line.isdecimal()]
    assert len(pids) == 2
    assert all(map(_gone, pids))


def test_a_child_in_the_background_is_ended_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "print(p.pid, flush=True)\n"
    )
    done = _watched(tmp_path, code)
    assert done.code == 0
    assert _gone(int(done.tail[0]))


def test_a_tethered_process_notices_that_its_caller_is_gone(tmp_path: Path) -> None:
    done = _watched(tmp_path, "import sys; print(sys.stdin.isatty(), sys.stdin.fileno())")
    assert done.code == 0
    code = "import os; os.read(0, 1)"
    assert _watched(tmp_path, code).code == 0  # no tether: stdin is empty
    done = _watched(tmp_path, code, Limits(seconds=2.0, memory_mib=None), tethered=True)
    assert "wall time" in done.stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_and_passes_on(tmp_path: Path, number: signal.Signals) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(1.5, os.kill, (os.getpid(), number)).start()
    with watch.terminable(), pytest.raises(KeyboardInterrupt) as caught:
        _watched(tmp_path, code)
    assert isinstance(caught.value, watch.Stopped) is (number is signal.SIGTERM)
    assert _gone(int((tmp_path / "logs" / "x.log").read_text().split()[0]))
    assert signal.getsignal(signal.SIGTERM) is before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watch.terminable():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_waits_for_the_cleaning_up() -> None:
    done: list[str] = []

    def cleaned(*, heard: bool) -> None:
        inner = watch.disturbed() if heard else contextlib.nullcontext()
        with watch.terminable(), watch.undisturbed(), inner:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("cleaned up")

    with pytest.raises(watch.Stopped):
        cleaned(heard=False)
    assert done == ["cleaned up"]
    with pytest.raises(watch.Stopped):
        cleaned(heard=True)
    assert done == ["cleaned up"]


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        watch.run(
            ["no-such-program"],
            folder=tmp_path,
            environment=os.environ,
            log=tmp_path / "x.log",
            limits=Limits(),
            grace=1.0,
        )


def test_what_mlflow_loads_brings_in_no_torch() -> None:
    """`mlflow run` itself stays light; stages have processes of their own."""
    code = (
        "import sys, mlflow_kdguard.plugin.backend.submit, mlflow_kdguard.plugin.evaluator\n"
        "assert not {'torch', 'onnxruntime'} & set(sys.modules)"
    )
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    done = subprocess.run([sys.executable, "-c", code], env=quiet, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
