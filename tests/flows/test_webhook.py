"""examples/webhook on a real server: what it believes, and the decisions that it takes."""

import base64
import hashlib
import hmac
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import pytest
import requests
from cryptography.fernet import Fernet

import toys
from flows.servers import MlflowServer, free_port, kill_group, serving
from flows.stories import environment
from mlflow_kdguard.attest import signing
from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.registry import Registry

FILE = Path(__file__).parents[2] / "examples" / "webhook" / "receiver.py"
SECRET = "a secret of the operator's"


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("receiver", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["receiver"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@dataclass
class Listening:
    """A running receiver."""

    uri: str
    out: Path
    log: Path

    def decisions(self) -> list[dict[str, Any]]:
        return (
            [json.loads(x) for x in self.out.read_text().splitlines()] if self.out.exists() else []
        )

    def send(self, body: bytes, **changes: str) -> int:
        now, identity = (
            changes.get("timestamp", str(int(time.time()))),
            changes.get("id", os.urandom(8).hex()),
        )
        signed = f"{identity}.{now}.".encode() + body
        secret = changes.get("secret", SECRET)
        code = base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()
        headers = {
            "X-MLflow-Delivery-Id": changes.get("sent_id", identity),
            "X-MLflow-Timestamp": changes.get("sent_timestamp", now),
            "X-MLflow-Signature": changes.get("signature", f"v1,{code}"),
        }
        data = changes["sent"].encode() if "sent" in changes else body
        return requests.post(self.uri, data=data, headers=headers, timeout=10).status_code


@pytest.fixture(scope="module")
def webhook_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    settings = {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
    }
    with serving(tmp_path_factory.mktemp("webhooks"), environment=settings) as server:
        yield server


@pytest.fixture(scope="module")
def listening(
    webhook_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Listening]:
    folder = tmp_path_factory.mktemp("receiver")
    signing.keygen(folder / "key.pem", owner="tests", role="builder")
    port = free_port()
    found = Listening(f"http://127.0.0.1:{port}/", folder / "decisions.jsonl", folder / "log")
    argv = [sys.executable, str(FILE), "--port", str(port), "--key", str(folder / "key.pem.pub")]
    settings = {"MLFLOW_TRACKING_URI": webhook_server.uri, "KDGUARD_WEBHOOK_SECRET": SECRET}
    with found.log.open("wb") as log:
        process = subprocess.Popen(
            [*argv, "--out", str(found.out)],
            stderr=log,
            env=environment() | settings,
            start_new_session=True,
        )
    try:
        _until(lambda: "listening" in found.log.read_text())
        yield found
    finally:
        kill_group(process)


def _until(true: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


ALIAS = {"entity": "model_version_alias", "action": "created"}
ALIAS |= {"data": {"name": "x", "alias": "champion", "version": "1"}}  # type: ignore[dict-item]


def test_a_certificate_that_is_set_is_decided_about(
    webhook_server: MlflowServer, listening: Listening
) -> None:
    """MLflow signs and sends; the gate runs on exactly that version, and refuses it."""
    client = mlflow.MlflowClient(webhook_server.uri)
    client.create_webhook(
        "kdguard",
        listening.uri,
        ["model_version_tag.set", "model_version_alias.created"],
        secret=SECRET,
    )
    registry = Registry(RegistrySection(tracking_uri=webhook_server.uri))
    with registry.run("made") as run:
        made = registry.register_student(
            "student", toys.onnx_tiny(shape=(1, 8, 8), classes=10), run=run
        )
    registry.store_certificate(made.uri, b"{}")
    _until(lambda: len(listening.decisions()) == 1)
    assert "not believed" not in listening.log.read_text()
    (row,) = listening.decisions()
    assert (row["uri"], row["exit"]) == (made.uri, 3)
    assert row["answer"]["decision"] == "refuse"
    client.set_registered_model_alias("student", "staging", made.version)
    _until(lambda: len(listening.decisions()) == 2)
    assert client.test_webhook(client.list_webhooks()[0].webhook_id).success


def test_messages_that_are_not_believed(listening: Listening) -> None:
    before, body = len(listening.decisions()), json.dumps(ALIAS).encode()
    late, early = str(int(time.time()) - 900), str(int(time.time()) + 900)
    forged: list[dict[str, str]] = [
        {"secret": "another secret of sixteen"},
        {"signature": ""},
        {"signature": "v1,"},
        {"signature": "v1,not base64"},
        {"sent": body.decode().replace("champion", "production")},
        {"sent_id": "other"},
        {"sent_timestamp": str(int(time.time()) + 1)},
        {"timestamp": late},
        {"timestamp": early},
        {"timestamp": "nan"},
        {"timestamp": "-1"},
        {"timestamp": "9" * 400},
        {"id": ""},
    ]
    assert [listening.send(body, **changes) for changes in forged] == [401] * len(forged)
    assert listening.send(b'{"entity": "prompt"}', id="once") == 204
    assert listening.send(b'{"entity": "prompt"}', id="once") == 401, "a replay was believed"
    assert len(listening.decisions()) == before


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b'{"entity": "model_version_alias", "action": "created", "data": []}',
        json.dumps({**ALIAS, "data": {"name": "x", "version": "1 --policy /tmp/x"}}).encode(),
        json.dumps({**ALIAS, "data": {"name": 3, "version": "1"}}).encode(),
        json.dumps({**ALIAS, "action": "deleted"}).encode(),
        json.dumps(
            {"entity": "model_version_tag", "action": "set",
             "data": {"name": "x", "version": "1", "key": "other", "value": "x"}}
        ).encode(),
    ],
)  # fmt: skip
def test_messages_that_are_none_of_our_business(listening: Listening, body: bytes) -> None:
    assert listening.send(body) == 204


def test_a_body_that_is_too_long_is_not_read(listening: Listening) -> None:
    headers = {"Content-Length": str(1 << 30)}
    session = requests.Session()
    request = requests.Request("POST", listening.uri, headers=headers).prepare()
    request.headers["Content-Length"] = str(1 << 30)
    assert session.send(request, timeout=10).status_code == 413


def test_a_message_that_could_not_be_taken_may_come_again() -> None:
    receiver = _module()
    verifier = receiver.Verifier(SECRET.encode())
    now = str(int(time.time()))
    digest = hmac.new(SECRET.encode(), f"a.{now}.x".encode(), hashlib.sha256).digest()
    signature = f"v1,{base64.b64encode(digest).decode()}"
    verifier.check("a", now, signature, b"x")
    with pytest.raises(receiver.Refused, match="heard before"):
        verifier.check("a", now, signature, b"x")
    verifier.forget("a")
    verifier.check("a", now, signature, b"x")


def test_without_a_secret_it_does_not_listen() -> None:
    argv = [sys.executable, str(FILE), "--port", "0", "--key", "key.pub"]
    for secret in ({}, {"KDGUARD_WEBHOOK_SECRET": "short"}):
        done = subprocess.run(
            argv, env=environment() | secret, check=False, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "KDGUARD_WEBHOOK_SECRET" in done.stderr
