"""A kill while MLflow makes its tables leaves no store that cannot be opened."""

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.registry import Registry
from mlflow_kdguard.registry.database import make_whole, sqlite_file


def test_only_sqlite_files_are_ours_to_make(tmp_path: Path) -> None:
    assert sqlite_file(f"sqlite:///{tmp_path / 'a.db'}") == tmp_path / "a.db"
    for uri in ("sqlite://", "sqlite:///:memory:", "http://127.0.0.1:1", "postgresql://h/d"):
        assert sqlite_file(uri) is None
        make_whole(uri)


def test_an_existing_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"somebody's")
    make_whole(f"sqlite:///{tmp_path / 'a.db'}")
    assert (tmp_path / "a.db").read_bytes() == b"somebody's"


@pytest.mark.slow
def test_killed_while_the_tables_are_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    code = (
        "import sys; from mlflow_kdguard.registry.database import make_whole; "
        "print('ready', flush=True); make_whole(sys.argv[1])"
    )
    for delay in (0.05, 0.3, 0.8):
        process = subprocess.Popen(
            [sys.executable, "-c", code, uri], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        (tmp_path / "store").mkdir(exist_ok=True)
    with Registry(RegistrySection(tracking_uri=uri)).run("after") as run:
        assert mlflow.MlflowClient(uri).get_run(run.id).info.status == "RUNNING"
    assert mlflow.MlflowClient(uri).get_run(run.id).info.status == "FINISHED"
