"""load_verified(): the model behind an alias, if it is the one that was certified.

The alias is resolved once. The bytes are fetched once, hashed, held against the certificate, and
that very buffer is what onnxruntime runs: nothing is read again from a place that could change,
and no MLflow flavour is asked what to load (`docs/threat-model.md`, 11 and 14).
"""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlflow_kdguard.attest import Checked
from mlflow_kdguard.attest.signing import Role
from mlflow_kdguard.bundle import MODEL
from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.errors import CertificateError, UsageError
from mlflow_kdguard.measure.session import Session
from mlflow_kdguard.measure.smoothed import Smoothed
from mlflow_kdguard.promoted.evidence import LATE, Evidence, examine
from mlflow_kdguard.promoted.trust import Key, Revoked, identities, trusted
from mlflow_kdguard.records import Certificate, Signatory
from mlflow_kdguard.registry import Registry
from mlflow_kdguard.registry.bundle import Bundle
from mlflow_kdguard.registry.listing import active_workspace

__all__ = ["VerifiedModel", "load_verified"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VerifiedModel:
    """A classifier in memory whose bytes are the certified ones.

    `uri` is `models:/name/version`, with the version that an alias stood for when it was loaded.
    """

    uri: str
    certificate: Certificate
    signers: tuple[Signatory, ...]
    session: Session

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the ONNX bytes that run."""
        return self.session.sha256

    @property
    def provider(self) -> str:
        """The onnxruntime execution provider that runs them."""
        return self.session.provider

    def predict(self, images: ArrayLike, *, batch: int = 256) -> NDArray[np.float32]:
        """Logits N×K of images N×C×H×W with pixels in [0, 1], `batch` at a time.

        Raises ModelError where the shape does not fit, NonFiniteError where an output is NaN or
        infinite.
        """
        return self.session.logits(np.asarray(images, np.float32), batch)

    def smoothed(self, *, draws: int = 1000, seed: int | None = None) -> Smoothed:
        """The smoothed classifier that the certificate's smoothed figure is about.

        Raises CertificateError where it has none, or several with different noise.
        """
        figures = self.certificate.figures.faithful
        sigmas = {figure.sigma for figure in figures if figure.method == "smoothed"}
        sigma = next(iter(sigmas), None)
        if sigma is None or len(sigmas) > 1:
            raise CertificateError(
                f"the certificate of {self.uri} names no noise to smooth with, or several.",
                remedy="Make measure.smoothed.Smoothed with a sigma of your own.",
            )
        return Smoothed(self.session, sigma, draws=draws, seed=seed)


@dataclass(frozen=True, slots=True)
class _Device:
    type: str
    index: int | None = None


def load_verified(
    uri: str,
    *,
    keys: Key | Iterable[Key] | None = None,
    revoked: str | Path | Revoked | None = None,
    role: Role | None = None,
    expired: Literal["warn", "refuse"] = "warn",
    registry: str | Collection[str] | None = None,
    tracking_uri: str | None = None,
    registry_uri: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int = 0,
) -> VerifiedModel:
    """Load `models:/name@alias` (or `/version`) if its bytes are the certified ones.

    `keys` are the keys that are trusted: `.pub` records, folders of them, or Verifiers; without
    it, what KDGUARD_KEYS names. `revoked` is a list of revocations (or KDGUARD_REVOKED). `role`,
    where given, must be that of a signer; `"verifier"` also wants figures that were recomputed.
    `registry` names the registry as certificates do, where clients know it under another URI.
    An expired certificate is a warning, since what serves is not cut off, unless `expired` is
    `"refuse"`. `threads` are onnxruntime's (0: one a core).

    Raises CertificateError with every reason where the bytes, the bundle's shape or the
    certificate do not hold; UsageError without keys; RegistryError where MLflow does not answer;
    ModelError or DeviceError where onnxruntime cannot run the certified bytes.
    """
    if not uri.startswith("models:/"):
        raise UsageError(f"{uri!r} does not name a registered model.", remedy="models:/name@alias")
    trust = trusted(keys, revoked)
    source = Registry(RegistrySection(tracking_uri=tracking_uri, registry_uri=registry_uri))
    stored = source.download(uri)
    names = _names(registry, source.identity)
    found = examine(stored, trust, now=datetime.now(UTC), registries=names)
    checked = _held(found, stored, refuse_expired=expired == "refuse")
    _refuse_role(checked, role)
    session = Session(
        stored.files[MODEL], device=_Device(device), where=stored.uri, threads=threads
    )
    return VerifiedModel(stored.uri, checked.certificate, checked.signers, session)


def _held(found: Evidence, stored: Bundle, *, refuse_expired: bool) -> Checked:
    late = [fault for fault in found.faults if fault.kind in LATE]
    against = [fault for fault in found.faults if refuse_expired or fault.kind not in LATE]
    if against or found.checked is None:
        raise CertificateError(
            f"{stored.uri} is not what was certified: {' '.join(f.why for f in against)}",
            remedy=against[0].remedy if against else "",
        )
    for fault in late:
        log.warning("%s: %s %s", stored.uri, fault.why, fault.remedy)
    return found.checked


def _refuse_role(checked: Checked, role: Role | None) -> None:
    if role is None:
        return
    if all(signer.role != role for signer in checked.signers):
        names = ", ".join(f"{s.owner} as {s.role}" for s in checked.signers)
        raise CertificateError(f"no {role} signed the certificate (signed by {names}).")
    if role == "verifier" and checked.certificate.figures_from != "recomputed":
        raise CertificateError(
            f"the certificate's figures are {checked.certificate.figures_from}, not recomputed.",
            remedy="Have a verifier measure again: `kdguard verify`.",
        )


def _names(registry: str | Collection[str] | None, identity: str) -> frozenset[str]:
    if registry is None:
        return identities([identity], active_workspace())
    return frozenset([registry] if isinstance(registry, str) else registry)
