"""Attempts with the place that a version's files come from."""

import contextlib
import dataclasses
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

from flows.attacks.table import PLAIN, Attempt, Scene, attack, promotion
from flows.attacks.world import Version, World, files


class Ear:
    """A port that counts who connects; whatever connects is answered with nothing."""

    def __init__(self) -> None:
        self.heard = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._socket.accept()[0].close()
                self.heard += 1

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def listening() -> Iterator[Ear]:
    """Fails where somebody connected: a place is refused before any connection."""
    ear = Ear()
    try:
        yield ear
        assert ear.heard == 0, "a connection was made to a place outside the allow-list"
    finally:
        ear.close()


FOREIGN = {
    "http": "http://127.0.0.1:{port}/models/x",
    "https": "https://127.0.0.1:{port}/models/x",
    "http-with-credentials": "http://registry.example@127.0.0.1:{port}/x",
    "ftp": "ftp://127.0.0.1:{port}/x",
    "sftp": "sftp://127.0.0.1:{port}/x",
    "hdfs": "hdfs://127.0.0.1:{port}/x",
    "bucket": "s3://somebody-else/x",
    "bucket-upper-case": "S3://somebody-else/x",
    "bucket-prefix": "s3://somebody-else.example/x",
    "gs": "gs://somebody-else/x",
    "abfss": "abfss://c@127.0.0.1:{port}/x",
    "wasbs": "wasbs://c@127.0.0.1:{port}/x",
    "r2": "r2://bucket@127.0.0.1:{port}/x",
    "oss": "oss://somebody-else/x",
    "b2": "b2://somebody-else/x",
    "dbfs": "dbfs:/x",
    "link-local": "http://169.254.169.254/latest/meta-data",
    "link-local-by-number": "http://2852039166/latest",
    "artifacts-of-another-server": "mlflow-artifacts://127.0.0.1:{port}/x",
    "artifacts-over-http": "http://127.0.0.1:{port}/api/2.0/mlflow-artifacts/artifacts/x",
    "artifacts-with-credentials": "mlflow-artifacts://me:pw@127.0.0.1:{port}/x",
    "file": "file:///etc",
    "file-of-a-host": "file://127.0.0.1:{port}/etc",
    "file-upper-case": "FILE:///etc",
    "path": "/etc",
    "relative": "etc",
    "root": "/",
    "dots": "mlflow-artifacts:/../../../etc",
    "dots-encoded": "mlflow-artifacts:/%2e%2e/%2e%2e/etc",
    "dots-twice-encoded": "mlflow-artifacts:/%252e%252e/%252e%252e/etc",
    "slash-encoded": "mlflow-artifacts:/x%2f..%2f..%2fetc",
    "backslash": "mlflow-artifacts:/..\\..\\etc",
    "no-slash": "mlflow-artifacts:etc",
    "null": "mlflow-artifacts:/x%00/etc",
    "empty-path": "mlflow-artifacts:/",
    "query": "s3://somebody-else/x?endpoint_override=127.0.0.1:{port}",
    "no-uri": "http://[::1",
    "space": " ",
    "data": "data:text/plain,hello",
    "model-id": "models:/m-0123456789abcdef0123456789abcdef",
    "models-of-another-registry": "models://databricks@x/some/1",
    "alias-of-nobody": "models:/nobody@champion",
    "runs-of-nobody": "runs:/0123456789abcdef0123456789abcdef/student",
    "runs-of-a-host": "runs://127.0.0.1:{port}/x/student",
}


FAULTS_OF_MLFLOW = {FOREIGN["no-uri"]}
"""What the plain server answers with 500."""


