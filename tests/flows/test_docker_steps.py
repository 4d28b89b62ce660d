"""The server image's steps, carried out natively, and the composition around it on loopback.

The image is built from its Dockerfile's own steps; its user is the unprivileged one of the image.
The server then runs with the command, the variables, the settings and the secrets of
`docker/compose.yaml`; PostgreSQL is a real one, the bucket that of a local S3 double.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import certificates as c
import dockerfiles as d
from flows import gates
from flows.natively import Native, build, writable
from flows.operators import PINNED, passing, toy_bundle
from flows.pages import blocks
from flows.servers import MlflowServer, free_port, kill_group
from mlflow_kdguard import attest
from mlflow_kdguard.artifacts import CERTIFICATE
from mlflow_kdguard.attest import Signer, signing

pytestmark = [pytest.mark.slow, pytest.mark.postgres]

SERVICE: dict[str, Any] = yaml.safe_load((d.DOCKER / "compose.yaml").read_text())["services"][
    "server"
]
SECRETS = yaml.safe_load((d.DOCKER / "compose.yaml").read_text())["secrets"]
BUCKET = "mlflow"


@dataclass
class Composed:
    """The composition, running: its server, its client, and the image that it runs from."""

    image: Native
    server: MlflowServer
    client: MlflowClient
    verifier: Signer
    bucket: Any

    def health(self) -> subprocess.CompletedProcess[str]:
        """Run the image's own health check."""
        return subprocess.run(
            [*self.image.prefix(), *self.image.words("HEALTHCHECK")],
            env=self.image.environment | {"MLFLOW_PORT": self.server.uri.rpartition(":")[2]},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def image() -> Iterator[Native]:
    """The server image, in a folder that its user can reach (pytest's own are closed)."""
    with tempfile.TemporaryDirectory(prefix="kdguard-image-") as folder:
        Path(folder).chmod(0o755)
        root = Path(folder, "root")
        root.mkdir()
        yield build(d.DOCKER / "server.Dockerfile", "server", root)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A versioned bucket with object lock, made as docs/operations/storage.md says."""
    import boto3

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (tmp_path_factory.mktemp("moto") / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for_port(port)
        account = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "bucket",
            "AWS_SECRET_ACCESS_KEY": "of the test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "BUCKET": BUCKET,
        }
        with gates._environment(account):
            page = d.ROOT / "docs" / "operations" / "storage.md"
            [script] = [block.text for block in blocks(page) if block.language == "python"]
            exec(compile(script, page.name, "exec"), {})
            client = boto3.client("s3")
        yield client
    finally:
        kill_group(process)


@pytest.fixture(scope="module")
def composed(image: Native, bucket: Any, postgres_uri: str) -> Iterator[Composed]:
    """The service `server` of compose.yaml, on loopback."""
    import psycopg2

    host = postgres_uri.rpartition("@")[2].partition("/")[0]
    name, port = f"composed_{secrets.token_hex(4)}", free_port()
    with contextlib.closing(
        psycopg2.connect(
            host="127.0.0.1", port=host.rpartition(":")[2], user="kdguard", dbname="postgres"
        )
    ) as connection:
        connection.autocommit = True
        connection.cursor().execute(f"CREATE DATABASE {name}")
    places = {
        "database/mlflow": f"{host}/{name}",
        "http://objects:9000": str(bucket.meta.endpoint_url),
        "=0.0.0.0": "=127.0.0.1",
        "localhost:5000": f"127.0.0.1:{port}",
        "5000": str(port),
    }
    _settings(image, places)
    verifier = signing.keygen(
        image.root / "vic.pem", owner="Vic", role="verifier", now=datetime(2020, 1, 1, tzinfo=UTC)
    )
    (image.root / "etc/kdguard/keys/vic.pub").write_bytes(verifier.verifier.to_bytes())
    with _running(image, places, port) as server, _signed_in(image):
        yield Composed(image, server, MlflowClient(server.uri, server.uri), verifier, bucket)


def _settings(image: Native, places: dict[str, str]) -> None:
    """What the operator makes on the host: settings, a log key, secrets."""
    place = image.root / "etc/kdguard"
    shutil.copytree(d.DOCKER / "settings", place)
    for file in (path for path in place.iterdir() if path.is_file()):
        file.write_text(_translated(image, places, file.read_text()))
    stated = yaml.safe_load((place / "server.yaml").read_text())
    (place / "policy.yaml").write_text(yaml.safe_dump(PINNED))
    (place / stated["keys"]).mkdir(exist_ok=True)
    signing.keygen(place / stated["log"]["key"], owner="the server", role="builder")
    os.chown(place / stated["log"]["key"], 10001, 10001)
    folder = image.root / "run/secrets"
    folder.mkdir(parents=True)
    for name in SECRETS:
        (folder / name).write_text(f"{name}-{secrets.token_hex(8)}\n")
        (folder / name).chmod(0o444)
    (folder / "bucket_credentials").write_text(
        "[default]\naws_access_key_id = bucket\naws_secret_access_key = of the test\n"
    )


def _translated(image: Native, places: dict[str, str], text: str) -> str:
    for old, new in places.items():
        text = text.replace(old, new)
    return image.here(text)


@contextlib.contextmanager
def _running(image: Native, places: dict[str, str], port: int) -> Iterator[MlflowServer]:
    given = {key: _translated(image, places, v) for key, v in SERVICE["environment"].items()}
    command = [_translated(image, places, word) for word in SERVICE["command"]]
    log = image.root.parent / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*image.prefix(), *image.words("ENTRYPOINT"), *command],
            env=image.environment | given,
            cwd=image.root / "tmp",
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = MlflowServer(f"http://127.0.0.1:{port}", image.root.parent, process)
    try:
        deadline = time.monotonic() + 600
        while not _answers(f"{server.uri}/health/ready"):
            assert process.poll() is None, server.log[-5000:]
            assert time.monotonic() < deadline, server.log[-5000:]
            time.sleep(0.3)
        yield server
    finally:
        kill_group(process)


def _answers(uri: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(uri, timeout=5).ok
    return False


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError("the S3 double did not start")


@contextlib.contextmanager
def _signed_in(image: Native) -> Iterator[None]:
    password = (image.root / "run/secrets/admin_password").read_text().strip()
    with gates._environment(
        {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
    ):
        yield


# ── The image ───────────────────────────────────────────────────────────────────────────────────


def test_the_image_holds_the_server_and_no_tools(image: Native) -> None:
    python = image.root / "opt/kdguard/bin/python"
    listed = subprocess.run(
        [*image.prefix(), python, "-c", _PACKAGES], capture_output=True, text=True, check=True
    )
    found = dict(json.loads(listed.stdout))
    assert found.pop("mlflow-kdguard")
    assert found == d.pins("server"), "exactly what is pinned"
    assert {"pip", "setuptools", "torch", "onnxruntime"}.isdisjoint(found)
    assert sorted(path.name for path in image.root.iterdir()) == [
        "opt", "src", "srv", "tmp", "usr", "var",
    ]  # fmt: skip
    assert not list((image.root / "src").iterdir())


_PACKAGES = """
import importlib.metadata, json, re
rows = importlib.metadata.distributions()
print(json.dumps([(re.sub(r"[-_.]+", "-", r.name).lower(), r.version) for r in rows]))
"""


def test_its_user_may_write_to_volumes_only(image: Native) -> None:
    assert writable(image.root, image.prefix()) == ["srv/kdguard-content", "tmp", "var/lib/kdguard"]


# ── The composition ─────────────────────────────────────────────────────────────────────────────


def test_a_toy_version_is_refused_and_promoted(composed: Composed) -> None:
    assert composed.health().returncode == 0
    gate = gates.Gate(composed.server, None, composed.client, "")  # type: ignore[arg-type]
    files = toy_bundle()
    version, _ = gate.registered("toy", files)
    with pytest.raises(MlflowException, match="PERMISSION_DENIED"):
        gate.promote("toy", version)
    certificate = passing(files, name="toy", registry=composed.server.uri)
    gate.certify("toy", version, attest.issue(certificate, composed.verifier))
    gate.promote("toy", version)
    assert gate.alias("toy") == version
    assert gate.location("toy", version).startswith("mlflow-artifacts:/kdguard-content/")
    assert CERTIFICATE in composed.client.get_model_version("toy", version).tags
    content = composed.image.root / "srv/kdguard-content"
    kept = {str(p.relative_to(content)) for p in content.rglob("*") if p.is_file()}
    assert {name.partition("/")[2] for name in kept} == set(files)
    heads = composed.image.root / "var/lib/kdguard/log-head.jsonl"
    assert len(heads.read_text().splitlines()) == 3, "settings, refusal, promotion"


def test_an_overwrite_in_the_bucket_keeps_what_was_there(composed: Composed) -> None:
    """Versioning: whoever writes past the registry leaves the bytes that were checked."""
    listed = composed.bucket.list_objects_v2(Bucket=BUCKET, Prefix="artifacts/")["Contents"]
    key = next(row["Key"] for row in listed if row["Key"].endswith("model.onnx"))
    before = composed.bucket.get_object(Bucket=BUCKET, Key=key)
    old = before["Body"].read()
    assert before["ObjectLockMode"] == "GOVERNANCE"
    composed.bucket.put_object(Bucket=BUCKET, Key=key, Body=b"other bytes")
    composed.bucket.delete_object(Bucket=BUCKET, Key=key)
    again = composed.bucket.get_object(Bucket=BUCKET, Key=key, VersionId=before["VersionId"])
    assert again["Body"].read() == old
    with pytest.raises(composed.bucket.exceptions.ClientError, match="AccessDenied"):
        composed.bucket.delete_object(Bucket=BUCKET, Key=key, VersionId=before["VersionId"])


def test_no_secret_is_seen_from_outside(composed: Composed) -> None:
    """Not on a command line, and not in what the server logs."""
    lines = [
        line
        for process in Path("/proc").iterdir()
        if process.name.isdigit() and "kdguard+postgresql" in (line := _command_line(process))
    ]
    assert lines
    for path in (composed.image.root / "run/secrets").iterdir():
        secret = path.read_text().strip()
        assert not [line for line in lines if secret in line]
        assert secret not in composed.server.log


def _command_line(process: Path) -> str:
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_text(errors="replace")
    return ""


def test_the_health_check_notices_a_server_that_cannot_judge(composed: Composed) -> None:
    settings = composed.image.root / "etc/kdguard/server.yaml"
    good = settings.read_text()
    settings.write_text("version: nothing\n")
    try:
        assert composed.health().returncode != 0
    finally:
        settings.write_text(good)
    assert composed.health().returncode == 0
    assert c.TEST.sha256 in (settings.parent / "policy.yaml").read_text()
