"""The house rules that a reader relies on, checked over every file of the package."""

import ast
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "mlflow_kdguard", ROOT / "cli" / "mlflow_kdguard_cli"]
FILES = sorted(path for source in SOURCES for path in source.rglob("*.py"))
LONGEST_FILE = 300
LONGEST_FUNCTION = 50
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "core", "base_utils"}

TRUST_CORE = (
    "errors",
    "files",
    "plain_yaml",
    "draw",
    "intervals",
    "records",
    "bundle",
    "artifacts",
    "extensions",
    "config",
    "policy",
    "ledger",
    "graph",
    "proof",
    "attest",
    "gate",
)
HEAVY = (
    "torch",
    "torchvision",
    "mlflow",
    "onnxruntime",
    "gurobipy",
    "highspy",
    "sklearn",
    "mlxtend",
    "matplotlib",
    "pandas",
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def test_the_sources_are_found() -> None:
    assert len(FILES) > 10


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_file_and_no_function_is_long(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    long = {
        function.name: function.end_lineno - function.lineno + 1
        for function in _functions(ast.parse(text))
        if function.end_lineno and function.end_lineno - function.lineno >= LONGEST_FUNCTION
    }
    assert not long


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_names_say_something(path: Path) -> None:
    assert path.stem not in VAGUE
    assert path.parent.name not in VAGUE


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_only_render_prints(path: Path) -> None:
    if path.name == "render.py" and path.parent.name == "mlflow_kdguard_cli":
        return
    names = {n.id for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Name)}
    assert "print" not in names


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.is_relative_to(ROOT / "mlflow_kdguard")], ids=_name
)
def test_everything_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    bare = [] if ast.get_docstring(tree) else ["(module)"]
    bare += [
        node.name
        for node in tree.body
        if isinstance(node, Function | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare


def test_a_module_and_a_package_never_share_a_name() -> None:
    for path in FILES:
        assert not path.with_suffix("").is_dir(), f"{path} is shadowed by a folder"


def test_every_folder_with_modules_is_a_package() -> None:
    """Without `__init__.py` a folder would be left out of the wheel."""
    for folder in {path.parent for path in FILES}:
        assert (folder / "__init__.py").is_file(), f"{_name(folder)} has no __init__.py"


# ── What importing costs ────────────────────────────────────────────────────────────────────────


def _core_modules() -> list[str]:
    found = []
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "mlflow_kdguard" or len(parts) < 2 or parts[1] not in TRUST_CORE:
            continue
        found.append(".".join(part for part in parts if part != "__init__"))
    return ["mlflow_kdguard", *found]


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with the sources on its path and no coverage measurement."""
    quiet = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "cli")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=quiet | {"PYTHONPATH": path},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


IMPORTED = """
import importlib, sys
heavy = sys.argv[1].split(",")
for name in sys.argv[2].split(","):
    importlib.import_module(name)
    found = sorted({module.partition(".")[0] for module in sys.modules} & set(heavy))
    if found:
        sys.exit(f"importing {name} brought in {', '.join(found)}")
"""


def test_the_trust_core_imports_nothing_heavy() -> None:
    """An auditor checks a certificate where neither torch nor mlflow is installed."""
    done = _python(IMPORTED, ",".join(HEAVY), ",".join(_core_modules()))
    assert done.returncode == 0, done.stderr


ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_the_trust_core_imports_where_the_rest_is_not_installed() -> None:
    """A guarded import (`try: import torch`) would pass here and fail above; both must hold."""
    done = _python(ABSENT + IMPORTED, ",".join(HEAVY), ",".join(_core_modules()))
    assert done.returncode == 0, done.stderr


def test_a_gated_store_brings_in_no_torch() -> None:
    """A registry server has the extra `gate` only; MLflow may bring what it likes, but not this."""
    absent = "torch,torchvision,onnxruntime,gurobipy,highspy,sklearn,mlxtend,matplotlib"
    modules = "mlflow_kdguard.plugin.store.sql,mlflow_kdguard.plugin.store.rest"
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        + ABSENT
        + IMPORTED
        + "assert not [m for m in sys.modules if m.startswith('mlflow_kdguard.pipeline')]\n"
        + "assert not [m for m in sys.modules if m.startswith('mlflow_kdguard.flow')]\n"
    )
    done = _python(code, absent, modules)
    assert done.returncode == 0, done.stderr


def test_the_front_door_is_lazy() -> None:
    done = _python(
        "import sys, mlflow_kdguard as k\n"
        "assert 'pydantic' not in sys.modules, 'pydantic'\n"
        "assert k.KDGuardError.exit_code == 1\n"
        "assert k.GuardConfig().run.seed == 0\n"
        "assert set(k.__all__) <= set(dir(k))\n"
        "try: k.absent\n"
        "except AttributeError as error: assert 'absent' in str(error)\n"
        "else: raise SystemExit('absent was found')\n"
    )
    assert done.returncode == 0, done.stderr


HELP = """
import sys
from mlflow_kdguard_cli.main import main
sys.argv = ["kdguard", "--help"]
try:
    main()
finally:
    sys.stderr.write(" ".join(sys.modules))
"""


def _has_command_line() -> bool:
    return importlib.util.find_spec("mlflow_kdguard_cli.main") is not None


def test_help_answers_at_once() -> None:
    """Best of several: the machine may be busy, but no machine makes a slow program fast."""
    assert _has_command_line()
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        done = _python(HELP)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        if len(seconds) >= 5 and min(seconds) < 0.3:
            break
    assert "Commands" in done.stdout
    assert min(seconds) < 0.3


def test_help_imports_neither_torch_nor_pydantic() -> None:
    done = _python(HELP)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    assert "click" in loaded
    assert not loaded & {"pydantic", "numpy", "scipy", "onnx", "yaml", "cryptography", *HEAVY}


# ── What is kept in the repository ──────────────────────────────────────────────────────────────


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        return []
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_tracked_file_names_a_place_on_somebodys_machine() -> None:
    """Spelled in parts, so that this file does not name one itself."""
    places = [f"/{first}/{rest}" for first, rest in (("work", "main"), ("work", "shared"))]
    places += ["/" + "work/env", "/" + "root/", "/" + "home/"]
    for path in _tracked():
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 1_000_000:
            continue
        text = path.read_bytes().decode("utf-8", "replace")
        assert not [place for place in places if place in text], _name(path)


def test_the_repository_stays_small() -> None:
    for path in _tracked():
        if path.is_file():
            assert path.stat().st_size < 2_000_000, _name(path)


def test_links_point_to_files_of_the_repository() -> None:
    links = [path for path in _tracked() if path.is_symlink()]
    for link in links:
        assert link.resolve().is_file()
        assert link.resolve().is_relative_to(ROOT)
        assert not link.readlink().is_absolute()
