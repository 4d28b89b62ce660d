"""What is installed is what the sources, the manifest and the documents say."""

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import mlflow_kdguard
from mlflow_kdguard.config import GuardConfig, Section
from mlflow_kdguard.errors import CertificateError
from requirements import require

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MANIFEST = yaml.safe_load((ROOT / "plugin.yaml").read_text("utf-8"))

ORDER = [
    "redteam",
    "register-teacher",
    "audit",
    "detox",
    "distill",
    "export",
    "register",
    "audit-student",
    "measure",
    "certify",
    "certify-smooth",
    "certify-patch",
    "attest",
    "verify",
    "gate",
    "promote",
]


# ── The manifest ────────────────────────────────────────────────────────────────────────────────


def test_there_is_one_manifest_and_it_is_in_the_package() -> None:
    packaged = ROOT / "mlflow_kdguard" / "plugin.yaml"
    assert not packaged.is_symlink()
    assert (ROOT / "plugin.yaml").is_symlink()
    assert (ROOT / "plugin.yaml").resolve() == packaged


def test_manifest_metadata_is_the_packaging_metadata() -> None:
    assert MANIFEST["name"] == PROJECT["name"]
    assert MANIFEST["version"] == PROJECT["version"] == mlflow_kdguard.__version__
    assert MANIFEST["provides"]["console_scripts"] == PROJECT["scripts"]
    points = {
        group: dict(rows)
        for group, rows in PROJECT.get("entry-points", {}).items()
        if group.startswith("mlflow.")
    }
    assert MANIFEST["provides"]["entry_points"] == points
    assert set(MANIFEST) == {"name", "version", "provides", "shared", "stages", "policy"}


def test_stages_are_in_order() -> None:
    assert [stage["name"] for stage in MANIFEST["stages"]] == ORDER
    assert [stage["name"] for stage in MANIFEST["stages"] if stage.get("optional")] == ["redteam"]


def test_every_stage_names_a_command_that_exists() -> None:
    from mlflow_kdguard_cli.main import COMMANDS

    for stage in MANIFEST["stages"]:
        program, command, *_ = stage["command"].split()
        assert program == "kdguard"
        assert command in COMMANDS, stage["name"]


def _section(name: str) -> type[Section]:
    annotation = GuardConfig.model_fields[name].annotation
    kinds = [annotation, *get_args(annotation)]
    return next(k for k in kinds if isinstance(k, type) and issubclass(k, Section))


def test_every_section_is_a_stages_or_shared() -> None:
    sections = {stage["section"] for stage in MANIFEST["stages"]} - {None}
    alone = {"teach"}  # of `kdguard teacher train`, which no pipeline runs
    assert sections | set(MANIFEST["shared"]) | alone == set(GuardConfig.model_fields)
    assert not alone & (sections | set(MANIFEST["shared"]))


def _listed() -> Iterator[tuple[str, dict[str, Any]]]:
    for stage in MANIFEST["stages"]:
        if stage["section"]:
            yield stage["section"], stage["parameters"]
        else:
            assert stage["parameters"] == {}
    yield from MANIFEST["shared"].items()


def test_parameters_are_the_fields_of_the_configuration() -> None:
    for name, parameters in _listed():
        model = _section(name)
        assert list(parameters) == list(model.model_fields), name
        defaults = json.loads(model().model_dump_json())
        schema = model.model_json_schema()["properties"]
        for key, parameter in parameters.items():
            field = model.model_fields[key]
            assert parameter["default"] == defaults[key], f"{name}.{key}"
            assert type(parameter["default"]) is type(defaults[key]), f"{name}.{key}"
            assert parameter["help"] == field.description
            assert parameter["type"] == _spelled(schema[key]), f"{name}.{key}"


SPELLING = {"integer": "int", "number": "float", "string": "str", "boolean": "bool"}


def _spelled(schema: dict[str, Any]) -> str:
    """The type of a field as the manifest spells it, from pydantic's JSON schema."""
    if "enum" in schema or "const" in schema:
        return "|".join(schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind.get("type") != "null"]
        nullable = len(kinds) < len(schema["anyOf"])
        return "|".join(map(_spelled, kinds)) + ("?" if nullable else "")
    if "$ref" in schema:
        return "mapping"
    if schema["type"] == "array":
        return f"[{_spelled(schema['items'])}]"
    if schema["type"] == "object":
        return f"{{str: {_spelled(schema['additionalProperties'])}}}"
    return SPELLING[schema["type"]]


def test_the_manifest_as_defaults_changes_nothing() -> None:
    """A project that copies the manifest's parameters into a configuration gets the defaults."""
    values = {
        name: {key: parameter["default"] for key, parameter in parameters.items()}
        for name, parameters in _listed()
    }
    redteam = values.pop("redteam")
    assert GuardConfig.model_validate(values) == GuardConfig()
    assert GuardConfig.model_validate({"redteam": redteam}).redteam == _section("redteam")()


def test_the_generator_has_nothing_to_change() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "manifest.py", "--check"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ── The metadata ────────────────────────────────────────────────────────────────────────────────


def test_the_base_is_the_trust_core() -> None:
    names = {item.split(">")[0].split("[")[0] for item in PROJECT["dependencies"]}
    core = {"click", "cryptography", "numpy", "onnx", "pydantic", "pyyaml", "rich", "scipy"}
    assert names == core


