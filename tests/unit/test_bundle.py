"""What a guarded model may consist of: the attacks of the threat model, and what MLflow writes."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlflow_kdguard import bundle
from mlflow_kdguard.errors import KDGuardError, ModelError, UnsafeModelError, UsageError
from mlflow_kdguard.files import sha256

ONNX = b"the student"
MLMODEL: dict[str, Any] = {
    "flavors": {
        "onnx": {
            "code": None, "data": "model.onnx", "onnx_session_options": None,
            "onnx_version": "1.23.2", "providers": ["CPUExecutionProvider"],
        },
        "python_function": {
            "data": "model.onnx", "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
            "loader_module": "mlflow.onnx", "python_version": "3.11.7",
        },
    },
    "is_signature_from_type_hint": False, "metadata": {"kdguard": {"sha256": sha256(ONNX)}},
    "mlflow_version": "3.17.2", "model_id": None, "model_size_bytes": 71, "model_uuid": "2f",
    "prompts": None, "signature": {"inputs": "[]", "outputs": "[]", "params": None},
    "type_hint_from_example": False, "utc_time_created": "1970-01-01 00:00:00",
}  # fmt: skip
CONDA: dict[str, Any] = {
    "channels": ["conda-forge"], "name": "mlflow-env",
    "dependencies": ["python=3.11.7", "pip<=23.2.1", {"pip": ["mlflow==3.17.2", "numpy==2.4.6"]}],
}  # fmt: skip
ENV: dict[str, Any] = {
    "python": "3.11.7", "build_dependencies": ["pip==23.2.1", "setuptools==84.2.1", "wheel"],
    "dependencies": ["-r requirements.txt"],
}  # fmt: skip


def files(
    mlmodel: Any = MLMODEL, conda: Any = CONDA, env: Any = ENV, **more: Any
) -> dict[str, Any]:
    made = {
        "model.onnx": ONNX,
        "MLmodel": yaml.safe_dump(mlmodel).encode(),
        "conda.yaml": yaml.safe_dump(conda).encode(),
        "python_env.yaml": yaml.safe_dump(env).encode(),
        "requirements.txt": b"mlflow==3.17.2\nonnxruntime-gpu==1.27.0\nnumpy==2.4.6",
    }
    return made | more


def changed(*path: str, to: Any) -> dict[str, Any]:
    """MLMODEL with one value replaced."""
    value = yaml.safe_load(yaml.safe_dump(MLMODEL))
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return dict(value)


def test_what_mlflow_writes_for_an_onnx_model_is_accepted() -> None:
    bundle.check(files())
    bundle.check({name: files()[name] for name in ("model.onnx", "MLmodel", "conda.yaml",
                                                   "python_env.yaml")})  # fmt: skip


@pytest.mark.parametrize(
    "mlmodel",
    [
        changed("flavors", "onnx", "data", to="other.onnx"),
        changed("flavors", "python_function", "data", to="other.onnx"),
        changed("flavors", "python_function", "data", to="./model.onnx"),
        changed("flavors", "python_function", "data", to=None),
        changed("flavors", "python_function", "loader_module", to="mlflow.pytorch"),
        changed("flavors", "python_function", "loader_module", to="evil"),
        changed("flavors", "python_function", "code", to="code"),
        changed("flavors", "python_function", "config", to={"a": 1}),
        changed("flavors", "python_function", "model_code_path", to="model.onnx"),
        changed("flavors", "python_function", "env", to="conda.yaml"),
        changed("flavors", "python_function", "env", to={"conda": "http://evil/conda.yaml"}),
        changed("flavors", "onnx", "code", to="code"),
        changed("flavors", "onnx", "onnx_session_options", to={"custom_ops": "evil.so"}),
        changed("flavors", "onnx", "providers", to=["TensorrtExecutionProvider"]),
        changed("flavors", "onnx", "providers", to=[["CUDAExecutionProvider", {"x": 1}]]),
        changed("flavors", "pytorch", to={"model_data": "data"}),
        changed("flavors", "python_function", to="mlflow.onnx"),
        changed("flavors", to=[]),
        changed("flavors", to={"onnx": MLMODEL["flavors"]["onnx"]}),
        changed("metadata", to={"kdguard": {"sha256": sha256(b"another student")}}),
        changed("metadata", to={"kdguard": {"sha256": sha256(ONNX)}, "other": 1}),
        changed("metadata", to=["kdguard"]),
        changed("saved_input_example_info", to={"artifact_path": "input.json"}),
        changed("auth_policy", to={"system": 1}),
        changed("artifact_path", to="elsewhere"),
        [],
        "text",
        None,
    ],
)
def test_an_mlmodel_that_could_serve_anything_else(mlmodel: Any) -> None:
    with pytest.raises(UnsafeModelError, match="MLmodel"):
        bundle.check(files(mlmodel))


@pytest.mark.parametrize(
    "extra",
    [
        "code/evil.py", "other.onnx", "model.onnx.data", "registered_model_meta", "input.json",
        "python_model.pkl", "./model.onnx", "Model.onnx", "mlmodel", "data/model.onnx", ".hidden",
    ],
)  # fmt: skip
def test_an_additional_file(extra: str) -> None:
    with pytest.raises(UnsafeModelError) as refused:
        bundle.check(files() | {extra: b""})
    assert repr(extra) in str(refused.value)


@pytest.mark.parametrize("name", ["model.onnx", "MLmodel"])
def test_a_missing_file(name: str) -> None:
    with pytest.raises(ModelError, match=f"lacks {name}"):
        bundle.check({key: data for key, data in files().items() if key != name})


@pytest.mark.parametrize("name", ["conda.yaml", "python_env.yaml"])
def test_an_environment_that_is_named_must_be_there(name: str) -> None:
    with pytest.raises(UnsafeModelError, match=name):
        bundle.check({key: data for key, data in files().items() if key != name})


@pytest.mark.parametrize(
    "line",
    [
        "torch==2.9", "evil", "mlflow @ https://evil/mlflow.whl", "git+https://evil/mlflow",
        "-r other.txt", "--index-url https://evil", "-e .", "./evil.whl",
        "numpy==1 --hash=sha256:0", "numpy; os_name == 'x'", "mIflow==3.17.2", "numpy[evil]",
    ],
)  # fmt: skip
def test_a_requirement_that_serving_does_not_need(line: str) -> None:
    with pytest.raises(UnsafeModelError, match=r"requirements\.txt requires"):
        bundle.check(files() | {"requirements.txt": f"numpy==2.4.6\n{line}\n".encode()})
    pip = [{"pip": [line]}]
    with pytest.raises(UnsafeModelError, match=r"conda\.yaml requires"):
        bundle.check(files(conda=CONDA | {"dependencies": pip}))


@pytest.mark.parametrize(
    "conda",
    [
        CONDA | {"channels": ["https://evil"]},
        CONDA | {"dependencies": ["python=3.11", "evil"]},
        CONDA | {"dependencies": [{"npm": ["evil"]}]},
        CONDA | {"dependencies": "python"},
        CONDA | {"prefix": "/"},
    ],
)
def test_a_conda_environment_that_installs_anything_else(conda: Any) -> None:
    with pytest.raises(UnsafeModelError, match=r"conda\.yaml"):
        bundle.check(files(conda=conda))


@pytest.mark.parametrize(
    "env",
    [
        ENV | {"dependencies": ["-r other.txt"]},
        ENV | {"dependencies": ["-r requirements.txt", "evil"]},
        ENV | {"build_dependencies": ["evil"]},
        ENV | {"other": 1},
        {"build_dependencies": {"pip": 1}},
    ],
)
def test_a_python_environment_that_installs_anything_else(env: Any) -> None:
    with pytest.raises(UnsafeModelError, match=r"python_env\.yaml"):
        bundle.check(files(env=env))


@pytest.mark.parametrize("data", [b"\xff", b"{", b"a" * 70_000, b"!!python/name:os.system\n"])
@pytest.mark.parametrize("name", ["MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"])
def test_what_is_no_text_of_mlflow(name: str, data: bytes) -> None:
    with pytest.raises(KDGuardError, match=name):
        bundle.check(files() | {name: data})


# ── Folders ─────────────────────────────────────────────────────────────────────────────────────


def written(folder: Path) -> Path:
    for name, data in files().items():
        (folder / name).write_bytes(data)
    return folder


def test_a_folder_is_read_with_its_subfolders(tmp_path: Path) -> None:
    (written(tmp_path) / "code").mkdir()
    (tmp_path / "code" / "evil.py").write_bytes(b"import os")
    found = bundle.read(tmp_path)
    assert found == files() | {"code/evil.py": b"import os"}
    with pytest.raises(UnsafeModelError, match=r"code/evil\.py"):
        bundle.check(found)


def test_links_and_special_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    written(folder)
    (folder / "link").symlink_to("model.onnx")
    with pytest.raises(UnsafeModelError, match="link"):
        bundle.read(folder)
    (folder / "link").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(UnsafeModelError, match="pipe"):
        bundle.read(folder)
    (tmp_path / "alias").symlink_to(folder)
    with pytest.raises(UsageError, match="not a folder"):
        bundle.read(tmp_path / "alias")
    with pytest.raises(UsageError, match="not a folder"):
        bundle.read(tmp_path / "none")


def test_what_mlflow_itself_saves_is_accepted(tmp_path: Path) -> None:
    """The check and the generator must not drift apart."""
    from mlflow_kdguard.registry.bundle import student_files

    bundle.check(student_files(_classifier()))


def _classifier() -> bytes:
    from onnx import TensorProto, helper

    shape, classes = ["N", 1, 2, 2], 4
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["y"], axis=1)],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", classes])],
    )
    opset = helper.make_opsetid("", 18)
    return bytes(helper.make_model(graph, ir_version=10, opset_imports=[opset]).SerializeToString())


BOMB = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]" for i in range(1, 12))])


@pytest.mark.parametrize("name", ["MLmodel", "conda.yaml", "python_env.yaml"])
@pytest.mark.parametrize(
    "text", [BOMB + "\nname: *a11", "name: !!bool x", "name: !!timestamp x", "name: a\nname: b"]
)
def test_yaml_that_is_not_plain_is_refused_at_once(name: str, text: str) -> None:
    """A few aliases stand for gigabytes; PyYAML's own constructors raise errors of any kind."""
    with pytest.raises(UnsafeModelError, match="not plain YAML"):
        bundle.check(files(**{name: text.encode()}))
