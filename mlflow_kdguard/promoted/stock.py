"""What a version is made of, told by the names of its files, and what a gate needs of it."""

import re
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Literal

from mlflow_kdguard.bundle import ALLOWED, MODEL, NEEDED
from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.plugin.server.places import Place

Verdict = Literal["certified", "certifiable", "other-bundle", "not-onnx", "empty", "unreadable"]
"""certified: it carries a certificate, checked or not · certifiable: exactly a guarded bundle's
files · other-bundle: ONNX among other files · not-onnx · empty · unreadable: nothing was listed."""

_FORMATS = {
    ".onnx": "onnx",
    ".safetensors": "safetensors",
    **dict.fromkeys((".pkl", ".pickle", ".cloudpickle", ".joblib", ".dill"), "pickle"),
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin"), "torch (pickle)"),
    **dict.fromkeys((".h5", ".keras", ".hdf5"), "keras"),
    ".pb": "tensorflow",
    ".py": "code",
    ".cbm": "catboost",
    ".ubj": "xgboost",
    ".gguf": "gguf",
    ".tflite": "tflite",
}
_RUN, _LOGGED = re.compile(r"[0-9a-f]{32}"), re.compile(r"m-[0-9a-f]{32}")

_NEXT: dict[Verdict, str] = {
    "certified": "hold it against your keys and policy: kdguard gate {uri} --key KEY.pub",
    "certifiable": "have a verifier measure and sign it (kdguard verify {uri}), then promote it",
    "other-bundle": "register its {model} again as a guarded bundle, then certify: kdguard run",
    "not-onnx": "export it to ONNX (kdguard teacher import says how for a file), or distil a "
    "student from it: kdguard run",
    "empty": "find out where its files are; a gate refuses a version without any",
    "unreadable": "make its artifacts readable, or take the name away",
}


def formats(files: Collection[str]) -> tuple[str, ...]:
    """The kinds of model files among these names, sorted; `other` where none is known."""
    found = {_FORMATS[s] for f in files if (s := PurePosixPath(f).suffix.lower()) in _FORMATS}
    return tuple(sorted(found)) or (("other",) if files else ())


def verdict(files: Collection[str] | None, *, certified: bool) -> Verdict:
    """What a gate would need of a version with these files; None where they cannot be listed."""
    if certified:
        return "certified"
    if files is None:
        return "unreadable"
    if not files:
        return "empty"
    if set(files) >= NEEDED and set(files) <= ALLOWED:
        return "certifiable"
    return "other-bundle" if "onnx" in formats(files) else "not-onnx"


def what_next(found: Verdict, uri: str) -> str:
    """One line on how a version comes to keep its guarded name."""
    return _NEXT[found].format(uri=uri, model=MODEL)


def root(location: str) -> str | None:
    """The artifact root above a run or a logged model of MLflow's; None where it is neither.

    Nothing but a root that MLflow itself writes below is worth proposing: a source that somebody
    typed in is for a person to judge.
    """
    try:
        place = Place.of(location)
    except KDGuardError:
        return None
    above = _above(place.parts)
    return None if above is None else str(Place(place.scheme, place.authority, above))


def _above(parts: Sequence[str]) -> tuple[str, ...] | None:
    """What stands before EXPERIMENT/RUN/artifacts or EXPERIMENT/models/MODEL/artifacts."""
    for at in range(1, len(parts)):
        if parts[at] != "artifacts":
            continue
        if _RUN.fullmatch(parts[at - 1]) and at >= 2:
            return tuple(parts[: at - 2])
        if _LOGGED.fullmatch(parts[at - 1]) and at >= 3 and parts[at - 2] == "models":
            return tuple(parts[: at - 3])
    return None
