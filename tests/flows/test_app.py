"""The app of real servers: guarded artifacts stay as they are, and everyone sees what they may."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests

from flows.gates import Gate, answering_quickly, gated, heads
from flows.operators import Operator, toy_bundle
from mlflow_kdguard.files import sha256

ADMIN = ("admin", "gate-password-1")
READER, STRANGER = ("reader", "reader-password"), ("stranger", "stranger-password")
VERIFIER = ("verifier", "verifier-password")
CLIENTS = "mlflow-artifacts:/kdguard-content"
PROXY = "/api/2.0/mlflow-artifacts"
API = "/api/2.0/kdguard"


@dataclass
class World:
    """A gated server with users, and two promoted versions of `digits`: by alias and by stage."""

    gate: Gate
    bundle: dict[str, bytes]
    version: str
    run: str

    @property
    def home(self) -> str:
        """The proxied path of the version's own folder."""
        return f"0/{self.run}/artifacts/model"

    @property
    def folder(self) -> Path:
        """Where the server keeps it."""
        return self.gate.server.artifacts / self.home

    @property
    def digest(self) -> str:
        """The content root's folder of what was promoted."""
        return self.gate.location("digits", self.version).rpartition("/")[2]

    def ask(
        self, method: str, path: str, user: tuple[str, str] | None = ADMIN, **more: Any
    ) -> requests.Response:
        """One request, as it stands: nothing in its path is normalised."""
        prepared = requests.Request(method, self.gate.uri, auth=user, **more).prepare()
        query = prepared.url.partition("?")[2] if prepared.url else ""
        prepared.url = self.gate.uri + path + (f"?{query}" if query else "")
        with requests.Session() as session:
            return session.send(prepared, timeout=60, allow_redirects=False)

    def untouched(self) -> bool:
        """Whether the version's own folder and the content root hold what was promoted."""
        content = self.gate.operator.content / self.digest
        return _files(self.folder) == self.bundle == _files(content)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("app")
    content = {"root": f"file://{folder / 'operator' / 'content'}", "clients": CLIENTS}
    with gated(folder, app=True, auth=True, workers=2, content=content) as gate:
        bundle = toy_bundle()
        version, run = gate.registered("digits", bundle)
        made = World(gate, bundle, version, run)
        signed = gate.operator.sign(gate.operator.certificate(bundle, "digits"))
        gate.certify("digits", version, signed)
        gate.promote("digits", version)
        for name, password in (READER, STRANGER, VERIFIER):
            body = {"username": name, "password": password}
            assert made.ask("POST", "/api/2.0/mlflow/users/create", json=body).ok
        for name, permission in ((STRANGER[0], "DENY"), (VERIFIER[0], "EDIT")):
            body = {"username": name, "resource_type": "registered_model"}
            body |= {"resource_id": "digits", "permission": permission}
            granted = made.ask("POST", "/api/3.0/mlflow/users/permissions/grant", json=body)
            assert granted.ok, granted.text
        yield made


# ── Starting ────────────────────────────────────────────────────────────────────────────────────


