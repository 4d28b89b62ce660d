"""The error tree and its exit codes, which scripts depend on."""

import inspect

import pytest

from mlflow_kdguard import errors

CODES = {
    "KDGuardError": 1,
    "SoundnessError": 1,
    "UsageError": 2,
    "ConfigError": 2,
    "DataError": 2,
    "DeviceError": 2,
    "RegistryError": 4,
    "ModelError": 5,
    "UnsafeModelError": 5,
    "NonFiniteError": 5,
    "SolverError": 6,
    "ExportError": 7,
    "CertificateError": 8,
    "Interrupted": 130,
}


def _classes() -> dict[str, type[errors.KDGuardError]]:
    return {
        name: value
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, errors.KDGuardError)
    }


def test_exit_codes_are_the_documented_ones() -> None:
    assert {name: value.exit_code for name, value in _classes().items()} == CODES


def test_no_error_ends_with_the_code_of_an_answered_no() -> None:
    assert errors.REFUSED == 3
    assert errors.REFUSED not in CODES.values()


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn: dict[str, int] = {}
    parents: dict[str, str] = {}
    trail: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("├──", "").replace("└──", "").replace("│", " ").split()
        if len(words) < 2 or words[0] not in CODES or not words[1].isdigit():
            continue
        depth = line.index(words[0])
        trail = [(d, n) for d, n in trail if d < depth]
        if trail:
            parents[words[0]] = trail[-1][1]
        trail.append((depth, words[0]))
        drawn[words[0]] = int(words[1])
    interrupted = {"Interrupted": 130}
    assert drawn | interrupted == CODES
    for child, parent in parents.items():
        assert _classes()[child].__bases__ == (_classes()[parent],)


@pytest.mark.parametrize("name", sorted(CODES))
def test_an_error_reads_as_one_line_with_its_remedy(name: str) -> None:
    error = _classes()[name]("the key k.pem is missing.", remedy="Run `kdguard keygen`.")
    assert str(error) == "the key k.pem is missing. Run `kdguard keygen`."
    assert (error.message, error.remedy) == ("the key k.pem is missing.", "Run `kdguard keygen`.")
    assert str(_classes()[name]("bare.")) == "bare."
