"""Attempts to put other bytes under a promoted version, through every route that writes."""

import json
from typing import Any

import toys
from flows.attacks.routes import _raw
from flows.attacks.table import PLAIN, Attempt, Scene, attack
from flows.attacks.world import Version, World
from mlflow_kdguard.files import sha256

EVIL = toys.onnx_tiny(shape=(1, 8, 8), classes=10, seed=66)
NOT_SERVED = (400, 403, 404, 405, 501)


def _outcome(w: World) -> dict[str, Any]:
    """With our app the write itself is refused; without it, it must be without effect.

    The app counts such refusals (`/metrics`); the log is about the registry's changes.
    """
    return {"status": (403,) if w.app else (200, *NOT_SERVED), "logged": None}


def _artifact(version: Version, file: str = "model.onnx") -> str:
    """Path of a file below the server's artifact routes."""
    return f"{version.source.partition(':')[2].lstrip('/')}/{file}"


FILES = {"model": "model.onnx", "mlmodel": "MLmodel", "extra": "code/evil.py",
         "meta": "registered_model_meta"}  # fmt: skip


@attack(14, variants=FILES)
def put_over_a_promoted_file(w: World, file: str) -> Scene:
    good = w.standing()
    path = f"/api/2.0/mlflow-artifacts/artifacts/{_artifact(good, file)}"
    yield Attempt(lambda: _raw(w, "PUT", path, EVIL), serves=(good,), **_outcome(w))


def _spelled(path: str) -> dict[str, str]:
    folder, _, file = path.rpartition("/")
    return {
        "ajax": f"/ajax-api/2.0/mlflow-artifacts/artifacts/{path}",
        "encoded": f"/api/2.0/mlflow-artifacts/artifacts/{folder}/%6dodel.onnx",
        "twice-encoded": f"/api/2.0/mlflow-artifacts/artifacts/{folder}/%256dodel.onnx",
        "slash-encoded": f"/api/2.0/mlflow-artifacts/artifacts/{folder}%2fmodel.onnx",
        "double-slash": f"/api/2.0/mlflow-artifacts/artifacts/{folder}//{file}",
        "leading-slash": f"/api/2.0/mlflow-artifacts/artifacts//{path}",
        "dot": f"/api/2.0/mlflow-artifacts/artifacts/{folder}/./{file}",
        "dots": f"/api/2.0/mlflow-artifacts/artifacts/{folder}/x/../{file}",
        "dots-encoded": f"/api/2.0/mlflow-artifacts/artifacts/{folder}/x/%2e%2e/{file}",
        "dots-twice-encoded": f"/api/2.0/mlflow-artifacts/artifacts/{folder}/x/%252e%252e/{file}",
        "backslash": f"/api/2.0/mlflow-artifacts/artifacts/{folder}\\{file}",
        "trailing-slash": f"/api/2.0/mlflow-artifacts/artifacts/{path}/",
        "upper-case-route": f"/API/2.0/mlflow-artifacts/artifacts/{path}",
        "doubled-route": f"/api/2.0//mlflow-artifacts/artifacts/{path}",
        "semicolon": f"/api/2.0/mlflow-artifacts/artifacts/{path};x",
        "null": f"/api/2.0/mlflow-artifacts/artifacts/{path}%00",
        "query": f"/api/2.0/mlflow-artifacts/artifacts/{path}?x=1",
        "route-encoded": f"/api/2.0/mlflow-artifacts/%61rtifacts/{path}",
        "route-dots": f"/api/2.0/mlflow-artifacts/x/../artifacts/{path}",
    }


SPELLINGS = tuple(_spelled("a/b"))


@attack(14, variants={key: key for key in SPELLINGS})
def put_by_another_spelling(w: World, key: str) -> Scene:
    """Refused, missed, or written elsewhere: the promoted version's own file stays."""
    good = w.standing()
    path, before = _spelled(_artifact(good))[key], _stored(good)
    yield Attempt(
        lambda: _raw(w, "PUT", path, EVIL),
        status=(200, *NOT_SERVED, 307, 308, PLAIN), logged=None, serves=(good,),
    )  # fmt: skip
    if w.app:
        assert _stored(good) == before, "the source's own bytes were replaced"


def _stored(version: Version) -> dict[str, str]:
    return {
        p.relative_to(version.folder).as_posix(): sha256(p.read_bytes())
        for p in sorted(version.folder.rglob("*"))
        if p.is_file()
    }


@attack(14, variants={"api": "/api/2.0", "ajax": "/ajax-api/2.0"})
def delete_a_promoted_file(w: World, api: str) -> Scene:
    good = w.standing()
    folder = _artifact(good, "").rstrip("/")
    for path in (_artifact(good), folder, folder.rpartition("/artifacts/")[0]):
        route = f"{api}/mlflow-artifacts/artifacts/{path}"
        yield Attempt(
            lambda route=route: _raw(w, "DELETE", route, b""),  # type: ignore[misc]
            status=(403, 404) if w.app else (200, *NOT_SERVED),
            logged=None,
            serves=(good,),
        )


@attack(14, variants={"2": "/ajax-api/2.0/mlflow", "3": "/ajax-api/3.0/mlflow"})
def upload_to_the_run(w: World, api: str) -> Scene:
    """The route by which the web page uploads."""
    good = w.standing()
    route = f"{api}/upload-artifact?run_uuid={good.run_id}&path=student/model.onnx"
    expected = _outcome(w) if "2.0" in api else {"status": NOT_SERVED, "logged": None}
    yield Attempt(lambda: _raw(w, "POST", route, EVIL), serves=(good,), **expected)


MULTIPART = ("create", "complete", "abort")


