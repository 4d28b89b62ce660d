"""Export: canonical, deterministic, atomic, and believed only after comparison."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import toys
from mlflow_kdguard import export, graph
from mlflow_kdguard.config import ExportSection
from mlflow_kdguard.errors import ExportError, ModelError, NonFiniteError, UsageError
from mlflow_kdguard.nets import emit

CPU = torch.device("cpu")


def exported(net: nn.Module, path: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "shape": (1, 8, 8), "classes": 10, "images": toys.images(70), "config": ExportSection(),
        "device": CPU,
    }  # fmt: skip
    return export.to_onnx(net, path, **(options | changes))


def test_the_file_is_what_the_record_says(tmp_path: Path) -> None:
    net = toys.cnn()
    record = exported(net, tmp_path / "deep" / "net.onnx")
    data = (tmp_path / "deep" / "net.onnx").read_bytes()
    read = graph.read(data, where="net")
    assert record.sha256 == read.sha256
    assert (record.parity.argmax.k, record.parity.argmax.n) == (70, 70)
    assert record.parity.softmax_max < 1e-6
    assert record.parity.provider == "CPUExecutionProvider"
    model = onnx.ModelProto.FromString(data)
    assert (model.ir_version, model.opset_import[0].version) == (10, 18)
    assert [(value.name) for value in model.graph.input] == ["x"]
    assert [(value.name) for value in model.graph.output] == ["logits"]
    assert model.graph.node[0].op_type == "Clip"
    assert [node.op_type for node in model.graph.node].count("Clip") == 1
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "net.onnx"]
    assert not any(text in data for text in (b"/tmp", b"/work", b"0x7", b".py"))


def test_weights_beyond_float32_are_told_from_an_export_that_went_wrong(tmp_path: Path) -> None:
    """What a diverged network looks like: large terms that cancel, and logits of ordinary size."""
    net = toys.net("mlp:8")
    first, last = (module for module in net.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        first.bias.fill_(3e5)
        last.weight[:, 4:] = -last.weight[:, :4]
    with pytest.raises(ExportError, match="exact arithmetic disagree") as caught:
        exported(net, tmp_path / "net.onnx")
    assert "too large for float32" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_values_outside_the_pixels_give_what_their_clipped_form_gives(tmp_path: Path) -> None:
    class Bare(nn.Module):
        """A network that does not clip by itself."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.flatten(1))

    wild = np.linspace(-10, 300, 5 * 64, dtype=np.float32).reshape(5, 1, 8, 8)
    for net in (toys.cnn(), Bare()):
        exported(net, tmp_path / "net.onnx")
        session = onnxruntime.InferenceSession(
            tmp_path / "net.onnx", providers=["CPUExecutionProvider"]
        )
        outputs = [session.run(None, {"x": x})[0] for x in (wild, wild.clip(0, 1))]
        np.testing.assert_array_equal(*outputs)


