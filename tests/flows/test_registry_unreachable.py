"""Stores that are not there: one clear line within seconds, never minutes of retries."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.servers import free_port
from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.errors import RegistryError
from mlflow_kdguard.registry import Registry


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def refused(section: RegistrySection) -> str:
    start = time.monotonic()
    with pytest.raises(RegistryError) as caught:
        Registry(section)
    assert time.monotonic() - start < 15
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "https", "kdguard+http"])
def test_a_server_that_is_down(scheme: str) -> None:
    uri = f"{scheme}://127.0.0.1:{free_port()}"
    assert uri in refused(RegistrySection(tracking_uri=uri))


def test_a_server_that_does_not_answer(deaf_port: int) -> None:
    uri = f"http://127.0.0.1:{deaf_port}"
    assert uri in refused(RegistrySection(tracking_uri=uri))


def test_a_host_that_does_not_exist() -> None:
    assert "kdguard.invalid" in refused(RegistrySection(tracking_uri="http://kdguard.invalid:5000"))


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg2", "kdguard+postgresql"])
def test_a_database_that_is_down_and_its_password(scheme: str) -> None:
    port = free_port()
    uri = f"{scheme}://me:s3cret@127.0.0.1:{port}/mlflow"
    message = refused(RegistrySection(tracking_uri=uri))
    assert f"127.0.0.1:{port}/mlflow" in message
    assert "s3cret" not in message


def test_a_registry_that_is_down_beside_a_tracking_store_that_is_not(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    section = RegistrySection(tracking_uri=f"sqlite:///{tmp_path / 'm.db'}", registry_uri=uri)
    assert uri in refused(section)


def test_a_database_file_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    uri = f"sqlite:///{tmp_path / 'file' / 'm.db'}"
    assert uri in refused(RegistrySection(tracking_uri=uri))


def test_a_scheme_that_nobody_knows() -> None:
    assert "gopher" in refused(RegistrySection(tracking_uri="gopher://127.0.0.1/x"))


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "6")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'm.db'}")
    registry = Registry(RegistrySection())
    assert registry.identity == f"sqlite:///{tmp_path / 'm.db'}"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "6"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"