@attack(12, variants=FOREIGN)
def foreign_source(w: World, template: str) -> Scene:
    """The server makes the version or does not; the alias it never gives."""
    with listening() as ear:
        name, tags = w.name(), {}
        base = dataclasses.replace(w.blank(), name=name)
        tags["kdguard.certificate"] = w.certificate(base).decode()
        made = w.created(name, template.format(port=ear.port), base.run_id, tags)
        assert made.status_code < 500 or template in FAULTS_OF_MLFLOW, made.text
        if made.ok:
            number = str(made.json()["model_version"]["version"])
            yield promotion(w, Version(name, number, "", base.files, base.folder, ""))
        else:
            yield Attempt(lambda: made, status=(400, 403, 404, PLAIN), logged=None)


def _sourced(w: World, name: str, source: str, run_id: str | None, **tags: str) -> Any:
    made = w.created(name, source, run_id, tags)
    assert made.status_code < 500, made.text
    return str(made.json()["model_version"]["version"]) if made.ok else made


def _asked(w: World, base: Version, found: Any, *says: str) -> Attempt:
    """A version that was not even made is as good as a refusal."""
    if not isinstance(found, str):
        return Attempt(lambda: found, status=(400, 403, 404), logged=None)
    return promotion(w, Version(base.name, found, "", base.files, base.folder, ""), *says)


@attack(12)
def run_of_an_experiment_in_a_foreign_bucket(w: World) -> Scene:
    """The source looks like one of ours; where it resolves to does not."""
    with listening():
        base = w.version()
        experiment = w.made(
            "experiments/create", name=f"foreign-{base.name}", artifact_location="s3://other/x"
        )["experiment_id"]
        run = w.made("runs/create", experiment_id=experiment)["run"]["info"]
        for source in (f"runs:/{run['run_id']}/student", f"{run['artifact_uri']}/student"):
            found = _sourced(
                w, base.name, source, run["run_id"],
                **{"kdguard.certificate": w.certificate(base).decode()},
            )  # fmt: skip
            yield _asked(w, base, found)


@attack(12)
def run_of_an_experiment_on_the_servers_disk(w: World) -> Scene:
    """An experiment may be anywhere on the server's disk; only the allow-list counts."""
    base, outside = w.version(), w.server.folder / "outside"
    experiment = w.made(
        "experiments/create", name=f"outside-{base.name}", artifact_location=outside.as_uri()
    )["experiment_id"]
    run = w.made("runs/create", experiment_id=experiment)["run"]["info"]
    folder = w.on_disk(run["artifact_uri"]) / "student"
    folder.mkdir(parents=True)
    for path, data in base.files.items():
        (folder / path).write_bytes(data)
    for source in (f"runs:/{run['run_id']}/student", f"{run['artifact_uri']}/student", str(folder)):
        found = _sourced(
            w, base.name, source, run["run_id"],
            **{"kdguard.certificate": w.certificate(base).decode()},
        )  # fmt: skip
        yield _asked(w, base, found)


@attack(12)
def logged_model_of_a_foreign_experiment(w: World) -> Scene:
    with listening():
        base = w.version()
        experiment = w.made(
            "experiments/create", name=f"logged-{base.name}", artifact_location="s3://other/y"
        )["experiment_id"]
        model = w.made("logged-models", experiment_id=experiment, name="m")["model"]["info"]
        body = {
            "name": base.name, "source": f"models:/{model['model_id']}",
            "model_id": model["model_id"],
            "tags": [{"key": "kdguard.certificate", "value": w.certificate(base).decode()}],
        }  # fmt: skip
        made = w.call("model-versions/create", body)
        assert made.status_code < 500, made.text
        found = str(made.json()["model_version"]["version"]) if made.ok else made
        yield _asked(w, base, found)


@attack(12, variants={"once": 1, "three-times": 3})
def chain_of_models_that_ends_outside(w: World, length: int) -> Scene:
    """`models:/a/1` → `models:/b/1` → … → a bucket of somebody else."""
    with listening():
        base = w.version()
        name, number = w.name(), _sourced(w, w.name(), "s3://somebody-else/x", None)
        first = w.name()
        number = _sourced(w, first, "s3://somebody-else/x", None)
        assert isinstance(number, str)
        name = first
        for _ in range(length - 1):
            following = w.name()
            number = _sourced(w, following, f"models:/{name}/{number}", None)
            name = following
        found = _sourced(
            w, base.name, f"models:/{name}/{number}", None,
            **{"kdguard.certificate": w.certificate(base).decode()},
        )  # fmt: skip
        yield _asked(w, base, found)


