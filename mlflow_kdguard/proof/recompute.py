"""From proofs to a certificate's figures: every bound that it rests on, derived anew."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard import graph
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.proof.check import Checker
from mlflow_kdguard.proof.folder import Index, check_entry, read_index
from mlflow_kdguard.records import Certificate, FaithfulFigure, Progress, silent

_EQUAL = 1e-12
"""By how much a mean may differ from the one in the certificate, which was taken in float64 too."""


class Images(Protocol):
    """Labelled images with a digest."""

    y: NDArray[np.int64]

    @property
    def sha256(self) -> str:
        """Digest of the content."""
        ...

    def batch(self, indices: list[int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Images and labels."""
        ...


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What was derived: images, the largest difference from the claims, mean of the bounds."""

    images: int
    upper_mean: float
    proved: int


def recompute(
    certificate: Certificate,
    networks: tuple[bytes, bytes],
    data: Images,
    folder: Path,
    *,
    progress: Progress = silent,
) -> Recomputed:
    """Derive every bound of the certificate's certified figure from its proofs.

    `networks`: ONNX bytes of reference and student. Raises CertificateError where the certificate
    names no proofs, a proof is missing, altered or too weak, or figures do not follow from them.
    """
    figure = certified_figure(certificate)
    if certificate.proofs is None:
        raise CertificateError(
            "the certificate names no proofs: its bounds cannot be recomputed.",
            remedy="Have it issued from a certification that kept them (--proofs).",
        )
    index = read_index(folder, certificate.proofs.sha256)
    checker = Checker.of(*networks)
    _check_subject(index, figure, checker, data)
    entries = {entry.index: entry for entry in index.entries}
    uppers, proved = [], 0
    for done, image in enumerate(figure.indices, 1):
        if not 0 <= image < len(data.y):
            raise CertificateError(f"the certificate speaks of image {image}; there is none.")
        x, y = data.batch([image])
        upper = 1.0
        if image in entries:
            check_entry(checker, folder, index, entries[image], x[0])
            margin = checker.float32_margin(
                x[0], eps=figure.eps, norm=figure.norm, classes=figure.classes
            )
            # As the report adds them up: a sum that is not below 1 is 1.
            upper = min(1.0, math.nextafter(entries[image].upper + margin, math.inf))
        top = int(graph.evaluate(checker.reference, x.astype(np.float64))[0].argmax())
        proved += upper <= figure.delta and image in entries and top == int(y[0])
        uppers.append(upper)
        progress("check", done, len(figure.indices), {"upper_max": max(uppers)})
    mean = float(np.mean(uppers))
    _check_figures(figure, proved, mean)
    return Recomputed(len(uppers), mean, proved)


def certified_figure(certificate: Certificate) -> FaithfulFigure:
    """The one certified bound of a certificate; CertificateError where there is not one."""
    figures = [f for f in certificate.figures.faithful if f.method == "certified"]
    if len(figures) != 1 or not figures[0].indices:
        raise CertificateError(
            f"the certificate states {len(figures)} certified bounds; one can be recomputed.",
            remedy="Check it without --recompute.",
        )
    return figures[0]


def _check_subject(index: Index, figure: FaithfulFigure, checker: Checker, data: Images) -> None:
    """Proofs, certificate, networks and data must speak of the same thing."""
    stated = {
        "reference": figure.reference.sha256,
        "student": figure.student.sha256,
        "data": figure.data.sha256,
        "norm": figure.norm,
        "eps": figure.eps,
        "classes": figure.classes,
    }
    for name, value in stated.items():
        if index.shared[name] != value:
            raise CertificateError(
                f"the proofs are about the {name} {index.shared[name]}, the certificate about "
                f"{value}."
            )
    given = (*checker.net.digests, data.sha256)
    for name, digest in zip(("reference", "student", "data"), given, strict=True):
        if digest != stated[name]:
            raise CertificateError(
                f"the {name} has the SHA-256 {digest}, the certificate speaks of {stated[name]}.",
                remedy=f"Name the {name} that was certified.",
            )


def _check_figures(figure: FaithfulFigure, proved: int, mean: float) -> None:
    if figure.within.n != len(figure.indices) or figure.within.k != proved:
        raise CertificateError(
            f"the certificate says that {figure.within.k} of {figure.within.n} images are proved "
            f"within {figure.delta:g}; its proofs show {proved} of {len(figure.indices)}.",
        )
    if not abs(mean - figure.upper_mean) <= _EQUAL:
        raise CertificateError(
            f"the certificate's mean bound is {figure.upper_mean:.9g}; its proofs show {mean:.9g}."
        )
