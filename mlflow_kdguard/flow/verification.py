"""The verifier's part: measure a registered version again, from its bytes, and sign.

Nothing of what the builder measured is taken over. The builder is believed in one thing only, and
it is in the certificate for everybody to compare: which network the original teacher is. Data,
settings, triggers of a panel and the key are the verifier's own.
"""

import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from mlflow_kdguard import attest, bundle
from mlflow_kdguard.attest.signing import Signer
from mlflow_kdguard.audit import Audited, examine
from mlflow_kdguard.config import GuardConfig
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import CertificateError, UsageError
from mlflow_kdguard.export import reading_parity
from mlflow_kdguard.files import sha256
from mlflow_kdguard.flow.evidence import Aimed, unpack
from mlflow_kdguard.flow.measuring import Nets, Stated, crossing
from mlflow_kdguard.flow.student import from_bytes
from mlflow_kdguard.measure import Attack
from mlflow_kdguard.records import (
    Certificate,
    CertifyReport,
    Figures,
    Measurement,
    PatchReport,
    Progress,
    SmoothReport,
    silent,
)
from mlflow_kdguard.records.gather import figures_of
from mlflow_kdguard.registry import Bundle, Nonce, Registry

log = logging.getLogger(__name__)

_LINEAGE = {"reference": "kdguard.reference", "teacher": "kdguard.teacher"}


@dataclass(frozen=True, slots=True)
class Own:
    """What the verifier brings along, and takes from nobody.

    `panel` are triggers with the classes that they are aimed at. `known` are the ONNX bytes of
    "teacher" or "reference" where the verifier has them: the version's must then be these.
    `nonce`, where given, stands for the one that a server would hand out.
    """

    test: Dataset
    clean: Dataset
    signer: Signer
    panel: tuple[Aimed, ...] = ()
    baseline: bytes | None = None
    known: Mapping[str, bytes] = field(default_factory=dict)
    nonce: Nonce | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """A version that was measured again: which one, what came out, and the signed statement."""

    uri: str
    certificate: Certificate
    envelope: bytes
    measurement: Measurement
    bounds: CertifyReport
    patches: tuple[PatchReport, ...] = ()
    smooth: SmoothReport | None = None


@dataclass(frozen=True, slots=True)
class _Version:
    """The version as it is stored: its files, what they are held against, supplied triggers."""

    stored: Bundle
    nets: Nets
    triggers: tuple[Aimed, ...]


@dataclass(frozen=True, slots=True)
class _Measuring:
    """How figures are taken: on whose data, with which settings, where."""

    own: Own
    config: GuardConfig
    device: torch.device
    progress: Progress


def verify(
    registry: Registry,
    uri: str,
    own: Own,
    *,
    config: GuardConfig,
    device: torch.device,
    progress: Progress = silent,
) -> Verified:
    """Measure the version at `uri` from its bytes, sign `recomputed` figures, store them with it.

    Settings come from the sections audit, export, measure, certify, smooth, patch, attest and
    run.seed of `config`; the noise of a smoothed pair is fresh, known to nobody beforehand. A
    figure beyond its limit is a figure: whether it is enough is the gate's question.
    The certificate is stored as the version's `kdguard.certificate`.
    Raises UsageError for a key that is no verifier's and where teacher or reference are missing,
    ModelError for a bundle that could serve anything else, CertificateError where bytes are not
    those that were claimed, RegistryError, and what the measurements raise.
    """
    attest.require_verifier(own.signer)
    version = _fetched(registry, uri, own)
    stored, nets = version.stored, version.nets
    name, student = stored.name or "", sha256(nets.student)
    nonce = own.nonce or registry.nonce(name, student) or Nonce(nonce="", attempt=1)
    taken = _taken(version, _Measuring(own, config, device, progress), nonce)
    stated = Stated(
        stored.digests,
        name,
        registry.identity,
        reference=sha256(nets.reference),
        teacher=sha256(nets.teacher),
        data=(own.clean, own.test),
    )
    certificate = stated.certificate(
        taken.figures, origin="recomputed", config=config, attempt=nonce.attempt
    )
    envelope = attest.issue(certificate, own.signer)
    registry.store_certificate(stored.uri, envelope)
    return Verified(
        stored.uri, certificate, envelope, taken.measurement, taken.bounds, taken.patches,
        taken.smooth,
    )  # fmt: skip