def test_the_same_weights_give_the_same_bytes_in_any_process() -> None:
    here = emit.to_bytes(toys.resnet(seed=9), (1, 8, 8), opset=18)
    assert here == emit.to_bytes(toys.resnet(seed=9), (1, 8, 8), opset=18)
    assert here != emit.to_bytes(toys.resnet(seed=8), (1, 8, 8), opset=18)
    program = (
        "import sys, toys; from mlflow_kdguard.nets import emit; "
        "sys.stdout.buffer.write(emit.to_bytes(toys.resnet(seed=9), (1, 8, 8), opset=18))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "77"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == here
    assert run.stderr == b""


def test_export_says_nothing_and_leaves_the_network_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = toys.cnn().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported(net, tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("opset", [18, 21])
def test_operator_sets(opset: int, tmp_path: Path) -> None:
    exported(toys.resnet(), tmp_path / "net.onnx", config=ExportSection(opset=opset))
    model = onnx.load(tmp_path / "net.onnx")
    assert model.opset_import[0].version == opset


class Everything(nn.Module):
    """One of every operation that can be written."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding="same", dilation=2)
        self.strided = nn.Conv2d(4, 4, 2, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.norm1 = nn.BatchNorm1d(5)
        self.linear = nn.Linear(16, 5, bias=False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("choose", torch.eye(5)[:, :3].clone())
        self.mask = nn.Parameter(torch.linspace(-2, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(min=0).clamp(max=1) * 2 - 0.5
        x = functional.relu6(self.conv(x), inplace=True)
        x = x * (1 - torch.sigmoid(self.mask).view(-1, 1, 1))
        x = self.norm(self.strided(functional.pad(x, (1, 0, 0, 1))))
        y = functional.max_pool2d(functional.pad(x, (0, 1, 1, 0), value=-torch.inf), 2, stride=1)
        z = functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        x = torch.maximum(x, z) + torch.minimum(y, z).contiguous()
        x = self.drop(1.0 - x) / 2
        x = torch.nn.functional.hardtanh(-x, -3.0, 3.0)
        x += torch.add(y, z, alpha=2)
        x = functional.adaptive_avg_pool2d(x, 2)
        x = x.view(x.size(0), -1)
        x = self.norm1(self.linear(x.unsqueeze(1).squeeze(1)))
        return torch.rsub(x @ self.choose, 1.0).float()


def test_every_operation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Everything()
    with torch.no_grad():
        net.norm.running_mean.uniform_(-1, 1)
        net.norm1.running_var.uniform_(0.5, 2)
    exported(net, tmp_path / "net.onnx", classes=3)


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0, keepdim=True)).flatten(1)[:, :10]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class Sigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sigmoid()


class Maps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.flatten(1)


class Padded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x, (1, 1, 1, 1)).flatten(1)


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.div(x, 0.3, rounding_mode="floor").flatten(1)


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x).flatten(1)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.5, training=True).flatten(1)


class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).flatten(1)


@pytest.mark.parametrize(
    "kind",
    [Rows, Branching, Fixed, Sigmoid, Maps, Pair, Padded, Rounded, Product, Noisy, BatchStatistics],
)
def test_what_has_no_canonical_form_is_named_and_not_written(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        exported(kind(), tmp_path / "net.onnx", classes=64)
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_unsupported_layers_are_named(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softplus())
    with pytest.raises(ModelError, match=r"softplus in layer 2"):
        exported(net, tmp_path / "net.onnx")


def test_a_network_that_diverged_is_not_written(tmp_path: Path) -> None:
    net = toys.mlp()
    with torch.no_grad():
        net.body.linear1.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        exported(net, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_disagrees_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is made to drop a bias: the comparison must notice."""
    other = toys.cnn(seed=1)
    forged = emit.to_bytes(other, (1, 8, 8), opset=18)
    monkeypatch.setattr(emit, "to_bytes", lambda *_args, **_options: forged)
    with pytest.raises(ExportError, match="disagrees") as caught:
        exported(toys.cnn(seed=0), tmp_path / "net.onnx")
    assert caught.value.exit_code == 7
    assert not list(tmp_path.iterdir())
    exported(other, tmp_path / "net.onnx")


def test_ties_may_swap_but_other_classes_may_not() -> None:
    expected = np.array([[1.0, 1.0 + 1e-6, 0.0]], dtype=np.float32)
    assert export._same_class(expected, np.array([[1.0, 0.9999, 0.0]], dtype=np.float32)).all()
    expected = np.array([[1.0, 1.001, 0.0]], dtype=np.float32)
    assert not export._same_class(expected, np.array([[1.1, 1.0, 0.0]], dtype=np.float32)).any()


def test_a_graph_that_looks_across_the_batch_is_caught() -> None:
    """Batch mixing cannot be read, so the comparison is asked directly."""
    nodes = [
        toys.node("ReduceMean", ("p", "zero"), "m", keepdims=1),
        toys.node("Sub", ("p", "m"), "s"),
        toys.node("Flatten", ("s",), "logits"),
    ]
    model = toys.proto(nodes, [toys.constant("zero", [0], np.int64)], shape=(1, 2, 2), classes=4)
    runtime = export._runtime(model.SerializeToString(), CPU)
    with pytest.raises(ExportError, match="batches of 1, 2, 64"):
        export._compare_batches(runtime, toys.images(5, (1, 2, 2)))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"classes": 9}, ModelError, "10 classes"),
        ({"images": toys.images(0)}, UsageError, "cannot test"),
        ({"images": toys.images(4, (1, 7, 8))}, UsageError, "cannot test"),
        ({"images": toys.images(4)[0]}, UsageError, "cannot test"),
    ],
)
def test_data_that_do_not_fit(
    changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        exported(toys.mlp(), tmp_path / "net.onnx", **changes)


def test_an_unwritable_place_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write"):
        exported(toys.mlp(), tmp_path / "file" / "net.onnx")
