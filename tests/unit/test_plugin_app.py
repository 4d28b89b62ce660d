"""The app without a server: what a request writes, where that lies, and how things are shown."""

import json
import os
import posixpath
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.utils.uri import validate_path_is_safe

from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.gate import RULES
from mlflow_kdguard.plugin.app import content, figures, metrics, page, redirects, startup
from mlflow_kdguard.plugin.app.spots import Guarded, Spot, readings, spots_of
from mlflow_kdguard.plugin.app.writes import (
    BODY_ROUTES,
    READ_ONLY,
    Owner,
    Write,
    body_route,
    writes_of,
)

SERVED = "/srv/mlartifacts"
HOME = "1/models/m-5ad/artifacts"
GUARDED = Guarded(spots_of(f"mlflow-artifacts:/{HOME}", served=SERVED))


def touches(path: str, *, recursive: bool = False, guarded: Guarded = GUARDED) -> bool:
    """Whether a write to a proxied path touches what is guarded."""
    return any(
        guarded.touched_by(root.below(parts), recursive=recursive)
        for root in spots_of("mlflow-artifacts:/", served=SERVED)
        for parts in readings(path)
    )


# ── Spellings ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "path",
    [
        f"{HOME}/model.onnx",
        HOME,
        f"/{HOME}//model.onnx",
        f"./{HOME}/./model.onnx",
        f"x/../{HOME}/model.onnx",
        f"{HOME}/deep/er/model.onnx",
        HOME.upper() + "/MODEL.ONNX",
        quote(f"{HOME}/model.onnx", safe=""),
        quote(quote(quote(f"{HOME}/model.onnx", safe=""), safe=""), safe=""),
        HOME.replace("/", "\\") + "\\model.onnx",
        HOME.replace("/", "%255c") + "%255cmodel.onnx",
        f"file:{HOME}/model.onnx",
        f"FILE:{HOME}/model.onnx",
        f"file:{HOME}/model.onnx?x#y",
        f"file%3A{HOME}/model.onnx%3Fx",
        HOME.replace("models", "ｍｏｄｅｌｓ") + "/model.onnx",
        # Out of the folder for a reader that follows what the store takes for a name.
        f"{HOME}/x\\..\\..\\..\\y",
        f"{HOME}/x／..／..／..／..／y",
        f"{HOME}/model.onnx\n",
        f"{HOME}/a\x00b",
    ],
)
def test_every_spelling_of_a_guarded_path_is_guarded(path: str) -> None:
    assert touches(path)


@pytest.mark.parametrize(
    "path", ["1/models/m-5ad2/artifacts/x", "1/models/m-5a/artifacts", "2/x", f"y/{HOME}/x", "1"]
)
def test_neighbours_are_not(path: str) -> None:
    assert not touches(path)


def test_deleting_a_folder_above_deletes_what_is_guarded() -> None:
    for above in ("1/models/m-5ad", "1/models", "1", "", "x/..", "%31"):
        assert touches(above, recursive=True)
        assert not touches(above)


def _spelled(draw: st.DrawFn, text: str) -> str:
    for _ in range(draw(st.integers(0, 3))):
        chosen = draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)))
        text = "".join(
            "".join(f"%{byte:02x}" for byte in char.encode()) if encode else char
            for char, encode in zip(text, chosen, strict=True)
        )
    return text


@st.composite
def _paths(draw: st.DrawFn) -> str:
    part = st.sampled_from(["", ".", "..", "a", "\\", "x\\..", "／..", "..／", "%2e%2e", "#", "?b"])
    inside = "/".join(draw(st.lists(part, max_size=4)))
    scheme = draw(st.sampled_from(["", "file:", "FILE:", "/"]))
    return _spelled(draw, f"{scheme}{HOME}/{inside}")


@given(_paths())
@example(f"{HOME}/..")
def test_whatever_mlflow_writes_into_the_folder_is_refused(path: str) -> None:
    """The oracle is MLflow's own reading of an artifact path, and the file system's."""
    try:
        read = validate_path_is_safe(path)
    except (MlflowException, ValueError):
        return  # MLflow refuses it
    written = posixpath.normpath(posixpath.join("/", read))
    if (written + "/").startswith(f"/{HOME}/"):
        assert touches(path)


