"""Bad input on the command line: the documented exit code, one clear line, nothing executed."""

import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import toys
from mlflow_kdguard.attest import signing
from mlflow_kdguard_cli.main import answer


class Payload:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@dataclass(frozen=True)
class Place:
    """A folder with one good model and what the cases need."""

    folder: Path
    good: Path
    mark: Path

    def write(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.write_bytes(data)
        return str(path)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    good = tmp_path / "good.onnx"
    good.write_bytes(toys.onnx_tiny(shape=(1, 8, 8), classes=10))
    return Place(tmp_path, good, tmp_path / "executed")


def _audit(model: str) -> list[str]:
    return ["audit", model, "--data", "digits#train[:50]"]


def _edited(place: Place, edit: Callable[[onnx.ModelProto], None]) -> list[str]:
    model = onnx.load_from_string(place.good.read_bytes())
    edit(model)
    return _audit(place.write("edited.onnx", model.SerializeToString()))


def _nan_weights(model: onnx.ModelProto) -> None:
    first = model.graph.initializer[0]
    broken = numpy_helper.to_array(first).copy()
    broken.flat[0] = np.nan
    first.CopyFrom(numpy_helper.from_array(broken, first.name))


def _duplicate(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def _domain(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.example.evil"
    model.opset_import.append(helper.make_opsetid("com.example.evil", 1))


def _external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"


def _raw_pickle(place: Place) -> list[str]:
    return _audit(place.write("teacher.pkl", pickle.dumps(Payload(place.mark))))


def _pickle_named_pt(place: Place) -> list[str]:
    return _audit(place.write("teacher.pt", pickle.dumps(Payload(place.mark))))


def _torch_saved(place: Place) -> list[str]:
    torch.save({"weights": Payload(place.mark)}, place.folder / "whole.pt")
    return [*_audit(str(place.folder / "whole.pt")), "--arch", "mlp:8"]


def _archive(place: Place) -> list[str]:
    path = place.folder / "archive.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(place.mark)))
        archive.writestr("archive/version", "3")
    return [*_audit(str(path)), "--arch", "mlp:8"]


def _weights_of_another_shape(place: Place) -> list[str]:
    from safetensors.torch import save

    data = save({"body.0.weight": torch.zeros(3, 3)})
    return [*_audit(place.write("other.safetensors", data)), "--arch", "mlp:8"]


def _expired(place: Place) -> list[str]:
    return _certificate(place, expired=True, model=place.good)


def _another_file(place: Place) -> list[str]:
    other = place.folder / "other.onnx"
    other.write_bytes(toys.onnx_tiny(seed=1, shape=(1, 8, 8), classes=10))
    return _certificate(place, expired=False, model=other)


def _certificate(place: Place, *, expired: bool, model: Path) -> list[str]:
    from datetime import UTC, datetime, timedelta

    from mlflow_kdguard import attest
    from mlflow_kdguard.records import Certificate, Figures, Model, format_time

    issued = datetime.now(UTC) - timedelta(days=100)
    signer = signing.keygen(place.folder / "key.pem", owner="me", role="builder", now=issued)
    certificate = Certificate(
        subjects=attest.subjects_of({"model.onnx": place.good.read_bytes()}),
        model_name="toy",
        registry="",
        reference=Model(sha256="0" * 64),
        teacher=Model(sha256="1" * 64),
        data=(),
        triggers=(),
        figures=Figures(),
        figures_from="imported",
        config="2" * 64,
        seed=0,
        tools={},
        issued=format_time(issued),
        expires=format_time(issued + timedelta(days=90 if expired else 900)),
    )
    path = place.write("certificate.dsse.json", attest.issue(certificate, signer))
    key = str(place.folder / "key.pem.pub")
    return ["check", path, "--model", str(model), "--key", key]


def _config(place: Place, text: str) -> list[str]:
    return ["run", "-c", place.write("guard.yaml", text.encode())]


def _certify(place: Place, *more: str, data: str = "digits#test[:20]") -> list[str]:
    good = str(place.good)
    return ["certify", "--teacher", good, "--student", good, "--data", data, *more]


def _no_room(place: Place) -> list[str]:
    place.folder.joinpath("full").write_text("a file where a folder must be")
    return [
        "export",
        str(place.good),
        "--data",
        "digits#test[:20]",
        "--out",
        str(place.folder / "full" / "student.onnx"),
    ]


CASES: list[tuple[str, Callable[[Place], list[str]], int, str]] = [
    ("wrong path", lambda p: _audit(str(p.folder / "absent.onnx")), 2, "absent.onnx"),
    ("a folder", lambda p: _audit(str(p.folder)), 2, ""),
    ("empty file", lambda p: _audit(p.write("empty.onnx", b"")), 2, "empty.onnx is empty"),
    ("no model at all", lambda p: _audit(p.write("x.onnx", b"hello")), 5, "x.onnx"),
    ("unknown suffix", lambda p: _audit(p.write("x.bin", b"hello")), 5, "x.bin"),
    ("NaN weights", lambda p: _edited(p, _nan_weights), 5, "edited.onnx"),
    (
        "truncated ONNX",
        lambda p: _audit(p.write("t.onnx", p.good.read_bytes()[:-200])),
        5,
        "t.onnx",
    ),
    ("duplicate initializer", lambda p: _edited(p, _duplicate), 5, "edited.onnx"),
    ("custom domain", lambda p: _edited(p, _domain), 5, "com.example.evil"),
    ("external data", lambda p: _edited(p, _external), 5, "edited.onnx"),
    ("raw pickle", _raw_pickle, 5, "teacher.pkl"),
    ("pickle named .pt", _pickle_named_pt, 5, "teacher.pt"),
    ("pickled object in a torch archive", _torch_saved, 5, "whole.pt"),
    ("payload in an archive", _archive, 5, "archive.pt"),
    ("wrong architecture", _weights_of_another_shape, 5, "other.safetensors"),
    ("weights without architecture", lambda p: _weights_of_another_shape(p)[:-2], 2, "arch"),
    ("unknown architecture", lambda p: [*_weights_of_another_shape(p)[:-1], "vgg:9"], 2, "vgg:9"),
    (
        "wrong image shape",
        lambda p: _certify(p, "--eps", "0.01", data="mnist5k#test[:20]"),
        2,
        "(1, 28, 28)",
    ),
    ("unknown data set", lambda p: _certify(p, "--eps", "0.01", data="imagnet"), 2, "imagenet"),
    ("empty slice", lambda p: _certify(p, "--eps", "0.01", data="digits#test[9:9]"), 2, "9:9"),
    ("missing data file", lambda p: _certify(p, "--eps", "0.01", data="npz:no.npz"), 2, "no.npz"),
    ("negative eps", lambda p: _certify(p, "--eps", "-0.01"), 2, "--eps: "),
    ("endless", lambda p: _certify(p, "--eps", "0.01", "--budget", "nan"), 2, "--budget: "),
    ("negative steps", lambda p: _certify(p, "--eps", "0.01", "--steps", "-1"), 2, "--steps: "),
    ("unknown method", lambda p: _certify(p, "--eps", "0.01", "--method", "magic"), 2, "magic"),
    ("cuda without CUDA", lambda p: _certify(p, "--eps", "0.01", "--device", "cuda"), 2, "CUDA"),
    ("unwritable output", _no_room, 2, "student.onnx"),
    ("unknown key", lambda p: _config(p, "distil: {epochs: 3}"), 2, "distil: unknown key"),
    ("unknown inner key", lambda p: _config(p, "distill: {epoch: 3}"), 2, "distill.epoch"),
    ("not YAML", lambda p: _config(p, "distill: ["), 2, "guard.yaml"),
    ("malformed --set", lambda p: ["run", "--set", "epochs=3"], 2, "epochs=3"),
    (
        "no teacher",
        lambda p: [
            "run",
            "--out",
            str(p.folder / "w"),
            "--tracking-uri",
            f"sqlite:///{p.folder}/m.db",
        ],
        2,
        "no teacher is named",
    ),
    (
        "missing key",
        lambda p: ["gate", "models:/x/1", "--key", str(p.folder / "no.pub")],
        2,
        "no.pub",
    ),
    (
        "server not there",
        lambda p: [
            "audit",
            "models:/x/1",
            "--data",
            "digits",
            "--tracking-uri",
            "http://127.0.0.1:9",
        ],
        4,
        "127.0.0.1:9",
    ),
    ("expired certificate", _expired, 8, "expired"),
    ("certificate of another file", _another_file, 8, "other.onnx has the SHA-256"),
    (
        "certificate that is none",
        lambda p: ["check", p.write("c.json", b"{}"), "--model", str(p.good), "--key", _key(p)],
        8,
        "",
    ),
]


def _key(place: Place) -> str:
    signing.keygen(place.folder / "k.pem", owner="me", role="builder")
    return str(place.folder / "k.pem.pub")


@pytest.mark.parametrize(
    ("make", "code", "named"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_input(
    make: Callable[[Place], list[str]],
    code: int,
    named: str,
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "cuda" in str(make.__code__.co_consts) and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    argv = make(place)
    assert answer(argv) == code
    said = capsys.readouterr().err
    assert "error: " in said
    assert named in said
    assert "Traceback" not in said
    assert not place.mark.exists(), "a payload was executed"


def test_a_full_disk_leaves_nothing_half_written(place: Place) -> None:
    """The kernel refuses to write past a limit, as a full disk does."""
    out = place.folder / "student.onnx"

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))

    argv = ["export", str(place.good), "--data", "digits#test[:20]", "--out", str(out)]
    code = (
        f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"from mlflow_kdguard_cli.main import main; main({argv!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=no_room,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"cannot write {out}" in done.stderr
    assert not out.exists()
    assert not list(place.folder.glob(".student.onnx*"))
