"""Untrusted model files: what loads is exactly the weights, what does not runs nothing."""

import io
import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import toys
from mlflow_kdguard.errors import ModelError, UsageError
from mlflow_kdguard.nets import emit, load, taps


def logits(net: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(toys.images(4))).numpy()


def checkpoint(document: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(document, buffer, **options)
    return buffer.getvalue()


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("arch", toys.ARCHES)
def test_saved_networks_come_back_bit_for_bit(arch: str, tmp_path: Path) -> None:
    net = toys.net(arch, seed=3)
    load.save(net, tmp_path)
    back = load.load(tmp_path / load.WEIGHTS)
    assert not back.training
    assert back.architecture == net.architecture
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])


def test_saving_is_deterministic(tmp_path: Path) -> None:
    load.save(toys.cnn(seed=1), tmp_path / "a")
    load.save(toys.cnn(seed=1), tmp_path / "b")
    for name in (load.WEIGHTS, load.ARCHITECTURE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_network_with_inserted_layers_is_not_saved_as_weights(tmp_path: Path) -> None:
    net = toys.cnn()
    taps.insert(net, "body.norm1", nn.BatchNorm2d(4))
    with pytest.raises(UsageError, match="layers were added"):
        load.save(net, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("nest", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_checkpoints_of_training_scripts(nest: str | None, prefix: str, tmp_path: Path) -> None:
    net = toys.cnn(seed=2)
    weights = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    document = weights if nest is None else {nest: weights, "epoch": 3, "optimizer": {"lr": 0.1}}
    path = write(tmp_path, "teacher.pt", checkpoint(document))
    back = load.load(path, architecture=net.architecture)
    np.testing.assert_array_equal(logits(back), logits(net))


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_of_a_bare_body_and_old_files(legacy: bool, tmp_path: Path) -> None:
    net = toys.cnn(seed=2)
    data = checkpoint(net.body.state_dict(), _use_new_zipfile_serialization=not legacy)
    back = load.load(write(tmp_path, "t.pth", data), architecture=net.architecture)
    np.testing.assert_array_equal(logits(back), logits(net))


def test_onnx_alone(tmp_path: Path) -> None:
    net = toys.resnet(seed=4)
    path = write(tmp_path, "t.onnx", emit.to_bytes(net, (1, 8, 8), opset=18))
    back = load.load(path)
    np.testing.assert_allclose(logits(back), logits(net), atol=1e-6)
    assert all(weights.requires_grad for weights in back.parameters())
    with pytest.raises(ModelError, match="classes"):
        load.load(path, architecture=toys.architecture(classes=7))


def test_the_advice_works_as_printed(tmp_path: Path) -> None:
    """Run the printed lines on a pickled module; the result loads and computes the same."""
    net = toys.cnn(seed=5)
    path = write(tmp_path, "owner.pt", checkpoint(net))
    text = load.conversion_advice(path)
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    script = "\n".join(line for line in lines if not line.startswith("kdguard"))
    script = script.replace("C, H, W", "1, 8, 8")
    with warnings.catch_warnings():
        # Of torch's older exporter, which owners of old models have.
        warnings.simplefilter("ignore", DeprecationWarning)
        exec(compile(script, "advice", "exec"), {})
    for name in ("owner.onnx", "owner.safetensors"):
        back = load.load(tmp_path / name, architecture=net.architecture)
        np.testing.assert_allclose(logits(back), logits(net), atol=1e-6)


def test_missing_path_folder_and_architecture(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load.load(tmp_path / "nowhere.pt", architecture=toys.architecture())
    with pytest.raises(ModelError, match="folder"):
        load.load(tmp_path, architecture=toys.architecture())
    path = write(tmp_path, "t.pt", checkpoint(toys.cnn().state_dict()))
    with pytest.raises(UsageError, match=r"architecture\.json"):
        load.load(path)
    write(tmp_path, "architecture.json", b'{"arch": "cnn:4,6", "shape": [1, 8], "classes": "x"}')
    with pytest.raises(ModelError, match=r"shape.*classes"):
        load.load(path)


def test_a_stored_architecture_cannot_run_code(tmp_path: Path) -> None:
    document = toys.architecture("os.path:join").document()
    write(tmp_path, "architecture.json", json.dumps(document).encode())
    path = write(tmp_path, "t.pt", checkpoint(toys.cnn().state_dict()))
    with pytest.raises(UsageError, match="--trust-code"):
        load.load(path)


def test_weights_of_another_normalisation_are_refused(tmp_path: Path) -> None:
    net = toys.cnn()
    path = write(tmp_path, "t.pt", checkpoint(net.state_dict()))
    other = toys.architecture(mean=(0.1,), std=(0.5,))
    with pytest.raises(ModelError, match="another mean"):
        load.load(path, architecture=other)


def test_a_hostile_name_is_no_command_where_the_advice_is_pasted() -> None:
    """A file's name is its sender's: neither a shell nor Python may take a part of it as code."""
    text = load.conversion_advice(Path("x'; evil(1)\n    evil(2) #; touch evil.pkl"))
    python, shell = text.split("Then register the result:")
    assert not [line for line in python.splitlines() if line.strip().startswith("evil")]
    lines = [line[4:] for line in python.splitlines() if line.startswith("    ")]
    compile("\n".join(lines), "advice", "exec")
    command = shlex.split(shell)
    assert command[:5] == ["kdguard", "teacher", "register", "NAME", "--weights"]
    assert len(command) == 6
