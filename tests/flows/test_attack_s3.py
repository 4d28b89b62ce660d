"""Attempts on a store of objects: presigned and multipart uploads, foreign buckets, odd keys.

The store is moto's server, a local double of S3; nothing leaves the machine.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

import toys
from flows.attacks.opened import SLOWEST, gated, timed
from flows.attacks.races import together
from flows.attacks.settled import SERVED
from flows.attacks.world import Version, World, files
from flows.servers import PATIENCE, free_port, kill_group
from mlflow_kdguard.files import sha256
from requirements import require

pytestmark = pytest.mark.slow

LOGIN = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
EVIL = toys.onnx_tiny(shape=(1, 8, 8), classes=10, seed=66)


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[str]:
    """A local double of S3 with four buckets; yields its endpoint."""
    require("s3", importlib.util.find_spec("moto") is not None, "moto is not installed")
    endpoint = f"http://127.0.0.1:{(port := free_port())}"
    with (folder / "moto.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | LOGIN,
        )  # fmt: skip
    try:
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{endpoint}/moto-api/", timeout=5).ok:
                    break
            assert time.monotonic() < end, (folder / "moto.log").read_text()
            time.sleep(0.2)
        for bucket in ("artifacts", "artifacts-evil", "content", "somebody-else"):
            owner(endpoint).create_bucket(Bucket=bucket)
        yield endpoint
    finally:
        kill_group(process)


def owner(endpoint: str) -> Any:
    """Whoever may write to every bucket."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=LOGIN["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=LOGIN["AWS_SECRET_ACCESS_KEY"],
        region_name=LOGIN["AWS_DEFAULT_REGION"],
    )


class Objects(World):
    """A world whose artifacts and promoted copies are objects."""

    endpoint = ""

    def key(self, uri: str) -> str:
        """Bucket and key behind a location."""
        if uri.startswith(SERVED):
            return f"content/promoted/{uri.removeprefix(SERVED).strip('/')}"
        if uri.startswith("mlflow-artifacts:"):
            return f"artifacts/proxied/{uri.partition(':')[2].strip('/')}"
        assert uri.startswith("s3://"), uri
        return uri.removeprefix("s3://").strip("/")

    def put(self, uri: str, content: Mapping[str, bytes]) -> None:
        """Write objects as the bucket's owner."""
        bucket, _, key = self.key(uri).partition("/")
        for path, data in content.items():
            owner(self.endpoint).put_object(Bucket=bucket, Key=f"{key}/{path}", Body=data)

    def fetched(self, uri: str, path: str = "model.onnx") -> str:
        """SHA-256 of an object."""
        bucket, _, key = self.key(uri).partition("/")
        found = owner(self.endpoint).get_object(Bucket=bucket, Key=f"{key}/{path}")
        return sha256(found["Body"].read())

    def stored(
        self, *, location: str | None = None, seed: int = 0, name: str | None = None,
        certified: bool = True,
    ) -> Version:  # fmt: skip
        """A version whose files are objects; `location`: of the experiment that it comes from."""
        name, content = name or self.name(), files(seed)
        experiment = self.experiment
        if location is not None:
            experiment = self.made(
                "experiments/create", name=self.name(), artifact_location=location
            )["experiment_id"]
        run = self.made("runs/create", experiment_id=experiment)["run"]["info"]
        place = f"{run['artifact_uri']}/student"
        self.put(place, content)
        made = self.created(name, place, run["run_id"], {})
        assert made.ok, made.text
        number = str(made.json()["model_version"]["version"])
        version = Version(name, number, run["run_id"], content, Path(), place)
        if certified:
            self.certify(version)
        return version

    def promoted(self, **how: Any) -> Version:
        version = self.stored(**how)
        answer = self.alias(version)
        assert answer.ok, f"the control did not pass: {answer.text}"
        return version

    def unmoved(self, version: Version) -> None:
        """The champion is what it was, and serves what was certified."""
        assert self.held(version.name) == version.number
        location = self.location(version)
        assert self.key(location).startswith("content/promoted/")
        assert self.fetched(location) == sha256(version.files["model.onnx"])