@attack(12)
def whole_run_as_the_source(w: World) -> Scene:
    """A folder above the bundle holds more than the bundle."""
    base = w.version()
    (base.folder.parent / "beside.txt").write_text("more")
    found = _sourced(
        w, base.name, base.source.rpartition("/")[0], base.run_id,
        **{"kdguard.certificate": w.certificate(base).decode()},
    )  # fmt: skip
    yield _asked(w, base, found)


SPELLINGS = {
    "encoded": lambda s: s.replace("student", "%73tudent"),
    "dot": lambda s: s.replace("/student", "/./student"),
    "dots": lambda s: s.replace("/student", "/x/../student"),
    "dots-encoded": lambda s: s.replace("/student", "/x/%2e%2e/student"),
    "dots-twice-encoded": lambda s: s.replace("/student", "/x/%252e%252e/student"),
    "double-slash": lambda s: s.replace("/student", "//student"),
    "trailing-slash": lambda s: s + "/",
    "query": lambda s: s + "?x=1",
    "fragment": lambda s: s + "#x",
    "parameters": lambda s: s + ";x",
    "upper-case": lambda s: s.replace("mlflow-artifacts:", "MLFLOW-ARTIFACTS:"),
    "no-authority": lambda s: s.replace(":/", ":///"),
    "tab": lambda s: s + "\t",
    "newline": lambda s: s + "\n",
}


@attack(12, variants=SPELLINGS)
def other_spelling_of_an_allowed_place(w: World, spell: Any) -> Scene:
    """Every spelling is read the same way by the check and by whoever fetches, or refused.

    A folder of that very name holds another network: where the check reads one and a consumer
    the other, the difference would show in what is served.
    """
    base = w.version()
    source = spell(base.source)
    odd = w.server.artifacts / source.partition(":")[2].lstrip("/")
    if ".." not in odd.parts and odd.resolve() != base.folder.resolve():
        with contextlib.suppress(OSError, ValueError):
            odd.mkdir(parents=True, exist_ok=True)
            for path, data in files(7).items():
                (odd / path).write_bytes(data)
    found = _sourced(
        w, base.name, source, base.run_id,
        **{"kdguard.certificate": w.certificate(base).decode()},
    )  # fmt: skip
    if not isinstance(found, str):
        yield _asked(w, base, found)
        return
    asked = Version(base.name, found, base.run_id, base.files, base.folder, source)
    answer = w.alias(asked)
    assert answer.status_code in (200, 403), answer.text
    if answer.ok:  # then exactly the certified bytes are what everybody gets
        expected = w.bytes_of(base)
        assert w.bytes_of(asked) == expected
        deleted = w.call(
            "registered-models/alias", {"name": base.name, "alias": "champion"}, method="DELETE"
        )
        assert deleted.ok
    yield Attempt(lambda: w.alias(w.version(base.name, seed=8, certified=False)), says=())


@attack(12)
def source_that_quotes_the_content_root(w: World) -> Scene:
    """The root of promoted bytes is no place that a client may name."""
    good = w.champion()
    place = w.location(good)
    tags = {"kdguard.certificate": w.certificate(good).decode()}
    quoted = urllib.parse.quote(place, safe=":/%")
    for source in dict.fromkeys((place, quoted, w.on_disk(place).as_posix())):
        made = w.created(good.name, source, good.run_id, tags)
        assert made.status_code in (400, 403), made.text
        yield Attempt(lambda made=made: made, status=(400, 403), logged=None, serves=(good,))  # type: ignore[misc]
