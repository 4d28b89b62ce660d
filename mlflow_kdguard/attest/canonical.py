"""JSON with one spelling: what is signed or compared is read strictly, or not at all.

Two readers that take a document differently are two certificates under one signature. Duplicate
keys, NaN, and any byte that `files.canonical_json` would not have written are therefore errors.
"""

import json
from typing import Any, NoReturn

from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.files import canonical_json

LARGEST = 8 << 20
"""Bytes of the largest document that is read at all."""


def parse(data: bytes, what: str) -> Any:
    """The JSON value of `data`.

    Raises CertificateError, naming `what`, for what is not JSON, repeats a key, holds NaN or
    infinity, or is not spelled canonically.
    """
    if len(data) > LARGEST:
        raise _refused(what, f"has {len(data)} bytes, more than {LARGEST}")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _refused(what, f"is not JSON: {error}") from error
    if _spelled(value, what) != data:
        raise _refused(what, "is not in canonical form (sorted keys, no spaces, UTF-8)")
    return value


def _spelled(value: Any, what: str) -> bytes:
    try:
        return canonical_json(value)
    except (ValueError, RecursionError) as error:  # 1e999 is infinity; a lone surrogate no text
        raise _refused(what, f"holds what JSON cannot: {error}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is repeated")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that can be certified")


def _refused(what: str, why: str) -> CertificateError:
    return CertificateError(f"{what} {why}.", remedy="Ask its issuer for the original bytes.")