def _fetched(registry: Registry, uri: str, own: Own) -> _Version:
    """Everything that is measured, by its bytes; what was claimed about them is checked here."""
    stored = registry.download(uri)
    if stored.name is None:
        raise UsageError(f"{uri!r} is no registered version.", remedy="Write models:/name/version.")
    bundle.check(stored.files)
    student = stored.files[bundle.MODEL]
    files = registry.evidence(stored.uri)
    found, triggers = dict(own.known), own.panel
    if files is not None:
        evidence = unpack(files, student=sha256(student), where=stored.uri)
        found = {"reference": evidence.reference, "teacher": evidence.teacher}
        triggers = (*evidence.triggers, *own.panel)
    if missing := sorted(_LINEAGE.keys() - found.keys()):
        raise UsageError(
            f"{stored.uri} was registered without its {' and its '.join(missing)}.",
            remedy=f"Name the ONNX file: {' '.join(f'--{name} FILE' for name in missing)}.",
        )
    _refuse_other(found, [*_claims(stored), *_named(own.known)], stored.uri)
    once = {(trigger.sha256, target): (trigger, target) for trigger, target in triggers}
    nets = Nets(student, found["teacher"], found["reference"], own.baseline)
    return _Version(stored, nets, tuple(once.values()))


def _claims(stored: Bundle) -> Iterator[tuple[str, str, str]]:
    """Who said which files teacher and reference are: tags, and a certificate of this student."""
    for name, tag in _LINEAGE.items():
        if tag in stored.tags:
            yield "the version's tag", name, stored.tags[tag]
    envelope = stored.certificate()
    if envelope is None:
        return
    try:
        claimed = attest.claimed(envelope)
    except CertificateError as error:
        log.warning("what %s carries is no certificate: %s", stored.uri, error)
        return
    subjects = {subject.path: subject.sha256 for subject in claimed.subjects}
    if subjects.get(bundle.MODEL) == stored.digests[bundle.MODEL]:
        yield "its certificate", "reference", claimed.reference.sha256
        yield "its certificate", "teacher", claimed.teacher.sha256


def _named(known: Mapping[str, bytes]) -> Iterator[tuple[str, str, str]]:
    return (("the file that you named", name, sha256(data)) for name, data in known.items())


def _refuse_other(
    found: Mapping[str, bytes], claims: Iterable[tuple[str, str, str]], where: str
) -> None:
    """Whoever said which teacher and reference these are must have said the same."""
    for who, name, digest in claims:
        actual = sha256(found[name])
        if digest != actual:
            raise CertificateError(
                f"the {name} of {where} has the SHA-256 {actual}, and {who} says {digest}.",
                remedy=f"Ask the builder which {name} it is, and have the student registered anew.",
            )


@dataclass(frozen=True, slots=True)
class _Taken:
    """What was measured, and the figures that it comes to."""

    figures: Figures
    measurement: Measurement
    bounds: CertifyReport
    patches: tuple[PatchReport, ...]
    smooth: SmoothReport | None


def _taken(version: _Version, how: _Measuring, nonce: Nonce) -> _Taken:
    nets, own, config = version.nets, how.own, how.config
    teacher = _audited(nets.teacher, "teacher", how)
    student = _audited(nets.student, "student", how)
    recovered = crossing((teacher.report, teacher.recovered), (student.report, student.recovered))
    attacks: list[Attack] = [
        *((trigger, target, "supplied") for trigger, target in version.triggers),
        *((trigger, target, "recovered") for trigger, target in recovered),
    ]
    measurement = nets.measured(
        own.test, attacks, batch=config.measure.batch, device=how.device, progress=how.progress
    )
    bounds = nets.bounded(
        own.test, config.certify, nonce=nonce.nonce, device=how.device, progress=how.progress
    )
    patches = nets.patched(
        own.test, config.patch, nonce=nonce.nonce, device=how.device, progress=how.progress
    )
    smooth = nets.smoothed(
        own.test, config.smooth, nonce=nonce.nonce, entropy=secrets.token_hex(16),
        device=how.device, progress=how.progress,
    )  # fmt: skip
    images, _ = own.test.batch(np.arange(min(len(own.test), config.export.parity_images)))
    figures = figures_of(
        measurement=measurement,
        bounds=bounds,
        smooth=smooth,
        patches=patches,
        audits={"teacher": teacher.report, "student": student.report},
        parity=reading_parity(nets.student, images, where="the student", device=how.device),
    )
    return _Taken(figures, measurement, bounds, patches, smooth)


def _audited(model: bytes, side: str, how: _Measuring) -> Audited:
    def listen(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        how.progress(f"audit of the {side}: {what}", done, total, figures)

    return examine(
        from_bytes(model, where=f"the {side}"),
        model_sha256=sha256(model),
        data=how.own.clean,
        config=how.config.audit,
        seed=how.config.run.seed,
        device=how.device,
        progress=listen,
    )
