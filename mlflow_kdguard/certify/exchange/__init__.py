"""export(): what `certify` is asked about an image, as files for other solvers.

`product` writes the networks, `vnnlib` the questions; `docs/reference/exchange.md` says who reads
them and what is guaranteed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlflow_kdguard import graph
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.exchange.product import check_pair, confidences, product
from mlflow_kdguard.certify.exchange.vnnlib import SIGNS, Query, Sign, version1, version2
from mlflow_kdguard.config import CertifySection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import DataError, UsageError
from mlflow_kdguard.files import sha256, write_bytes, write_json

__all__ = ["Asked", "Query", "confidences", "export", "product", "version1", "version2"]

SCHEMA = "kdguard.queries/1"


@dataclass(frozen=True, slots=True)
class Asked:
    """Which differences are asked about: classes ("all", "top" or one class), and which signs."""

    classes: str = "all"
    signs: tuple[Sign, ...] = SIGNS


def export(
    reference: bytes,
    student: bytes,
    data: Dataset,
    indices: Sequence[int],
    folder: Path,
    *,
    config: CertifySection,
    asked: Asked | None = None,
) -> dict[str, Any]:
    """Write the networks, and for each image a query in both versions; what is where.

    `config` gives eps and delta. Every file is whole or absent, `queries.json` is written last.
    Raises ModelError for networks that are not read, DataError for images that are not there,
    UsageError for an l2 ball, which VNN-LIB's linear constraints cannot say.
    """
    if config.norm != "linf":
        raise UsageError(
            "VNN-LIB has no l2 ball: its constraints are linear.", remedy="Ask with --norm linf."
        )
    network = graph.read(reference, where="the reference")
    check_pair(network, graph.read(student, where="the student"))
    _check(data, indices, network)
    models = _models(reference, student)
    digests = {"reference": sha256(reference), "student": sha256(student)}
    about = tuple(f"{name} sha256 {digest}" for name, digest in digests.items())
    queries = {
        index: _query(network, data, index, config=config, asked=asked or Asked(), about=about)
        for index in indices
    }
    for name, content in models.items():
        write_bytes(folder / f"{name}.onnx", content)
    for index, query in queries.items():
        for version, text in ((1, version1(query)), (2, version2(query))):
            write_bytes(folder / _name(index, version), text.encode())
    document = {
        "schema": SCHEMA,
        "norm": config.norm,
        "eps": config.eps,
        "delta": config.delta,
        "data": {"uri": data.uri, "sha256": data.sha256},
        **{name: {"sha256": digest} for name, digest in digests.items()},
        "models": {f"{name}.onnx": sha256(content) for name, content in models.items()},
        "queries": [_entry(index, query, data) for index, query in queries.items()],
    }
    write_json(folder / "queries.json", document)
    return document


def _models(reference: bytes, student: bytes) -> dict[str, bytes]:
    return {
        "product": product(reference, student),
        "product-margins": product(reference, student, form="margins"),
        "reference": confidences(reference, where="the reference"),
        "student": confidences(student, where="the student"),
    }


def _name(index: int, version: int) -> str:
    return f"image-{index}.v{version}.vnnlib"


def _entry(index: int, query: Query, data: Dataset) -> Mapping[str, Any]:
    return {
        "index": index,
        "label": int(data.y[index]),
        "vnnlib1": {
            "either": ["product.onnx", "product-margins.onnx"],
            "file": _name(index, 1),
        },
        "vnnlib2": {
            "networks": {"reference": "reference.onnx", "student": "student.onnx"},
            "file": _name(index, 2),
        },
        "asked": [{"class": klass, "sign": sign} for klass, sign in query.asked],
    }


def _query(
    network: graph.Graph,
    data: Dataset,
    index: int,
    *,
    config: CertifySection,
    asked: Asked,
    about: tuple[str, ...],
) -> Query:
    x, _ = data.batch((index,))
    ball = Ball.around(torch.from_numpy(x), eps=config.eps)
    lo, hi = (ends[0].numpy() for ends in (ball.lo, ball.hi))
    top = int(graph.evaluate(network, x.astype(np.float64)).argmax())
    pairs = tuple((k, sign) for k in _classes(asked, network.classes, top) for sign in asked.signs)
    said = (
        *about,
        f"image {index} of data sha256 {data.sha256}, eps {config.eps!r}",
        "sat: a counterexample to the bound delta; unsat: the bound holds",
    )
    return Query(lo, hi, network.classes, config.delta, pairs, said)


def _classes(asked: Asked, count: int, top: int) -> tuple[int, ...]:
    if asked.classes in ("all", "top"):
        return tuple(range(count)) if asked.classes == "all" else (top,)
    if not (asked.classes.isascii() and asked.classes.isdigit() and int(asked.classes) < count):
        raise UsageError(
            f"{asked.classes!r} is no class of these networks.",
            remedy=f"Ask about all, top, or one of 0 to {count - 1}.",
        )
    return (int(asked.classes),)


def _check(data: Dataset, indices: Sequence[int], network: graph.Graph) -> None:
    if data.shape != network.input_shape:
        raise DataError(
            f"{data.uri} has images of shape {data.shape}, the networks take "
            f"{network.input_shape}.",
            remedy="Ask about the data that the networks were made for.",
        )
    absent = [index for index in indices if not 0 <= index < len(data)]
    if absent or not indices:
        raise DataError(
            f"{data.uri} has images 0 to {len(data) - 1}, not {absent or 'none'}.",
            remedy="Name images that are there, for example those that a report left undecided.",
        )