def test_proxied_http_direct_and_local_uris_are_one_place(tmp_path: Path) -> None:
    served = str(tmp_path / "artifacts")
    (tmp_path / "link").symlink_to(tmp_path / "artifacts")
    spellings = (
        f"mlflow-artifacts:/{HOME}",
        f"MLFLOW-ARTIFACTS://host:80/{HOME}",
        f"https://host/api/2.0/mlflow-artifacts/artifacts/{HOME}",
        f"file://{served}/{HOME}",
        f"FILE:{served}/{HOME}",
        f"{served}/x/../{HOME}/",
        f"{tmp_path}/link/{HOME}",
    )
    meant = spots_of(f"{served}/{HOME}", served=None)
    for uri in spellings:
        assert spots_of(uri, served=served) & meant, uri


def test_an_object_store_is_compared_with_its_bucket() -> None:
    guarded = Guarded(spots_of("s3://Bucket/a%20b/m", served=None))
    assert any(
        guarded.touched_by(s, recursive=False) for s in spots_of("S3://bucket/a b/m/x", served=None)
    )
    other = spots_of("s3://other/a%20b/m/x", served=None) | {Spot("gs://bucket", ("a b", "m"))}
    assert not any(guarded.touched_by(s, recursive=True) for s in other)


def test_without_a_destination_nothing_is_proxied() -> None:
    assert spots_of("mlflow-artifacts:/1/x", served=None) == frozenset()


# ── What a request writes ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("api", ["/api", "/ajax-api", "/prefix/api", "//API", "/x/ajax%2dapi"])
def test_the_proxied_routes_are_found_under_every_prefix(api: str) -> None:
    for method, route, recursive in (
        ("PUT", "artifacts", False),
        ("DELETE", "artifacts", True),
        ("POST", "mpu/create", False),
        ("POST", "mpu/complete", False),
        ("POST", "mpu/abort", False),
    ):
        found = writes_of(method, f"{api}/2.0/mlflow-artifacts/{route}/1/x", "")
        assert found == (Write(Owner.PROXY, "", "1/x", recursive),)


@pytest.mark.parametrize("method", sorted(READ_ONLY))
def test_reads_are_not_looked_at(method: str) -> None:
    assert writes_of(method, f"/api/2.0/mlflow-artifacts/artifacts/{HOME}", "") == ()


def test_an_upload_to_a_run_counts_with_every_repeated_parameter() -> None:
    found = writes_of(
        "POST", "/ajax-api/2.0/mlflow/upload-artifact", "run_uuid=a&path=x&run_uuid=b&path=y%2Fz"
    )
    assert {(w.owner, w.key, w.path) for w in found} == {
        (Owner.RUN, run, path) for run in "ab" for path in ("x", "y/z")
    }


@pytest.mark.parametrize(
    "body",
    [
        b'{"run_id": "other", "runId": "a", "path": "x"}',
        b'{"run_id": "a", "run_id": "other", "path": "x", "path": "y"}',
        json.dumps(json.dumps({"runId": "a", "path": "x"})).encode(),
        '{"run_id": "a", "path": "x"}'.encode("utf-16"),
    ],
)
def test_a_body_counts_in_every_way_it_can_be_read(body: bytes) -> None:
    for api in ("/api", "/ajax-api"):
        found = writes_of("POST", f"{api}/2.0/mlflow/artifacts/presigned-upload-url", "", body)
        assert Write(Owner.RUN, "a", "x") in found


def test_a_body_that_cannot_be_read_is_refused() -> None:
    route = "/api/2.0/mlflow/experiments/create"
    for body in (b"{", b"\xff\xfe\x00", b"[" * 100_000):
        with pytest.raises(ModelError):
            writes_of("POST", route, "", body)
    assert writes_of("POST", route, "", b"") == writes_of("POST", route, "", b"[1]") == ()
    asked = b'{"name": "x", "artifactLocation": "s3://a/b"}'
    assert writes_of("POST", route, "", asked) == (Write(Owner.URI, "s3://a/b", ""),)


def _served_routes() -> set[tuple[str, str]]:
    """Every route of this MLflow that may change something."""
    code = """
import json
from mlflow.server import app
from mlflow.server.artifact_router import artifact_router
rows = {(m, r.rule) for r in app.url_map.iter_rules() for m in r.methods}
rows |= {(m, r.path) for r in artifact_router.routes for m in r.methods}
print(json.dumps(sorted(rows)))
"""
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    rows = json.loads(told.splitlines()[-1])
    return {(method, path) for method, path in rows if method not in READ_ONLY}