def test_one_onnxruntime_on_any_machine() -> None:
    rows = [item for item in PROJECT["optional-dependencies"]["all"] if "onnxruntime" in item]
    assert sorted(row.split(">")[0] for row in rows) == ["onnxruntime", "onnxruntime-gpu"]
    from packaging.requirements import Requirement

    for system in ("linux", "darwin", "win32"):
        for machine in ("x86_64", "AMD64", "aarch64", "arm64"):
            environment = {"sys_platform": system, "platform_machine": machine}
            markers = [Requirement(row).marker for row in rows]
            wanted = [m for m in markers if m is not None and m.evaluate(environment)]
            assert len(wanted) == 1, (system, machine)


def test_the_licence_is_the_one_declared() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_console_script_is_a_function() -> None:
    from importlib import import_module

    module, _, name = PROJECT["scripts"]["kdguard"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_the_documents_that_people_look_for_exist() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ARCHITECTURE.md", "MLproject"):
        assert (ROOT / name).is_file(), name


# ── The wheel, alone ────────────────────────────────────────────────────────────────────────────


def _run(*command: str | Path, timeout: float = 600, **options: Any) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing is written into the tree."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "README.md").write_text("The wheel needs one; its own test asks that it exists.\n")
    for name in ("pyproject.toml", "LICENSE", "plugin.yaml"):
        shutil.copy(ROOT / name, tree / name, follow_symlinks=False)
    for name in ("mlflow_kdguard", "cli"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--wheel", "--outdir", out, tree, cwd=out)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_sources_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        manifest = archive.read("mlflow_kdguard/plugin.yaml")
    assert manifest == (ROOT / "plugin.yaml").read_bytes()
    tops = {name.split("/")[0] for name in names}
    info = f"mlflow_kdguard-{PROJECT['version']}.dist-info"
    assert tops == {"mlflow_kdguard", "mlflow_kdguard_cli", info}
    assert {"mlflow_kdguard/py.typed", "mlflow_kdguard_cli/py.typed"} <= set(names)
    for source, prefix in ((ROOT, "mlflow_kdguard"), (ROOT / "cli", "mlflow_kdguard_cli")):
        for path in (source / prefix).rglob("*.py"):
            assert str(path.relative_to(source)) in names


@pytest.fixture(scope="module")
def empty_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and its base dependencies only."""
    place = tmp_path_factory.mktemp("empty") / "v"
    venv.create(place, with_pip=True)
    done = subprocess.run(
        [place / "bin" / "pip", "install", "--quiet", wheel],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    require("registry", done.returncode == 0, f"pip could not install the base: {done.stderr}")
    return place


def _quiet() -> dict[str, str]:
    dropped = ("COV", "PYTHON", "MLFLOW")
    return {key: value for key, value in os.environ.items() if not key.startswith(dropped)}


@pytest.mark.slow
def test_the_base_has_neither_torch_nor_mlflow(empty_environment: Path) -> None:
    listed = _run(empty_environment / "bin" / "pip", "list", "--format=json", env=_quiet())
    names = {row["name"].lower() for row in json.loads(listed)}
    assert "mlflow-kdguard" in names
    assert not {n for n in names if n.startswith(("torch", "mlflow")) and n != "mlflow-kdguard"}
    assert not {n for n in names if n.startswith(("onnxruntime", "gurobi", "highs", "pandas"))}


@pytest.mark.slow
def test_help_of_the_installed_command_answers_at_once(empty_environment: Path) -> None:
    program = empty_environment / "bin" / "kdguard"
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        text = _run(program, "--help", env=_quiet())
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= 5 and min(seconds) < 0.3:
            break
    assert "check" in text
    assert min(seconds) < 0.3


@pytest.mark.slow
def test_a_certificate_is_checked_with_the_base_alone(
    empty_environment: Path, tmp_path: Path
) -> None:
    """Key, certificate, check, and a flipped byte: all without torch and mlflow."""
    for name in ("torch", "mlflow", "onnxruntime"):
        tried = [empty_environment / "bin" / "python", "-c", f"import {name}"]
        assert subprocess.run(tried, env=_quiet(), capture_output=True, check=False).returncode
    program = empty_environment / "bin" / "kdguard"
    here: dict[str, Any] = {"env": _quiet(), "cwd": tmp_path}
    for name in ("model", "teacher", "reference"):
        (tmp_path / f"{name}.onnx").write_bytes(name.encode() * 100)
    _run(program, "keygen", "key.pem", "--owner", "tests", **here)
    _run(
        *(program, "attest", "model.onnx", "--teacher", "teacher.onnx"),
        *("--reference", "reference.onnx", "--model-name", "student", "--key", "key.pem"),
        **here,
    )
    check = [program, "check", "certificate.dsse.json", "--model", "model.onnx"]
    check += ["--key", "key.pem.pub", "--json"]
    answer = json.loads(_run(*check, **here))
    assert answer["subjects"][0]["path"] == "model.onnx"
    (tmp_path / "model.onnx").write_bytes(b"M" + (tmp_path / "model.onnx").read_bytes()[1:])
    done = subprocess.run(check, capture_output=True, text=True, check=False, **here)
    assert done.returncode == CertificateError.exit_code
    assert "model.onnx" in done.stderr
    assert "Traceback" not in done.stderr
