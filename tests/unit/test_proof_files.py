"""Proof files: the same bytes every time, and nothing but a refusal for other ones."""

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest

import proofs
import toygraphs
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.files import canonical_json
from mlflow_kdguard.proof import Proof, container
from mlflow_kdguard.proof.folder import Entry, Index

FLIPS = 300


@pytest.fixture(scope="module")
def made():
    """A checker, a proof's bytes, and its image."""
    models = toygraphs.mlp(3), toygraphs.mlp(77_780)
    x = np.full((1, 1, 2), 0.4, dtype=np.float32)
    checker, proof, _ = proofs.written(models, x, 0.2, nodes=20)
    return checker, proof, x


def file_of(header: bytes, body: bytes) -> bytes:
    """A file with this header and stream."""
    return container.MAGIC + len(header).to_bytes(4, "little") + header + body


def test_a_proof_is_the_same_bytes_every_time(made) -> None:
    _, proof, _ = made
    data = proof.to_bytes()
    assert Proof.from_bytes(data).to_bytes() == data == proof.to_bytes()


def test_flipped_bytes_are_refused_or_judged_anew(made) -> None:
    """Nothing but CertificateError comes out of a damaged file."""
    checker, proof, x = made
    data, draw = proof.to_bytes(), np.random.default_rng(0)
    accepted = []
    for _ in range(FLIPS):
        damaged = bytearray(data)
        damaged[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
        try:
            accepted.append(checker.check(Proof.from_bytes(bytes(damaged)), x))
        except CertificateError:
            continue
    assert all(bound <= 1.0 for bound in accepted)
    assert len(accepted) < FLIPS / 10


@pytest.mark.parametrize("size", [0, 1, 7, 11, 12, 40, -1])
def test_a_truncated_file_is_refused(made, size) -> None:
    data = made[1].to_bytes()
    with pytest.raises(CertificateError):
        Proof.from_bytes(data[:size])


def test_a_bomb_is_refused_before_it_is_inflated(made) -> None:
    """A stream of zeros that inflates to a gigabyte, behind a header that admits to a little."""
    bomb = zlib.compress(bytes(1 << 24), 9)
    small = canonical_json({"arrays": [["a", "<f8", [4]]]})
    with pytest.raises(CertificateError, match="not as long"):
        container.unpack(file_of(small, bomb))


@pytest.mark.parametrize(
    "arrays",
    [
        [["a", "<f8", [1 << 28, 1 << 28]]],
        [["a", "<f8", [1 << 26]], ["b", "<f8", [1 << 26]]],
        [["a", "<f8", [-1]]],
        [["a", "<f8", [2.0]]],
        [["a", "|O", [1]]],
        [["a", "<f8", [1, 1, 1]]],
        [["a", "<f8", 1]],
        [["b", "<f8", [0]], ["a", "<f8", [0]]],
        [["a", "<f8", [0]], ["a", "<f8", [0]]],
        "arrays",
    ],
)
def test_shapes_of_a_stranger_are_refused_before_room_is_made(arrays) -> None:
    with pytest.raises(CertificateError):
        container.unpack(file_of(canonical_json({"arrays": arrays}), zlib.compress(b"")))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(value) -> None:
    data = container.pack({}, {"a": np.array([value])})
    with pytest.raises(CertificateError, match="NaN or infinity"):
        container.unpack(data)


def test_a_header_in_another_spelling_is_refused(made) -> None:
    data = made[1].to_bytes()
    length = int.from_bytes(data[8:12], "little")
    header = json.loads(data[12 : 12 + length])
    spaced = json.dumps(header, sort_keys=True).encode()
    with pytest.raises(CertificateError, match="canonical"):
        Proof.from_bytes(file_of(spaced, data[12 + length :]))
    deep = b"[" * 100_000
    with pytest.raises(CertificateError):
        Proof.from_bytes(file_of(deep, data[12 + length :]))


@pytest.mark.parametrize(
    "claim",
    [
        {"upper": 2.0}, {"upper": 0}, {"eps": -1.0}, {"norm": "l1"}, {"classes": "some"},
        {"index": -1}, {"index": True}, {"student": "x"}, {"schema": "kdguard.proof/2"},
        {"extra": 1},
    ],
)  # fmt: skip
def test_a_malformed_claim_is_refused(made, claim) -> None:
    data = made[1].to_bytes()
    length = int.from_bytes(data[8:12], "little")
    header = {**json.loads(data[12 : 12 + length]), **claim}
    with pytest.raises(CertificateError):
        Proof.from_bytes(file_of(canonical_json(header), data[12 + length :]))


def test_an_array_of_another_type_is_refused(made) -> None:
    header, arrays = container.unpack(made[1].to_bytes())
    for name in arrays:
        other = {**arrays, name: arrays[name].astype(np.float32 if "theta" in name else np.uint16)}
        if other[name].dtype != arrays[name].dtype:
            with pytest.raises(CertificateError):
                Proof.from_bytes(container.pack(header, other))
        fewer = {key: value for key, value in arrays.items() if key != name}
        with pytest.raises(CertificateError):
            Proof.from_bytes(container.pack(header, fewer))
    with pytest.raises(CertificateError):
        Proof.from_bytes(container.pack(header, {**arrays, "more": np.zeros(1)}))


def test_an_index_in_another_form_is_refused(made) -> None:
    entries = [Entry(1, "0" * 64, 0.5), Entry(2, "1" * 64, 0.25)]
    index = Index.of(made[1].claim, entries)
    assert Index.from_bytes(index.to_bytes()) == index
    twice = replace(index, entries=(entries[0], entries[0]))
    turned = replace(index, entries=(entries[1], entries[0]))
    for other in (twice.to_bytes(), turned.to_bytes(), index.to_bytes() + b" ", b"", b"[]", b"{}"):
        with pytest.raises(CertificateError):
            Index.from_bytes(other)
