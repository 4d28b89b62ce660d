"""load_verified() on real stores: the certified bytes, or a reason; never anything else."""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import toys
from flows.gates import Gate, gated
from flows.operators import toy_bundle
from flows.promoted import (
    certify,
    champion,
    folder_of,
    local,
    now,
    opened,
    signer,
    stored,
)
from flows.servers import PATIENCE, MlflowServer
from mlflow_kdguard import load_verified
from mlflow_kdguard.errors import CertificateError, ModelError, RegistryError, UsageError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.promoted.trust import KEYS, Revoked
from mlflow_kdguard.records import format_time
from mlflow_kdguard.registry import Registry

pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred.*:UserWarning")

BY, BUILDER = signer(), signer("Bea", "builder")
X = toys.images(5, (1, 2, 2))
NAMES = (f"m{i}" for i in itertools.count())
SWAPS, LOADS = 1000, 20
"""Swaps of the file while loading, and how many loads must pass, and be refused, meanwhile."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return local(tmp_path_factory.mktemp("verified"))


@pytest.fixture(scope="module")
def registry(store: str) -> Registry:
    return opened(store)


def loaded(store: str, uri: str, **options: Any) -> Any:
    return load_verified(uri, **({"keys": BY.verifier, "tracking_uri": store} | options))


def test_what_is_certified_is_loaded_and_answers(store: str, registry: Registry) -> None:
    name = next(NAMES)
    uri = champion(registry, name, BY, seed=3)
    model = loaded(store, f"models:/{name}@champion", role="verifier")
    blob = toys.onnx_tiny(seed=3)
    assert (model.uri, model.sha256) == (uri, sha256(blob))
    assert model.provider == "CPUExecutionProvider"
    assert model.certificate.model_name == name
    assert [s.owner for s in model.signers] == ["Vic"]
    session = ort.InferenceSession(blob)
    expected = session.run(None, {session.get_inputs()[0].name: X})[0]
    assert np.array_equal(model.predict(X), expected)
    assert np.array_equal(model.predict(X.tolist(), batch=2), expected)
    with pytest.raises(ModelError, match="takes float32 images"):
        model.predict(X[0])


def test_it_goes_on_with_the_bytes_that_it_loaded(store: str, registry: Registry) -> None:
    name = next(NAMES)
    uri = champion(registry, name, BY)
    model = loaded(store, uri)
    before = model.predict(X)
    shutil.rmtree(folder_of(registry, uri))
    assert np.array_equal(model.predict(X), before)
    with pytest.raises(RegistryError):
        loaded(store, uri)


def test_keys_from_the_environment_and_no_keys(
    store: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = champion(registry, next(NAMES), BY)
    monkeypatch.delenv(KEYS, raising=False)
    with pytest.raises(UsageError, match=KEYS):
        loaded(store, uri, keys=None)
    (tmp_path / "vic.pub").write_bytes(BY.verifier.to_bytes())
    monkeypatch.setenv(KEYS, str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert load_verified(uri).uri == uri


@pytest.mark.parametrize("uri", ["", "x", "/tmp", "models:x/1", "models:/x", "models:/x/latest"])
def test_only_registered_models_are_loaded(store: str, uri: str) -> None:
    with pytest.raises(UsageError):
        loaded(store, uri)


def test_every_reason_is_a_certificate_error_that_names_it(store: str, registry: Registry) -> None:
    uri = champion(registry, next(NAMES), BUILDER, expires=format_time(now() + timedelta(days=1)))
    both = [BY.verifier, BUILDER.verifier]
    for options, reason in (
        ({"keys": BY.verifier}, "unknown key"),
        ({"keys": both, "role": "verifier"}, "no verifier signed"),
        ({"keys": both, "registry": "http://elsewhere"}, "'http://elsewhere'"),
        ({"keys": both, "revoked": Revoked(keys={BUILDER.key_id: "2020-01-01T00:00:00Z"})},
         "compromised since 2020-01-01T00:00:00Z"),
    ):  # fmt: skip
        with pytest.raises(CertificateError, match=reason):
            loaded(store, uri, **options)
    assert loaded(store, uri, keys=both, role="builder", registry=[registry.identity, "b"]).uri
    bare = stored(registry, next(NAMES))
    with pytest.raises(CertificateError, match="carries no certificate"):
        loaded(store, bare)


def test_figures_that_are_the_builders_own_are_no_verifiers(store: str, registry: Registry) -> None:
    uri = champion(registry, next(NAMES), BY, figures_from="imported")
    assert loaded(store, uri).certificate.figures_from == "imported"
    with pytest.raises(CertificateError, match="imported, not recomputed"):
        loaded(store, uri, role="verifier")


def test_expiry_warns_unless_it_is_to_refuse(
    store: str, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    uri = champion(registry, next(NAMES), BY, expires=format_time(now() - timedelta(minutes=1)))
    with caplog.at_level(logging.WARNING, "mlflow_kdguard"):
        assert loaded(store, uri).uri == uri
    assert "expired at" in caplog.text
    with pytest.raises(CertificateError, match="expired at"):
        loaded(store, uri, expired="refuse")


def test_a_certificate_that_was_copied_to_another_model_is_refused(
    store: str, registry: Registry
) -> None:
    made = certify(registry, stored(registry, next(NAMES), seed=1), BY)
    other = stored(registry, next(NAMES), seed=1)
    registry.store_certificate(other, made)
    with pytest.raises(CertificateError, match="issued for the model"):
        loaded(store, other)


def test_plain_mlflow_has_loaded_it_from_here_before(store: str, registry: Registry) -> None:
    """MLflow leaves a note in a stored folder of this machine; anything else there is refused."""
    import mlflow

    name = next(NAMES)
    uri = champion(registry, name, BY)
    mlflow.set_tracking_uri(store)
    mlflow.pyfunc.load_model(f"models:/{name}@champion")
    note = folder_of(registry, uri) / "registered_model_meta"
    assert note.is_file()
    assert loaded(store, uri).uri == uri
    note.write_text(note.read_text() + "code: evil\n")
    with pytest.raises(CertificateError, match="registered_model_meta"):
        loaded(store, uri)


# ── Races ───────────────────────────────────────────────────────────────────────────────────────


def _renamed(path: Path, data: bytes) -> None:
    draft = path.parent.parent / "draft"  # beside the stored folder, on the same disk
    draft.write_bytes(data)
    draft.replace(path)


def _overwritten(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.truncate(len(data) // 2)
        file.write(data)


@contextmanager
def swapping(path: Path, write: Callable[[Path, bytes], None], other: bytes) -> Iterator[list[int]]:
    """Swap the file for another and back, all the time, about a thousand times a second."""
    true, done, stop = path.read_bytes(), [0], threading.Event()

    def swap() -> None:
        while not stop.wait(0.001):
            write(path, other if done[0] % 2 == 0 else true)
            done[0] += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()
        path.write_bytes(true)


@pytest.mark.parametrize("write", [_renamed, _overwritten])
def test_whatever_races_with_the_loading_the_digest_is_the_certified_one(
    store: str, registry: Registry, write: Callable[[Path, bytes], None]
) -> None:
    name = next(NAMES)
    uri = champion(registry, name, BY, seed=1)
    path = folder_of(registry, uri) / "model.onnx"
    certified, foreign = sha256(path.read_bytes()), toys.onnx_tiny(seed=2)
    expected = loaded(store, uri).predict(X)
    outcomes = {"loaded": 0, "refused": 0}
    with swapping(path, write, foreign) as swaps:
        start = time.monotonic()
        while swaps[0] < SWAPS or min(outcomes.values()) < LOADS:
            assert time.monotonic() - start < PATIENCE, (swaps, outcomes)
            try:
                model = loaded(store, f"models:/{name}@champion")
            except CertificateError:
                outcomes["refused"] += 1
                continue
            assert model.sha256 == certified
            assert np.array_equal(model.predict(X), expected)
            outcomes["loaded"] += 1


def test_the_alias_is_resolved_once(store: str, registry: Registry) -> None:
    """While the alias moves between two certified versions, bytes and version stay together."""
    name = next(NAMES)
    digests = {champion(registry, name, BY, seed=n): sha256(toys.onnx_tiny(seed=n)) for n in (1, 2)}
    stop = threading.Event()

    def move() -> None:
        for uri in itertools.cycle(digests):
            if stop.is_set():
                return
            registry.promote(uri, "champion")

    thread = threading.Thread(target=move)
    thread.start()
    try:
        seen = [loaded(store, f"models:/{name}@champion") for _ in range(40)]
    finally:
        stop.set()
        thread.join()
    assert all(digests[model.uri] == model.sha256 for model in seen)
    assert {model.uri for model in seen} == set(digests)


# ── A server ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_server_whose_artifacts_are_swapped_by_another_process(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    registry, name = opened(mlflow_server.uri), next(NAMES)
    uri = champion(registry, name, BY, seed=1)
    source = str(registry._versions.find(uri).source).removeprefix("mlflow-artifacts:/")
    path = mlflow_server.artifacts / source / "model.onnx"
    true, other, count = tmp_path / "true", tmp_path / "other", tmp_path / "count"
    true.write_bytes(path.read_bytes())
    other.write_bytes(toys.onnx_tiny(seed=2))
    code = (
        "import os, shutil, sys\n"
        "path, *files, count = sys.argv[1:]\n"
        f"for n in range({SWAPS} + 1):\n"
        "    shutil.copyfile(files[n % 2], path + '.draft')\n"
        "    os.replace(path + '.draft', path)\n"
        "    open(count, 'w').write(str(n))\n"
    )
    swapper = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(other), str(true), str(count)]
    )
    results, start = set(), time.monotonic()
    while swapper.poll() is None or "loaded" not in results:
        assert time.monotonic() - start < PATIENCE, results
        try:
            model = loaded(mlflow_server.uri, f"models:/{name}@champion")
        except (CertificateError, RegistryError):
            results.add("refused")
            if swapper.poll() is not None:
                path.write_bytes(true.read_bytes())
            continue
        assert model.sha256 == sha256(true.read_bytes())
        results.add("loaded")
    assert count.read_text() == str(SWAPS)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with gated(tmp_path_factory.mktemp("gated")) as found:
        yield found


@pytest.mark.slow
def test_a_gated_server_serves_what_was_promoted_whatever_is_written_since(gate: Gate) -> None:
    import mlflow

    keys, files = gate.operator.folder / "keys", toy_bundle()
    versions = [gate.certified("gated", files), gate.certified("gated", files)]
    for version, alias in zip(versions, ("champion", "production"), strict=True):
        gate.promote("gated", version, alias)
    mlflow.set_tracking_uri(gate.uri)
    for alias in ("champion", "production"):  # each leaves a note in the one folder of both
        mlflow.pyfunc.load_model(f"models:/gated@{alias}")
    for alias, version in (("champion", versions[0]), ("production", versions[1])):
        model = loaded(gate.uri, f"models:/gated@{alias}", keys=keys, role="verifier")
        assert model.uri == f"models:/gated/{version}"
        assert model.sha256 == sha256(files["model.onnx"])
    run = gate.client.get_model_version("gated", versions[0]).run_id
    gate.upload(run, toy_bundle(), "model")
    assert loaded(gate.uri, "models:/gated@champion", keys=keys).sha256 == model.sha256


# ── Where it runs ───────────────────────────────────────────────────────────────────────────────

PROGRAM = """
import json, sys
from mlflow_kdguard import load_verified
model = load_verified(sys.argv[1], keys=sys.argv[2], tracking_uri=sys.argv[3])
print(json.dumps([model.uri, model.sha256, "torch" in sys.modules]))
"""


def test_neither_torch_nor_a_flavour_is_needed(
    store: str, registry: Registry, tmp_path: Path
) -> None:
    uri = champion(registry, next(NAMES), BY, seed=4)
    key = tmp_path / "vic.pub"
    key.write_bytes(BY.verifier.to_bytes())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, uri, str(key), store],
        env={k: v for k, v in os.environ.items() if not k.startswith("COV")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [uri, sha256(toys.onnx_tiny(seed=4)), False]
