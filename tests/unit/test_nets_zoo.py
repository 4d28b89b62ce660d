"""The zoo: shapes, seeds, and names that are refused."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import toys
from mlflow_kdguard.errors import ConfigError, ModelError, UsageError
from mlflow_kdguard.nets import architecture, zoo


@pytest.mark.parametrize("arch", [*toys.ARCHES, "resnet8", "wrn-16-1"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 12)])
def test_every_architecture_takes_any_shape(arch: str, shape: tuple[int, int, int]) -> None:
    net = toys.net(arch, shape=shape, classes=4)
    assert net(torch.rand(2, *shape)).shape == (2, 4)


def test_the_cnn_is_the_one_of_the_study() -> None:
    """Net(16) on 28×28: 5×5 stride 2, then 3×3 stride 2 twice, features 14, 7, 4, linear 4·4·64."""
    net = toys.net("cnn:16,32,64", shape=(1, 28, 28))
    sizes = {name: tuple(weights.shape) for name, weights in net.named_parameters()}
    assert sizes["body.conv1.weight"] == (16, 1, 5, 5)
    assert sizes["body.conv2.weight"] == (32, 16, 3, 3)
    assert sizes["body.conv3.weight"] == (64, 32, 3, 3)
    assert sizes["body.logits.weight"] == (10, 1024)


@pytest.mark.parametrize(
    ("arch", "shape", "weights"),
    [
        # Counted by hand for WRN-16-1; published: 0.69 M, 5.8 M, 11.69 M.
        ("wrn-16-1", (3, 32, 32), 175_066),
        ("wrn-16-2", (3, 32, 32), 691_674),
        ("wrn-28-4", (3, 32, 32), 5_849_050),
        ("torchvision:resnet18", (3, 32, 32), 11_689_512),
    ],
)
def test_known_sizes(arch: str, shape: tuple[int, int, int], weights: int) -> None:
    classes = 1000 if arch.startswith("torchvision") else 10
    with torch.device("meta"):
        maker = zoo._maker(toys.architecture(arch, shape=shape, classes=classes), trust_code=False)
        assert sum(tensor.numel() for tensor in maker().parameters()) == weights


def test_seeds_decide_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = toys.net(seed=1, settled=False).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    again = toys.net(seed=1, settled=False).state_dict()
    other = toys.net(seed=2, settled=False).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["body.conv1.weight"], other["body.conv1.weight"])


def test_pixels_are_clamped_and_normalised() -> None:
    net = toys.net(mean=(0.25,), std=(2.0,))
    seen: list[torch.Tensor] = []
    net.body.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    x = torch.tensor([-3.0, 0.0, 0.5, 1.0, 300.0]).repeat(13)[:64].reshape(1, 1, 8, 8)
    logits = net(x)
    assert torch.equal(seen[0], (x.clamp(0, 1) - 0.25) / 2.0)
    assert torch.equal(logits, net(x.clamp(0, 1)))


@pytest.mark.parametrize(
    "arch",
    [
        "mlp", "mlp:", "mlp:10,", "mlp:-3", "mlp:0", "mlp:99999", "cnn:a", "resnet9", "resnet8:x",
        "wrn-17-1", "wrn-16-0", "wrn-16", "torchvision:nothing", "torchvision:fcn_resnet50",
        "lenet", "mlp:" + ",".join(["1"] * 65),
    ],
)  # fmt: skip
def test_unknown_names_list_what_exists(arch: str) -> None:
    with pytest.raises(ConfigError, match=r"Known: mlp:100,100") as caught:
        toys.net(arch)
    assert repr(arch) in str(caught.value)


def test_a_name_cannot_ask_for_more_than_memory_holds() -> None:
    with pytest.raises(ConfigError, match="weights, more than"):
        toys.net("mlp:" + ",".join(["8192"] * 38))


def test_torchvision_networks() -> None:
    net = toys.net("torchvision:squeezenet1_1", shape=(1, 32, 32), classes=5)
    assert net(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(ConfigError, match="1 or 3 channels"):
        toys.net("torchvision:resnet18", shape=(4, 32, 32))


def test_own_code_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toyfactory.py").write_text(
        "from torch import nn\n"
        "def make(shape, classes):\n"
        "    c, h, w = shape\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, classes))\n"
        "def number(shape, classes):\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    wanted = toys.architecture("toyfactory:make")
    with pytest.raises(UsageError, match="--trust-code"):
        zoo.build(wanted, seed=0)
    assert "toyfactory" not in sys.modules
    net = zoo.build(wanted, seed=0, trust_code=True)
    assert isinstance(net.body, nn.Sequential)
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    for name, words in (
        ("toyfactory:number", "not a torch module"),
        ("toyfactory:nothing", "cannot be imported"),
        ("no_such_package:make", "cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=words):
            zoo.build(toys.architecture(name), seed=0, trust_code=True)
    monkeypatch.delitem(sys.modules, "toyfactory")


def test_architecture_records() -> None:
    record = toys.architecture()
    assert (record.mean, record.std) == ((0.5,), (0.5,))
    text = record.model_dump_json(by_alias=True).encode()
    assert architecture.parse(text, where="it") == record
    assert record.document()["schema"] == "kdguard.architecture/1"


@pytest.mark.parametrize(
    "document",
    [
        b"", b"{", b"[]", b"null", b'{"arch": "cnn:4"}',
        b'{"arch": "cnn:4", "shape": [1, 8, 8], "classes": 0}',
        b'{"arch": "cnn:4", "shape": [1, 8, 8], "classes": 10, "pickle": "x"}',
        b'{"arch": "cnn:4", "shape": [1, 8, 99999999], "classes": 10}',
        b'{"arch": "cnn:4", "shape": [99999999, 8, 8], "classes": 10}',
        b'{"arch": "cnn:4", "shape": [1, 8, 8], "classes": 10, "std": [0.0]}',
        b'{"arch": "cnn:4", "shape": [1, 8, 8], "classes": 10, "mean": [0.1, 0.2]}',
        b'{"arch": "cnn:4", "shape": [1, 8, 8], "classes": 10, "mean": [NaN]}',
        b'{"arch": "cnn:4", "shape": ["1", [], 8], "classes": 10}',
        b'{"arch": "cnn:4", "shape": "abc", "classes": 10}',
        b"\xff\xfe",
    ],
)  # fmt: skip
def test_bad_records_are_model_errors(document: bytes) -> None:
    with pytest.raises(ModelError, match=r"some\.json"):
        architecture.parse(document, where="some.json")