def test_two_workers_start_once(world: World) -> None:
    log = world.gate.server.log
    assert log.count("Application startup complete") == 2
    assert log.count("Created admin user") == 1
    assert "Traceback" not in log
    assert "locked" not in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--gunicorn-opts", "--timeout 60"], "under uvicorn only, and this is gunicorn"),
        (["--waitress-opts", "--threads 1"], "under uvicorn only, and this is waitress"),
        (["--registry-store-uri", "sqlite:///plain.db"], "which does not gate"),
        (["--artifacts-only"], "serves no registry"),
    ],
)
def test_it_refuses_to_start_where_it_cannot_enforce(
    tmp_path: Path, options: list[str], why: str
) -> None:
    operator = Operator.install(tmp_path / "operator", "http://127.0.0.1:1")
    database = f"sqlite:///{tmp_path / 'm.db'}"
    stores = {"--backend-store-uri": database, "--registry-store-uri": f"kdguard+{database}"}
    if "--artifacts-only" in options:
        stores = {}
    given = [word for key, uri in stores.items() if key not in options for word in (key, uri)]
    server = (sys.executable, "-m", "mlflow", "server", "--port", "1", "--app-name", "kdguard")
    done = subprocess.run(
        [*server, *given, *options],
        cwd=tmp_path,
        env=os.environ
        | {
            "KDGUARD_SERVER": str(operator.settings),
            "KDGUARD_AUTH": "none",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "Error: kdguard does not start" in done.stderr
    assert why in done.stderr


# ── Writes ──────────────────────────────────────────────────────────────────────────────────────


def _attempts(world: World) -> Iterator[tuple[str, str, dict[str, Any]]]:
    home, run = world.home, world.run
    file = f"{home}/model.onnx"
    spellings = (
        file,
        f"{home}/new.txt",
        f"{home}/deep/er/new.txt",
        f"/{file}",
        file.replace("/", "//"),
        f"x/%2e%2e/{file}",
        quote(file, safe=""),
        quote(quote(file, safe=""), safe=""),
        quote(f"file:{file}", safe=""),
        quote(f"FILE:{file}?x", safe=""),
        file.replace("/", "%5C"),
        f"{home}/x%5C..%5C..%5C..%5Cy",
        file.upper(),
    )
    for api in ("/api", "/ajax-api"):
        base = f"{api}/2.0/mlflow-artifacts"
        for spelling in spellings:
            yield "PUT", f"{base}/artifacts/{spelling}", {"data": b"evil"}
        for above in (file, home, f"0/{run}/artifacts", f"0/{run}", "0", f"0%2F{run}"):
            yield "DELETE", f"{base}/artifacts/{above}", {}
        for verb in ("create", "complete", "abort"):
            body = {"path": "model.onnx", "num_parts": 1, "upload_id": "x", "parts": []}
            yield "POST", f"{base}/mpu/{verb}/{home}", {"json": body}
        presigned = f"{api}/2.0/mlflow/artifacts/presigned-upload-url"
        yield "POST", presigned, {"json": {"run_id": run, "path": "model/model.onnx"}}
        yield "POST", presigned, {"data": f'{{"runId":"x","run_id":"{run}","path":"model/y"}}'}
        for uri in (f"mlflow-artifacts:/{home}", f"file://{world.folder}/sub"):
            body = {"name": f"inside-{api}", "artifact_location": uri}
            yield "POST", f"{api}/2.0/mlflow/experiments/create", {"json": body}
    upload = "/ajax-api/2.0/mlflow/upload-artifact"
    for path in ("model/model.onnx", "model//x", "file:model/model.onnx", "model%2Fmodel.onnx"):
        yield "POST", upload, {"params": {"run_uuid": run, "path": path}, "data": b"evil"}
    content = f"{PROXY}/artifacts/kdguard-content"
    for inner in (world.digest, f"{world.digest}/model.onnx", "x", ""):
        yield "PUT", f"{content}/{inner}", {"data": b"evil"}
        yield "DELETE", f"{content}/{inner}", {}
    yield "PUT", f"{PROXY}/artifacts/KDGUARD%2Dcontent/x", {"data": b"evil"}
    yield "POST", f"{PROXY}/mpu/create/kdguard-content/x", {"json": {"path": "x", "num_parts": 1}}


def test_no_route_writes_to_what_is_guarded(world: World) -> None:
    assert world.untouched()
    tried = list(_attempts(world))
    assert len(tried) > 50
    for method, path, more in tried:
        told = world.ask(method, path, **more)
        assert told.status_code == 403, (method, path, told.status_code, told.text)
        assert told.json()["error_code"] == "PERMISSION_DENIED"
        assert world.untouched(), (method, path)
    assert not (world.gate.server.artifacts / "kdguard-content").exists()


def test_who_is_nobody_learns_nothing_about_what_is_guarded(world: World) -> None:
    for user in (None, ("admin", "wrong")):
        told = world.ask("PUT", f"{PROXY}/artifacts/{world.home}/x", user, data=b"evil")
        assert told.status_code == 401
        assert "guarded" not in told.text
    assert world.untouched()


def test_everything_else_can_be_written_and_read(world: World) -> None:
    client = world.gate.client
    run = client.create_run("0").info.run_id
    world.gate.upload(run, {"x.txt": b"1"})
    assert world.ask("DELETE", f"{PROXY}/artifacts/0/{run}/artifacts/model").ok
    upload = {"run_uuid": run, "path": "y/z.txt"}
    assert world.ask("POST", "/ajax-api/2.0/mlflow/upload-artifact", params=upload, data=b"1").ok
    world.gate.upload(world.run, {"beside.txt": b"1"}, folder="elsewhere")
    told = world.ask("GET", f"{PROXY}/artifacts/{world.home}/model.onnx")
    assert told.content == world.bundle["model.onnx"]
    told = world.ask("GET", f"{PROXY}/artifacts", params={"path": world.home})
    assert {f["path"] for f in told.json()["files"]} >= {"model.onnx", "MLmodel"}
    other = client.create_experiment("elsewhere", f"mlflow-artifacts:/{world.home}-beside")
    assert other


def _stage(client: Any, name: str, version: str, stage: str) -> None:
    with pytest.warns(FutureWarning, match="stages will be removed"):
        client.transition_model_version_stage(name, version, stage)


def test_a_version_is_guarded_exactly_while_it_carries_the_name(world: World) -> None:
    version, run = world.gate.registered("comes-and-goes", toy_bundle())
    path = f"{PROXY}/artifacts/0/{run}/artifacts/model/note.txt"
    write = {"data": b"1"}
    assert world.ask("PUT", path, **write).ok
    assert world.ask("DELETE", path).ok
    files = toy_bundle()
    version, run = world.gate.registered("comes-and-goes", files)
    signed = world.gate.operator.sign(world.gate.operator.certificate(files, "comes-and-goes"))
    world.gate.certify("comes-and-goes", version, signed)
    path = f"{PROXY}/artifacts/0/{run}/artifacts/model/note.txt"
    client = world.gate.client
    _stage(client, "comes-and-goes", version, "Production")
    assert world.ask("PUT", path, **write).status_code == 403
    world.gate.promote("comes-and-goes", version)
    _stage(client, "comes-and-goes", version, "Archived")
    assert world.ask("PUT", path, **write).status_code == 403
    client.delete_registered_model_alias("comes-and-goes", "champion")
    assert world.ask("PUT", path, **write).ok


def test_a_copy_guards_the_bytes_that_it_was_made_from(world: World) -> None:
    files = toy_bundle()
    _, run = world.gate.registered("original", files)
    client = world.gate.client
    client.create_registered_model("copied")
    made = client.create_model_version("copied", "models:/original/1", await_creation_for=0)
    signed = world.gate.operator.sign(world.gate.operator.certificate(files, "copied"))
    world.gate.certify("copied", made.version, signed)
    world.gate.promote("copied", made.version)
    path = f"{PROXY}/artifacts/0/{run}/artifacts/model/model.onnx"
    assert world.ask("PUT", path, data=b"evil").status_code == 403


# ── Reads of what was promoted ──────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def signed_in(user: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch, answering_quickly():
        patch.setenv("MLFLOW_TRACKING_USERNAME", user[0])
        patch.setenv("MLFLOW_TRACKING_PASSWORD", user[1])
        yield


def test_plain_consumers_load_what_was_promoted(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mlflow

    assert world.gate.location("digits", world.version) == f"{CLIENTS}/{world.digest}"
    decoy = world.gate.server.artifacts / "kdguard-content" / world.digest
    decoy.mkdir(parents=True)
    (decoy / "model.onnx").write_bytes(b"put there by somebody with access to the artifact store")
    try:
        mlflow.set_tracking_uri(world.gate.uri)
        with signed_in(READER, monkeypatch):
            place = mlflow.artifacts.download_artifacts(
                "models:/digits@champion", dst_path=tmp_path
            )
            assert _files(Path(place)).items() >= world.bundle.items()
            monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "true")
            assert mlflow.pyfunc.load_model("models:/digits@champion") is not None
        with signed_in(STRANGER, monkeypatch), pytest.raises(Exception, match=r"40[13]|denied"):
            mlflow.artifacts.download_artifacts(f"{CLIENTS}/{world.digest}", dst_path=tmp_path)
    finally:
        mlflow.set_tracking_uri(None)
        (decoy / "model.onnx").unlink()
        decoy.rmdir()
        decoy.parent.rmdir()


def test_a_file_of_a_promoted_version_comes_from_the_content_root(world: World) -> None:
    asked = {"name": "digits", "version": world.version, "path": "model.onnx"}
    route = "/model-versions/get-artifact"
    with contextlib.ExitStack() as undo:
        file = world.folder / "model.onnx"
        undo.callback(file.write_bytes, world.bundle["model.onnx"])
        file.write_bytes(b"changed on the disk")
        told = world.ask("GET", route, READER, params=asked)
        assert (told.status_code, told.content) == (200, world.bundle["model.onnx"])
        assert world.ask("GET", route, STRANGER, params=asked).status_code == 403
        assert world.ask("GET", route, None, params=asked).status_code == 401


def test_the_content_root_gives_bundles_and_nothing_else(world: World) -> None:
    base = f"{PROXY}/artifacts/kdguard-content"
    for path in (f"{world.digest}/absent", "..%2f..%2fserver.yaml", "%252e%252e/server.yaml", ""):
        assert world.ask("GET", f"{base}/{path}").status_code in (404, 405), path
    listed = world.ask("GET", f"{PROXY}/artifacts", params={"path": "kdguard-content"})
    assert listed.status_code == 404
    presigned = world.ask("GET", f"{PROXY}/presigned/kdguard-content/{world.digest}/MLmodel")
    assert "file_size" not in presigned.json()
    assert world.ask("GET", presigned.json()["url"]).content == world.bundle["MLmodel"]


# ── The API ─────────────────────────────────────────────────────────────────────────────────────


def test_verify_judges_without_acting(world: World) -> None:
    asked = {"name": "digits", "version": world.version}
    told = world.ask("POST", f"{API}/verify", READER, json=asked).json()
    assert (told["schema"], told["decision"]) == ("kdguard.gate/1", "pass")
    files = toy_bundle()
    uncertified, _ = world.gate.registered("uncertified", files)
    entries = len(heads(world.gate.operator))
    asked = {"name": "uncertified", "version": uncertified, "alias": "champion"}
    told = world.ask("POST", f"{API}/verify", READER, json=asked).json()
    assert told["decision"] == "refuse"
    assert any("no certificate" in rule["why"] for rule in told["rules"])
    assert len(heads(world.gate.operator)) == entries
    assert world.gate.alias("uncertified") is None


def test_nonces_are_counted_and_logged(world: World) -> None:
    asked = {"name": "digits", "subject": sha256(b"a file")}
    assert world.ask("POST", f"{API}/nonces", READER, json=asked).status_code == 403
    given = [world.ask("POST", f"{API}/nonces", VERIFIER, json=asked).json() for _ in range(3)]
    assert [g["attempt"] for g in given] == [given[0]["attempt"] + i for i in range(3)]
    assert len({g["nonce"] for g in given}) == 3
    told = world.ask("GET", f"{API}/log", params={"action": "nonce", "model": "digits"}).json()
    assert {e["reasons"][0] for e in told["entries"]} >= {g["nonce"] for g in given}
    assert {e["actor"] for e in told["entries"]} == {"verifier"}
    assert heads(world.gate.operator)[-1]["seq"] >= told["entries"][0]["seq"]


def test_the_log_is_paged(world: World) -> None:
    seen: list[int] = []
    before: int | None = None
    while True:
        query = {"limit": 2} | ({} if before is None else {"before": before})
        page = world.ask("GET", f"{API}/log", params=query).json()
        seen += [entry["seq"] for entry in page["entries"]]
        if (before := page["next"]) is None:
            break
    assert seen == list(range(seen[0], 0, -1))
    assert seen[0] == world.ask("GET", f"{API}/status").json()["log"]["seq"]


def test_users_see_only_what_they_may_read(world: World) -> None:
    asked = {"name": "digits", "version": world.version}
    nonce = {"name": "digits", "subject": sha256(b"a file")}
    for path, body in (("verify", asked), ("nonces", nonce)):
        assert world.ask("POST", f"{API}/{path}", STRANGER, json=body).status_code == 403
        assert world.ask("POST", f"{API}/{path}", None, json=body).status_code == 401
    for path in ("/kdguard", "/kdguard/log", f"{API}/log", f"{API}/status", f"{API}/openapi.json"):
        assert world.ask("GET", path, None).status_code == 401, path
        told = world.ask("GET", path, STRANGER)
        assert told.status_code == 200
        assert "digits" not in told.text
    one = {"workspace": "default", "name": "digits", "version": world.version}
    assert world.ask("GET", "/kdguard/version", STRANGER, params=one).status_code == 404
    assert "digits" in world.ask("GET", "/kdguard", READER).text
    told = world.ask("GET", "/kdguard/version", READER, params=one)
    assert "Signed by" in told.text
    assert "Vic" in told.text


def test_what_is_malformed_is_a_400_and_never_a_5xx(world: World) -> None:
    fine = {"name": "digits", "version": "1"}
    for body in ({}, {"name": 1, "version": "1"}, fine | {"more": 1}, fine | {"version": "x"}, []):
        assert world.ask("POST", f"{API}/verify", json=body).status_code == 400, body
    form = {"Content-Type": "text/plain"}
    sent = world.ask("POST", f"{API}/verify", data='{"name":"digits","version":"1"}', headers=form)
    assert sent.status_code == 400
    assert world.ask("POST", f"{API}/verify", json=fine | {"version": "99"}).status_code == 404
    assert world.ask("POST", f"{API}/verify", json=fine | {"name": "none"}).status_code == 404
    unknown = {"name": "nobody", "subject": sha256(b"x")}
    assert world.ask("POST", f"{API}/nonces", json=unknown).status_code == 404
    for query in ({"before": "x"}, {"limit": "1000"}, {"before": "0"}):
        assert world.ask("GET", f"{API}/log", params=query).status_code == 400, query
    assert world.ask("DELETE", f"{API}/log").status_code == 405


def test_the_api_describes_itself(world: World) -> None:
    told = world.ask("GET", f"{API}/openapi.json").json()
    assert set(told["paths"]) == {
        *(f"{API}/{name}" for name in ("verify", "nonces", "log", "status")),
        *("/health/ready", "/kdguard/metrics", "/metrics"),
    }
    subject = told["components"]["schemas"]["NonceAsked"]["properties"]["subject"]
    assert subject["pattern"] == "^[0-9a-f]{64}$"


def test_prometheus_gets_the_same_figures_from_every_worker(world: World) -> None:
    texts = {world.ask("GET", "/metrics", None).text for _ in range(12)}
    assert len(texts) == 1
    (text,) = texts
    line = re.compile(
        r'(# (HELP|TYPE) kdguard_.+|kdguard_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? \S+)'
    )
    assert all(line.fullmatch(row) for row in text.splitlines())
    assert 'kdguard_guarded_versions{certificate="valid"}' in text
    assert 'kdguard_log_entries_total{action="promote",decision="pass"}' in text
    assert "digits" not in text


def test_settings_that_cannot_be_read_guard_everything(world: World) -> None:
    version, run = world.gate.registered("plain", toy_bundle())
    world.gate.client.set_registered_model_alias("plain", "somebody", version)
    path = f"{PROXY}/artifacts/0/{run}/artifacts/model/note.txt"
    assert world.ask("PUT", path, data=b"1").ok
    settings = world.gate.operator.settings
    text = settings.read_text()
    settings.write_text("version: [")
    try:
        assert world.ask("GET", "/health/ready", None).status_code == 503
        assert world.ask("PUT", path, data=b"1").status_code == 403
        assert world.ask("PUT", f"{PROXY}/artifacts/{world.home}/x", data=b"1").status_code == 403
        told = world.ask("PUT", f"{PROXY}/artifacts/kdguard-content/{world.digest}/x", data=b"1")
        assert told.status_code == 403
        assert world.ask("PUT", f"{PROXY}/artifacts/0/none/artifacts/x", data=b"1").ok
        assert "cannot read its settings" in world.ask("GET", "/kdguard").text
        assert "kdguard_settings_readable 0" in world.ask("GET", "/metrics", None).text
        nonce = {"name": "plain", "subject": sha256(b"x")}
        assert world.ask("POST", f"{API}/nonces", json=nonce).status_code == 403
    finally:
        settings.write_text(text)
    assert world.ask("GET", "/health/ready", None).json()["ready"] is True
    assert world.ask("PUT", path, data=b"1").ok


# ── Without users, with workspaces ─────────────────────────────────────────────


@pytest.mark.slow
def test_workspaces_change_nothing(tmp_path: Path) -> None:
    options = ("--enable-workspaces",)
    content = {"root": f"file://{tmp_path / 'operator' / 'content'}", "clients": CLIENTS}
    with gated(tmp_path, app=True, options=options, content=content) as gate:
        uri = gate.uri
        team = {"X-MLFLOW-WORKSPACE": "team"}
        made = requests.post(f"{uri}/api/3.0/mlflow/workspaces", json={"name": "team"}, timeout=60)
        assert made.ok, made.text
        files = toy_bundle()
        import mlflow

        mlflow.set_tracking_uri(uri)
        mlflow.set_workspace("team")
        try:
            experiment = gate.client.create_experiment("theirs")
            run = gate.client.create_run(experiment).info
            gate.upload(run.run_id, files)
            gate.client.create_registered_model("theirs")
            version = gate.client.create_model_version(
                "theirs", f"{run.artifact_uri}/model", run_id=run.run_id, await_creation_for=0
            ).version
            certificate = gate.operator.certificate(files, "theirs").model_copy(
                update={"registry": f"{gate.operator.uri}#workspace=team"}
            )
            gate.certify("theirs", version, gate.operator.sign(certificate))
            gate.promote("theirs", version)
            got = mlflow.artifacts.download_artifacts(
                "models:/theirs@champion", dst_path=str(tmp_path / "got")
            )
            assert _files(Path(got)).items() >= files.items()
        finally:
            mlflow.set_workspace(None)
            mlflow.set_tracking_uri(None)
        path = f"{experiment}/{run.run_id}/artifacts/model/model.onnx"
        scoped = f"workspaces/team/{path}"
        assert (gate.server.artifacts / scoped).exists()
        for target, headers in ((path, team), (scoped, team), (scoped, {})):
            told = requests.put(
                f"{uri}{PROXY}/artifacts/{target}", data=b"evil", headers=headers, timeout=60
            )
            assert told.status_code == 403, (target, headers)
        assert (gate.server.artifacts / scoped).read_bytes() == files["model.onnx"]
        for page in ("/kdguard", f"{API}/status", "/metrics"):
            assert requests.get(f"{uri}{page}", timeout=60).ok, page
        told = requests.get(f"{uri}/kdguard", timeout=60).text
        assert "theirs version 1" in told
        assert "(team)" in told