def test_no_route_that_writes_artifacts_is_forgotten() -> None:
    """A new one in MLflow fails here until it stands in the table, or below."""
    served = _served_routes()
    known = {
        (method, path)
        for method, path in served
        if body_route(method, path) or writes_of(method, path, "run_uuid=a&path=b")
    }
    words = ("artifact", "upload", "mpu", "promptlab", "presigned")
    harmless = {
        f"/{api}/2.0/mlflow/artifacts/presigned-download-url" for api in ("api", "ajax-api")
    }
    named = {(m, p) for m, p in served if any(word in p for word in words) and p not in harmless}
    assert named
    assert named <= known
    for route in BODY_ROUTES:
        assert any(path.endswith(route.suffix) for _, path in served), route


# ── Reads of what was promoted ──────────────────────────────────────────────────────────────────

DIGEST = "ab" * 32


def _scope(path: str, query: str = "") -> dict[str, object]:
    return {"type": "http", "method": "GET", "path": path, "query_string": query.encode()}


def test_reads_of_the_content_root_go_to_our_route() -> None:
    base = "/api/2.0/mlflow-artifacts/artifacts"
    sent = redirects.of_content(_scope(f"{base}/kdguard-content/{DIGEST}/MLmodel"))
    assert sent["path"] == f"{redirects.CONTENT_ROUTE}/{DIGEST}/MLmodel"
    for spelling in ("kdguard%2Dcontent", "KDGUARD-content", "./kdguard-content"):
        sent = redirects.of_content(_scope(f"/pre{base}/{spelling}/{DIGEST}/MLmodel"))
        assert str(sent["path"]).startswith(f"/pre{redirects.CONTENT_ROUTE}")
    sent = redirects.of_content(_scope(base, f"path=kdguard-content%2F{DIGEST}"))
    assert (sent["path"], sent["query_string"]) == (
        f"{redirects.CONTENT_ROUTE}-list",
        f"path={DIGEST}".encode(),
    )
    for other in (_scope(f"{base}/1/x"), _scope(base, "path=1"), _scope("/kdguard-content")):
        assert redirects.of_content(other) is other


def test_a_promoted_versions_download_goes_there_too() -> None:
    scope = _scope("/model-versions/get-artifact", "name=m&version=3&path=MLmodel&name=other")
    asked: list[tuple[str, str]] = []

    def storage(name: str, version: str) -> str:
        asked.append((name, version))
        return f"{redirects.SERVED}{DIGEST}"

    sent = redirects.of_version(scope, storage)
    assert asked == [("m", "3")]  # the first of a repeated parameter, as MLflow reads it
    assert sent["path"] == f"{redirects.CONTENT_ROUTE}/{DIGEST}/MLmodel"
    assert redirects.of_version(scope, lambda _n, _v: "mlflow-artifacts:/1/x") is scope


@pytest.mark.parametrize(
    "path",
    ["", "..", f"{DIGEST}/..", f"{DIGEST}/.hidden", f"{DIGEST}/a/../b", "AB" * 32, f"{DIGEST}//x",
     f"{DIGEST}/%2e%2e/x", f"{DIGEST}/a\\b", f"{DIGEST}/a/b/c/d/e", "short/x"],
)  # fmt: skip
def test_only_files_of_a_bundle_have_a_path_there(path: str) -> None:
    assert content.split(path) is None


def test_a_link_in_the_content_root_is_not_followed(tmp_path: Path) -> None:
    from mlflow_kdguard.plugin.server.settings import Content

    root = tmp_path / "content"
    (root / DIGEST).mkdir(parents=True)
    (root / DIGEST / "MLmodel").write_text("x")
    (root / DIGEST / "passwd").symlink_to("/etc/passwd")
    stated = Content(root=f"file://{root}")
    assert content.local(stated, (DIGEST, "MLmodel")) == root / DIGEST / "MLmodel"
    assert content.local(stated, (DIGEST, "passwd")) is None
    assert [f.name for f in content.listing(stated, (DIGEST,))] == ["MLmodel"]
    assert content.listing(stated, ("cd" * 32,)) == []


# ── Where it refuses to start ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["gunicorn", "waitress", None])
def test_it_starts_under_uvicorn_only(name: str | None) -> None:
    with pytest.raises(MlflowException, match="uvicorn only"):
        startup.refuse_other_servers(name)


def test_it_starts_before_a_gated_store_only() -> None:
    with pytest.raises(MlflowException, match=r"object.*does not gate"):
        startup.refuse_ungated(object())


def test_another_word_for_auth_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDGUARD_AUTH", "off")
    with pytest.raises(MlflowException, match=r"basic.*none"):
        startup.with_auth()


