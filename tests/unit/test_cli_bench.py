"""`kdguard bench`: it finds the checkout's benchmarks, hands on arguments, tells how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KDGUARD = (sys.executable, "-c", "from mlflow_kdguard_cli.main import main; main()")
ECHO = "import sys\nprint(sys.argv[1:])\nsys.exit(int(sys.argv[-1]))\n"
WAIT = "import time\nprint('there', flush=True)\ntime.sleep(60)\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in (("echo", ECHO), ("wait", WAIT)):
        folder = tmp_path / "benchmarks" / name
        folder.mkdir(parents=True)
        (folder / "__main__.py").write_text(text)
    (tmp_path / "inside").mkdir()
    return tmp_path


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*KDGUARD, "bench", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("ended", "code"), [("0", 0), ("2", 2), ("7", 1)])
def test_arguments_are_handed_on_and_the_end_is_told(checkout: Path, ended: str, code: int) -> None:
    done = bench(checkout / "inside", "echo", "--json", "--rows", "a b", ended)
    assert done.returncode == code
    assert done.stdout.strip() == str(["--json", "--rows", "a b", ended])


def test_json_is_one_document(checkout: Path) -> None:
    done = bench(checkout, "--json", "echo", "0")
    assert json.loads(done.stdout) == {
        "schema": "kdguard.bench/1", "name": "echo", "arguments": ["0"], "ran": True,
    }  # fmt: skip
    assert "['0']" in done.stderr


@pytest.mark.parametrize("name", ["nothing", "../echo", "echo.__main__"])
def test_a_name_that_is_not_there_is_told_with_those_that_are(checkout: Path, name: str) -> None:
    done = bench(checkout, name)
    assert done.returncode == 2
    assert "echo, wait" in done.stderr


def test_outside_of_a_checkout_it_says_where_benchmarks_are(tmp_path: Path) -> None:
    done = bench(tmp_path, "guard")
    assert done.returncode == 2
    assert "come with the sources" in done.stderr


def test_ctrl_c_ends_the_benchmark_too(checkout: Path) -> None:
    command = [*KDGUARD, "bench", "wait"]
    process = subprocess.Popen(
        command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began < 20
