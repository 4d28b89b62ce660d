"""One judgement in the making: each step adds the rules that it answers."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from mlflow_kdguard import attest, bundle
from mlflow_kdguard.artifacts import CERTIFICATE, digests
from mlflow_kdguard.attest.revocation import certificate_digest
from mlflow_kdguard.errors import CertificateError, KDGuardError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.gate import decide
from mlflow_kdguard.plugin.server.facts import Fetch, Handed, VersionFacts
from mlflow_kdguard.plugin.server.places import refuse_outside, resolve
from mlflow_kdguard.plugin.server.settings import Settings
from mlflow_kdguard.records import Certificate, RuleResult, parse_time

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Case:
    """One judgement in the making."""

    version: VersionFacts
    settings: Settings
    now: datetime
    fetch: Fetch
    nonce_of: Callable[[str], Handed | None] | None
    rules: list[RuleResult] = field(default_factory=list)
    files: Mapping[str, bytes] | None = None
    digests: dict[str, str] = field(default_factory=dict)
    nonce: str = ""

    @property
    def envelope(self) -> bytes | None:
        text = self.version.tags.get(CERTIFICATE)
        return None if text is None else text.encode("utf-8", "surrogatepass")

    # ── the bytes ───────────────────────────────────────────────────────────────────────────────

    def bytes_(self) -> None:
        """Find where the bytes finally lie, see that it is allowed, and read them once."""
        with _told(self, "bytes", self.version.location):
            place = resolve(self.version.location, self.fetch.step)
            refuse_outside(place, self.settings.allowed)
            self.files = self.fetch.read(place)
            self.digests = digests(self.files)

    def shape(self) -> None:
        """The bundle can serve nothing but its `model.onnx`."""
        if self.files is not None:
            with _told(self, "bundle", sorted(self.files)):
                bundle.check(self.files, digest=self.digests.get(bundle.MODEL))

    # ── the certificate ─────────────────────────────────────────────────────────────────────────

    def certified(self) -> None:
        """The certificate is believed, speaks of this version, and satisfies the policy."""
        policy = self.settings.policy_for(self.version.name)
        checked, problem = self._believed()
        if checked is None:
            refusal = decide(None, policy, signers=(), now=self.now, problem=problem)
            self.rules += refusal.rules
            return
        certificate = checked.certificate
        self._bound(certificate)
        self._hashed(certificate)
        self.nonce = self._nonce(certificate)
        judged = decide(
            certificate,
            policy,
            signers=checked.signers,
            now=self._moment(certificate),
            nonce=self.nonce,
        )
        self.rules += judged.rules

    def _believed(self) -> tuple[attest.Checked | None, str]:
        envelope = self.envelope
        if envelope is None:
            return None, "The version carries no certificate."
        try:
            self._not_revoked(envelope)
            checked = attest.check(
                envelope,
                files=None,
                verifiers=self.settings.verifiers,
                now=self.now,
                waive_expiry=True,
            )
        except KDGuardError as error:
            return None, str(error)
        except Exception as error:
            log.exception("the certificate of %s could not be checked", self.version.name)
            return None, f"The certificate cannot be checked ({type(error).__name__})."
        return checked, ""

    def _not_revoked(self, envelope: bytes) -> None:
        with _told(self, "certificate.revoked", None):
            self.settings.keys.revocations.refuse(envelope, (), self.now)

    def _bound(self, certificate: Certificate) -> None:
        name, wanted = certificate.model_name, self.version.name
        self._rule(
            "certificate.model",
            name == wanted,
            f"The certificate was issued for the model {name!r}, this one is {wanted!r}.",
            name,
        )
        known = self.settings.identities(self.version.workspace)
        self._rule(
            "certificate.registry",
            certificate.registry in known,
            f"The certificate was issued for the registry {certificate.registry!r}; this one is "
            f"{' or '.join(known)}.",
            certificate.registry,
        )

    def _hashed(self, certificate: Certificate) -> None:
        if self.files is None:
            return
        stated = {subject.path: subject.sha256 for subject in certificate.subjects}
        odd = sorted(
            path
            for path in stated.keys() | self.digests.keys()
            if stated.get(path) != self.digests.get(path)
        )
        why = "; ".join(
            f"{path} is {self.digests.get(path, 'missing')}, certified is "
            f"{stated.get(path, 'none')}"
            for path in odd
        )
        self._rule("certificate.bytes", not odd, why or "Every file is the certified one.", odd)

    def _nonce(self, certificate: Certificate) -> str:
        """The nonce that the figures were drawn with, once it is known to be this server's."""
        stated = {figure.nonce for figure in certificate.figures.faithful}
        nonce = next(iter(stated)) if len(stated) == 1 else ""
        if self.nonce_of is None:
            return nonce
        required = self.settings.stated.nonces == "required"
        if stated <= {""}:
            self._rule("nonce", not required, "The certificate carries no nonce.", None)
            return ""
        with _told(self, "nonce", nonce):
            _refuse_nonce(stated, self.nonce_of(nonce), certificate, self)
        return nonce

    def _moment(self, certificate: Certificate) -> datetime:
        """Now; or the certificate's last moment, where its version may come back after it."""
        try:
            expires = parse_time(certificate.expires)
        except ValueError:
            return self.now
        grace = timedelta(days=self.settings.stated.rollback_days)
        envelope = self.envelope
        known = envelope is not None and sha256(envelope) in self.version.previously_promoted
        if known and expires <= self.now < expires + grace:
            return expires - timedelta(seconds=1)
        return self.now

    def _rule(self, rule: str, ok: bool, why: str, figure: Any) -> None:
        self.rules.append(RuleResult(rule=rule, limit=None, figure=figure, ok=ok, why=why))


def _refuse_nonce(
    stated: set[str], handed: Handed | None, certificate: Certificate, case: Case
) -> None:
    if len(stated) != 1:
        raise CertificateError("its figures were drawn with several nonces.")
    if handed is None:
        raise CertificateError("its nonce was not handed out by this server.")
    subject = case.digests.get(bundle.MODEL)
    wanted = (case.version.workspace, case.version.name, subject, certificate.attempt)
    if (handed.workspace, handed.model, handed.subject, handed.attempt) != wanted:
        raise CertificateError(
            f"its nonce was handed out for attempt {handed.attempt} at {handed.model!r} with the "
            f"file {handed.subject[:12]}…."
        )
    envelope = case.envelope
    if (
        handed.used_by is not None
        and envelope is not None
        and handed.used_by != certificate_digest(envelope)
    ):
        raise CertificateError("its nonce was spent on another certificate.")


class _told:  # noqa: N801  (read as a word in a with statement)
    """A rule that holds unless its block raises; whatever it raises is the reason."""

    def __init__(self, case: Case, rule: str, figure: Any) -> None:
        self._case, self._rule, self._figure = case, rule, figure

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _trace: Any) -> bool:
        if error is None:
            self._case._rule(self._rule, True, "It holds.", self._figure)
            return False
        if not isinstance(error, Exception):
            return False
        if isinstance(error, KDGuardError):
            why = str(error)
        else:
            log.warning("%s of %s failed", self._rule, self._case.version.name, exc_info=error)
            first = (str(error).strip().splitlines() or [""])[0][:300]
            why = f"It cannot be found out ({type(error).__name__}: {first})."
        self._case._rule(self._rule, False, why, self._figure)
        return True