@pytest.fixture(params=[False, True], ids=["plain", "app"], scope="module")
def w(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Objects]:
    folder = tmp_path_factory.mktemp("s3")
    content = {"root": "s3://content/promoted"}
    if request.param:
        content["clients"] = SERVED
    with (
        object_store(folder) as endpoint,
        gated(
            folder / "w",
            f"sqlite:///{folder / 'mlflow.db'}",
            app=request.param,
            options=("--artifacts-destination", "s3://artifacts/proxied"),
            environment=LOGIN | {"MLFLOW_S3_ENDPOINT_URL": endpoint},
            allow=["mlflow-artifacts:/", "s3://artifacts/"],
            content=content,
            kind=Objects,
        ) as world,
    ):
        assert isinstance(world, Objects)
        world.endpoint = endpoint
        yield world


def refused(w: World, version: Version, *says: str) -> None:
    before = w.state()
    answer, seconds = timed(lambda: w.alias(version))
    assert answer.status_code == 403, answer.text
    assert all(words in answer.text for words in says), answer.text
    assert w.state() == before
    assert seconds < SLOWEST


PLACES = {"proxied": None, "direct": "s3://artifacts/direct"}


@pytest.mark.parametrize("location", PLACES.values(), ids=PLACES.keys())
def test_objects_that_change_before_promotion_are_refused_and_after_it_do_not_matter(
    w: Objects, location: str | None
) -> None:
    version = w.promoted(location=location)
    w.put(version.source, {"model.onnx": EVIL, "extra.py": b"import os"})
    w.unmoved(version)
    bad = w.stored(location=location)
    w.put(bad.source, {"model.onnx": EVIL})
    refused(w, bad, "model.onnx")
    more = w.stored(location=location)
    w.put(more.source, {"code/evil.py": b"import os"})
    refused(w, more, "code/evil.py")


def test_an_upload_url_that_was_signed_before_the_promotion_changes_nothing(w: Objects) -> None:
    version = w.stored(location="s3://artifacts/signed")
    body = {"run_id": version.run_id, "path": "student/model.onnx"}
    signed = w.call("artifacts/presigned-upload-url", body)
    assert signed.ok, signed.text
    assert w.alias(version).ok
    url = signed.json()["presigned_url"]
    assert requests.put(url, data=EVIL, headers=signed.json().get("headers"), timeout=10).ok
    assert w.fetched(version.source) == sha256(EVIL), "the trap is real"
    w.unmoved(version)


def test_no_upload_url_is_signed_for_what_is_promoted(w: Objects) -> None:
    version = w.promoted(location="s3://artifacts/later")
    for path in ("student/model.onnx", "student/code/evil.py", "student//model.onnx"):
        body = {"run_id": version.run_id, "path": path}
        answer = w.call("artifacts/presigned-upload-url", body)
        assert answer.status_code in ((400, 403) if w.app else (200, 400)), answer.text
    twice = {"runId": version.run_id, "run_id": version.run_id, "path": "student/model.onnx"}
    assert w.call("artifacts/presigned-upload-url", twice).status_code in (400, 403)
    w.unmoved(version)


