"""The error tree, with the exit code that each branch ends the command with.

An error means that a question could not be answered. A "no" is not an error: it is a value
(`records.Decision`, an audit verdict, a bound that is UNDECIDED) and ends with exit code 3.

    KDGuardError                1   our failure
    ├── SoundnessError          1   a witness beats a certified bound: a bug, never repaired
    ├── UsageError              2   wrong flag, path, configuration, or a missing device
    │   ├── ConfigError         2   a configuration that does not say what to do
    │   ├── DataError           2   a data set that is not there or is not what it claims
    │   └── DeviceError         2   a device that was asked for and does not exist
    ├── RegistryError           4   the MLflow server, registry or artifact store
    ├── ModelError              5   a model that is unsupported, malformed or unsafe
    │   ├── UnsafeModelError    5   loading it would run code
    │   └── NonFiniteError      5   NaN or infinity in weights or outputs
    ├── SolverError             6   an optimiser failed
    ├── ExportError             7   the exported graph disagrees with the trained network
    └── CertificateError        8   signature, digest, expiry or proof
        (130 is Ctrl-C: `Interrupted` carries what a finished part left behind)
"""

from typing import ClassVar

REFUSED = 3
"""Exit code of an answered "no"."""


class KDGuardError(Exception):
    """Root of everything that this package raises on purpose.

    `message` says what was wrong with which input; `remedy` says what to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".rstrip()


class SoundnessError(KDGuardError):
    """A witness beats a bound that was claimed to be certified."""


class UsageError(KDGuardError):
    """The request cannot be understood or cannot be carried out as asked."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key, value or file that does not make sense."""


class DataError(UsageError):
    """A data set that is missing, unreadable or not what its URI says."""


class DeviceError(UsageError):
    """A device that was asked for by name and is not there."""


class RegistryError(KDGuardError):
    """The MLflow server, its registry or its artifact store did not do what was asked."""

    exit_code = 4


class ModelError(KDGuardError):
    """A model file that is unsupported or malformed."""

    exit_code = 5


class UnsafeModelError(ModelError):
    """A model file that would have to execute code to be loaded."""


class NonFiniteError(ModelError):
    """NaN or infinity where a model must be finite."""


class SolverError(KDGuardError):
    """An optimisation solver failed, and no sound answer is left."""

    exit_code = 6


class ExportError(KDGuardError):
    """The exported graph does not compute what the trained network computes."""

    exit_code = 7


class CertificateError(KDGuardError):
    """A certificate that does not hold: signature, digest, expiry or proof."""

    exit_code = 8


class Interrupted(KDGuardError):  # noqa: N818  (a request that was heard, not an error)
    """Ctrl-C or SIGTERM: what was finished is kept, and the message says how to go on."""

    exit_code = 130