def test_the_lock_of_a_start_is_held_by_one_process(tmp_path: Path) -> None:
    """Two that start at once do it one after the other (sqlite's migrations raced)."""
    code = f"""
import time
from mlflow_kdguard.plugin.app.startup import alone
with alone({str(tmp_path)!r}):
    print("in", flush=True); time.sleep(0.5); print("out", flush=True)
"""
    log = tmp_path / "log"
    with log.open("wb") as out:
        running = [subprocess.Popen([sys.executable, "-c", code], stdout=out) for _ in range(3)]
        assert [process.wait(60) for process in running] == [0, 0, 0]
    assert log.read_text().split() == ["in", "out"] * 3


def test_the_app_needs_no_torch_and_does_nothing_when_it_is_only_imported() -> None:
    code = """
import sys
import mlflow_kdguard.plugin.app.entry
print([m for m in ("torch", "onnxruntime", "mlflow_kdguard.pipeline") if m in sys.modules])
"""
    quiet = {k: v for k, v in os.environ.items() if k != "KDGUARD_SERVER"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=quiet
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_behind_a_static_prefix_every_route_is_there_with_and_without_it() -> None:
    code = """
import sys, warnings
warnings.simplefilter("ignore")
from starlette.routing import Match
from mlflow_kdguard.plugin.app.access import Open
from mlflow_kdguard.plugin.app.gated import GatedServer
from mlflow_kdguard.plugin.app.routes import _Own, own_app
own = _Own(own_app(GatedServer(None, None, Open(), "/ml")))
for path in ("/kdguard", "/kdguard/log", "/api/2.0/kdguard/status", "/metrics", "/health/ready"):
    for prefix in ("", "/ml"):
        scope = {"type": "http", "method": "GET", "path": prefix + path, "root_path": "",
                 "headers": [], "query_string": b""}
        print(own.matches(scope)[0] is Match.FULL)
for path in ("/health", "/api/2.0/mlflow/runs/get", "/", "/kdguardian", "/other/kdguard"):
    print(own.matches({"type": "http", "method": "GET", "path": path, "root_path": "",
                       "headers": [], "query_string": b""})[0] is Match.NONE)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"] * 15, done.stdout + done.stderr


# ── What people and scrapers see ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ["–"]),
        (True, ["yes"]),
        (0.021398296831652525, ["0.0214"]),
        (1e-06, ["1e-06"]),
        (100, ["100"]),
        ("ab" * 32, ["abababababab…"]),
        ([], ["none"]),
        (["ab" * 32, "x"], ["abababababab…, x"]),
        ({"share_lower": 0.2, "norm": "linf"}, ["share lower 0.2, norm linf"]),
        ([{"eps": 0.01}, {"eps": None}], ["eps 0.01", "eps –"]),
        ({"positions": [[23, 23], [0, 4]]}, ["positions (23, 23), (0, 4)"]),
    ],
)
def test_figures_read_well(value: object, text: list[str]) -> None:
    assert figures.figures(value) == text


def test_every_rule_has_a_title_and_its_limit_a_direction() -> None:
    assert set(figures.TITLES) == {rule.name for rule in RULES}
    assert figures.limits("accuracy", 0.03) == ["at most 0.03"]
    assert figures.limits("certificate.signers", 1) == ["at least 1"]
    assert figures.limits("certificate.expiry", 90.0) == ["at most 90 days"]
    assert figures.limits("asr.changed", 0.95) == ["at least 0.95"]
    assert figures.limits("audit.teacher", "ran") == ["ran"]
    assert figures.limits("another", 3) == ["3"]
    assert figures.title("another") == "another"


def test_templates_escape_and_miss_nothing() -> None:
    environment = page._environment()
    assert environment.autoescape is True
    assert environment.from_string("{{ x }}").render(x="<script>'\"") == "&lt;script&gt;&#39;&#34;"
    folder = Path(page.__file__).parent
    for template in (folder / "templates").iterdir():
        text = template.read_text("utf-8")
        assert "|safe" not in text.replace(" ", "")
        assert "<script" not in text
        assert " style=" not in text
        assert " on" + "click" not in text


def test_figures_for_prometheus_are_escaped() -> None:
    series = {metrics._labels(action='a"b\\c\nd'): 2.0, metrics._labels(action="z"): 0.5}
    assert list(metrics._written("x", "gauge", "Told.", series))[2:] == [
        'kdguard_x{action="a\\"b\\\\c\\nd"} 2',
        'kdguard_x{action="z"} 0.5',
    ]