def test_no_multipart_upload_replaces_what_is_promoted(w: Objects) -> None:
    version = w.stored()
    folder = version.source.partition(":")[2].strip("/")
    api = "/api/2.0/mlflow-artifacts/"
    begun = w.call(f"mpu/create/{folder}", {"path": "model.onnx", "num_parts": 1}, api=api)
    assert begun.ok, begun.text
    upload = begun.json()
    part = requests.put(upload["credentials"][0]["url"], data=EVIL, timeout=10)
    assert part.ok
    assert w.alias(version).ok
    done = {
        "path": "model.onnx", "upload_id": upload["upload_id"],
        "parts": [{"part_number": 1, "etag": part.headers["ETag"]}],
    }  # fmt: skip
    answer = w.call(f"mpu/complete/{folder}", done, api=api)
    assert answer.status_code == (403 if w.app else 200), answer.text
    w.unmoved(version)
    begun = w.call(f"mpu/create/{folder}", {"path": "model.onnx", "num_parts": 1}, api=api)
    assert begun.status_code == (403 if w.app else 200), begun.text
    put = w.http.put(f"{w.server.uri}{api}artifacts/{folder}/model.onnx", data=EVIL, timeout=30)
    assert put.status_code == (403 if w.app else 200), put.text
    w.unmoved(version)


SOURCES = (
    "s3://somebody-else/x",
    "s3://artifacts-evil/x",
    "s3://content/evil/x",
    "S3://somebody-else/x",
    "s3://artifacts/../somebody-else/x",
    "s3://artifacts/%2e%2e/somebody-else/x",
    "s3://artifacts@somebody-else/x",
    "s3://artifacts:80@somebody-else/x",
    "s3://artifacts\\@somebody-else/x",
    "s3://artifacts#@somebody-else/x",
    "s3a://somebody-else/x",
    "s3://somebody-else/x?versionId=1",
)


@pytest.mark.parametrize("source", SOURCES)
def test_a_foreign_bucket_is_refused_whatever_lies_in_it(w: Objects, source: str) -> None:
    """The bytes there are the certified ones: the place alone refuses."""
    base = w.stored(certified=False)
    for bucket in ("somebody-else", "artifacts-evil", "content/evil"):
        w.put(f"s3://{bucket}/x", base.files)
    made = w.created(
        base.name, source, base.run_id, {"kdguard.certificate": w.certificate(base).decode()}
    )
    assert made.status_code < 500, made.text
    if not made.ok:
        return
    number = str(made.json()["model_version"]["version"])
    refused(w, Version(base.name, number, "", base.files, Path(), ""), "allow")


def test_an_experiment_in_the_bucket_of_copies_cannot_write_there(w: Objects) -> None:
    good = w.promoted(seed=4)
    digest = w.key(w.location(good)).rpartition("/")[2]
    for location in ("s3://content/promoted", f"s3://content/promoted/{digest}", "s3://content"):
        made = w.call("experiments/create", {"name": w.name(), "artifact_location": location})
        if not made.ok:
            assert made.status_code == 403, made.text
            continue
        run = w.made("runs/create", experiment_id=made.json()["experiment_id"])["run"]["info"]
        for path in ("model.onnx", f"../../{digest}/model.onnx", f"promoted/{digest}/model.onnx"):
            body = {"run_id": run["run_id"], "path": path}
            signed = w.call("artifacts/presigned-upload-url", body)
            assert signed.status_code < 500, signed.text
            if signed.ok:
                url = signed.json()["presigned_url"]
                requests.put(url, data=EVIL, headers=signed.json().get("headers"), timeout=10)
            w.unmoved(good)


def test_two_workers_that_copy_the_same_bytes_agree(w: Objects) -> None:
    one, two = w.stored(seed=5), w.stored(seed=5)
    answers = together(lambda: w.alias(one), lambda: w.alias(two))
    assert [a.status_code for a in answers] == [200, 200], [a.text for a in answers]
    w.unmoved(one)
    w.unmoved(two)


def test_a_store_that_does_not_answer_is_a_refusal_within_seconds(w: Objects) -> None:
    version = w.stored(certified=False)
    made = w.created(
        version.name, "s3://artifacts/nothing/here", version.run_id,
        {"kdguard.certificate": w.certificate(version).decode()},
    )  # fmt: skip
    assert made.ok, made.text
    number = str(made.json()["model_version"]["version"])
    refused(w, Version(version.name, number, "", version.files, Path(), ""))