@attack(14, variants={m: m for m in MULTIPART})
def multipart_on_a_local_store(w: World, step: str) -> Scene:
    good = w.standing()
    route = f"/api/2.0/mlflow-artifacts/mpu/{step}/{_artifact(good, '').rstrip('/')}"
    body = {"path": "model.onnx", "num_parts": 1, "upload_id": "x", "parts": []}
    yield Attempt(lambda: _raw(w, "POST", route, json.dumps(body).encode()),
                  status=NOT_SERVED, logged=None, serves=(good,))  # fmt: skip


@attack(14)
def presigned_on_a_local_store(w: World) -> Scene:
    good = w.standing()
    body = {"run_id": good.run_id, "path": "student/model.onnx"}
    yield Attempt(lambda: w.call("artifacts/presigned-upload-url", body),
                  status=NOT_SERVED, logged=None, serves=(good,))  # fmt: skip


def _logged_into(w: World, location: str) -> str:
    """A run whose artifacts are said to lie at `location`; empty where that is refused."""
    made = w.call("experiments/create", {"name": w.name(), "artifact_location": location})
    if not made.ok:
        assert made.status_code < 500, made.text
        return ""
    run = w.call("runs/create", {"experiment_id": made.json()["experiment_id"]})
    return str(run.json()["run"]["info"]["run_id"]) if run.ok else ""


@attack(14)
def experiment_that_lies_in_the_content_root(w: World) -> Scene:
    """MLflow lets a client say where an experiment lies, and then writes there itself."""
    good = w.standing()
    folder = w.on_disk(w.location(good))
    run = _logged_into(w, folder.parent.as_uri())
    for path in (f"{folder.name}/model.onnx", "model.onnx", f"../../../{folder.name}/model.onnx"):
        route = f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path={path}"
        yield Attempt(lambda route=route: _raw(w, "POST", route, EVIL), serves=(good,),  # type: ignore[misc]
                      status=(200, *NOT_SERVED), logged=None)  # fmt: skip


@attack(
    14,
    variants={
        "artifacts": "mlflow-artifacts:/kdguard-content",
        "dots": "mlflow-artifacts:/x/../kdguard-content",
    },
)
def experiment_that_lies_in_the_served_content(w: World, location: str) -> Scene:
    good = w.standing()
    run = _logged_into(w, location)
    folder = w.on_disk(w.location(good)).name
    route = f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path={folder}/model.onnx"
    yield Attempt(lambda: _raw(w, "POST", route, EVIL), serves=(good,),
                  status=(200, *NOT_SERVED), logged=None)  # fmt: skip


@attack(14, variants={"put": "PUT", "delete": "DELETE"})
def write_into_the_served_content(w: World, method: str) -> Scene:
    good = w.standing()
    folder = w.on_disk(w.location(good)).name
    for prefix in (
        "kdguard-content",
        "%6bdguard-content",
        "x/../kdguard-content",
        "./kdguard-content",
    ):
        route = f"/api/2.0/mlflow-artifacts/artifacts/{prefix}/{folder}/model.onnx"
        yield Attempt(lambda route=route: _raw(w, method, route, EVIL), serves=(good,),  # type: ignore[misc]
                      status=(200, *NOT_SERVED, PLAIN), logged=None)  # fmt: skip


@attack(10)
def experiment_that_lies_among_the_keys(w: World) -> Scene:
    """A key that a client managed to place would be trusted: nothing of it may count."""
    import shutil

    version = w.version(certified=False)
    w.certify(version, w.certificate(version, "stranger"))
    with w.operated() as folder:
        assert w.alias(w.version(seed=1)).ok
        run = _logged_into(w, folder.as_uri())
        record = (w.settings.parents[1] / "private" / "stranger.pub").read_bytes()
        kept = folder / "keys"
        for target in kept.parent.rglob("keys"):
            route = f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=keys/stranger.pub"
            answer = _raw(w, "POST", route, record)
            assert answer.status_code < 500, (answer.text, target)
        for run_folder in folder.glob(f"*{run}*"):  # the run's own folder lies below the place
            shutil.rmtree(run_folder)
        yield Attempt(lambda: w.alias(version), says=("unknown key|settings|number",), logged=None)


ABOVE = {
    "dots": "../operator/log.pem",
    "dots-twice": "x/../../operator/log.pem",
    "dots-encoded": "%2e%2e/operator/log.pem",
    "dots-twice-encoded": "%252e%252e/operator/log.pem",
    "slash-encoded": "..%2foperator%2flog.pem",
    "backslash": "..\\operator\\log.pem",
    "absolute": "/{root}/operator/log.pem",
    "absolute-encoded": "%2f{root}%2foperator%2flog.pem",
    "file": "file:{root}/operator/log.pem",
    "null": "..%00/operator/log.pem",
}


@attack(14, variants=ABOVE, needs="app")
def read_a_key_through_the_served_content(w: World, path: str) -> Scene:
    """What our app serves is the content root, and nothing beside it."""
    good, named = w.standing(), path.format(root=w.server.folder)
    for route in (
        f"/api/2.0/mlflow-artifacts/artifacts/kdguard-content/{named}",
        f"/ajax-api/2.0/mlflow-artifacts/artifacts/kdguard-content/{named}",
        f"/api/2.0/mlflow-artifacts/artifacts?path=kdguard-content/{named}",
        f"/kdguard/{named}",
        f"/kdguard/static/{named}",
    ):
        answer = _raw(w, "GET", route, b"")
        assert answer.status_code < 500, (route, answer.text)
        assert b"PRIVATE KEY" not in answer.content, route
        yield Attempt(lambda answer=answer: answer, status=tuple(range(200, 500)), logged=None,  # type: ignore[misc]
                      serves=(good,))  # fmt: skip
