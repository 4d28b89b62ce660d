"""A residual reference and student that have seen noise, on Fashion-MNIST, as ONNX bytes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mlflow_kdguard.config import ExportSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.export import to_onnx
from mlflow_kdguard.nets import zoo
from mlflow_kdguard.nets.architecture import Architecture

CPU = torch.device("cpu")


def trained(
    images: Dataset, folder: Path, *, reference: str, student: str, sigma: float, epochs: int,
    seed: int,
) -> tuple[bytes, bytes]:  # fmt: skip
    """Reference on labels, student towards its confidences, both under noise: their ONNX bytes."""
    x = torch.from_numpy(images.x)
    y = torch.from_numpy(images.y)
    teacher = _network(reference, images, seed)

    def labels(_shown: Tensor, logits: Tensor, part: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, y[part])

    _train(teacher, x, labels, sigma=sigma, epochs=epochs, seed=seed)
    pupil = _network(student, images, seed + 1)

    def imitate(shown: Tensor, logits: Tensor, _part: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(shown).softmax(1)
        return nn.functional.kl_div(logits.log_softmax(1), target, reduction="batchmean")

    _train(pupil, x, imitate, sigma=sigma, epochs=epochs, seed=seed + 1)
    files = {"reference": teacher, "student": pupil}
    return tuple(  # type: ignore[return-value]
        _exported(net, images, folder / f"{name}.onnx") for name, net in files.items()
    )


def untrained(arch: str, shape: tuple[int, int, int], path: Path, *, seed: int) -> bytes:
    """A network of that size, for timing."""
    net = zoo.build(Architecture(arch=arch, shape=shape, classes=10), seed=seed).eval()
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)).numpy()
    to_onnx(
        net, path, shape=shape, classes=10, images=x, config=ExportSection(parity_images=2),
        device=CPU,
    )  # fmt: skip
    return path.read_bytes()


def _network(arch: str, images: Dataset, seed: int) -> nn.Module:
    shown = Architecture(
        arch=arch, shape=images.shape, classes=images.classes,
        mean=(float(images.x.mean()),), std=(float(images.x.std()),),
    )  # fmt: skip
    return zoo.build(shown, seed=seed)


def _train(net, x, loss, *, sigma, epochs, seed, batch=128, lr=0.1):  # type: ignore[no-untyped-def]
    """One-cycle SGD on images under fresh noise, clipped as the smoothed network's are."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, nesterov=True,
                                weight_decay=5e-4)  # fmt: skip
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)[: len(x) // batch * batch]
        for part in order.split(batch):
            noise = torch.randn(x[part].shape, generator=generator)
            shown = (x[part] + sigma * noise).clamp(0, 1)
            optimiser.zero_grad()
            loss(shown, net(shown), part).backward()
            optimiser.step()
            schedule.step()
    net.eval()


def _exported(net: nn.Module, images: Dataset, path: Path) -> bytes:
    to_onnx(
        net, path, shape=images.shape, classes=images.classes, images=images.x[:256],
        config=ExportSection(parity_images=256), device=CPU,
    )  # fmt: skip
    return path.read_bytes()
