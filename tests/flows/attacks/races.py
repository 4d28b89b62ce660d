"""Attempts that count on two things happening at once."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from flows.attacks.table import Attempt, Scene, attack
from flows.attacks.world import World


def together(*calls: Callable[[], requests.Response]) -> list[requests.Response]:
    """All calls at once; their answers in the order of the calls."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], requests.Response]) -> requests.Response:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@attack(14)
def promotion_beside_a_refused_one(w: World) -> Scene:
    """One of two at the same moment has a certificate: it wins, the other is refused."""
    good = w.champion()
    better = w.version(good.name, seed=1)
    bad = w.version(good.name, seed=2, certified=False)
    answers = together(lambda: w.alias(better), *[lambda: w.alias(bad)] * 3)
    assert [a.status_code for a in answers] == [200, 403, 403, 403], [a.text for a in answers]
    assert w.held(good.name) == better.number
    yield Attempt(lambda: w.alias(bad), serves=(better,))


@attack(14)
def one_promotion_asked_for_twice(w: World) -> Scene:
    """Two of the same do not stand in each other's way."""
    version = w.version()
    answers = together(lambda: w.alias(version), lambda: w.alias(version, "production"))
    assert [a.status_code for a in answers] == [200, 200], [a.text for a in answers]
    yield Attempt(lambda: w.alias(w.version(version.name, seed=1, certified=False)))


@attack(14)
def two_promotions_at_once(w: World) -> Scene:
    """Both may pass; what stays is one of them, and each is in the log once."""
    one = w.champion()
    two, three = w.version(one.name, seed=1), w.version(one.name, seed=2)
    count = len(w.log())
    answers = together(lambda: w.alias(two), lambda: w.alias(three))
    assert all(a.status_code in (200, 403) for a in answers), [a.text for a in answers]
    assert any(a.ok for a in answers)
    assert w.held(one.name) in {two.number, three.number}
    records = w.log()[count:]
    assert len(records) == 2, records
    bad = w.version(one.name, seed=3, certified=False)
    yield Attempt(lambda: w.alias(bad))


@attack(14)
def certificate_taken_away_meanwhile(w: World) -> Scene:
    """Whoever wins: a version that is promoted has its certificate still."""
    version = w.version()
    body = {"name": version.name, "version": version.number, "key": "kdguard.certificate"}
    for _ in range(3):
        together(
            lambda: w.alias(version),
            lambda: w.call("model-versions/delete-tag", body, method="DELETE"),
        )
        tags = w.rows(
            "SELECT value FROM model_version_tags WHERE name=:n AND key='kdguard.certificate'",
            n=version.name,
        )
        assert w.held(version.name) is None or tags, "promoted, and without its certificate"
        if w.held(version.name) is None:
            w.certify(version)
    yield Attempt(lambda: w.alias(w.version(version.name, seed=1, certified=False)))


def _renamed(w: World, name: str) -> Any:
    return w.call("registered-models/rename", {"name": name, "new_name": w.name()})


@attack(14)
def renamed_meanwhile(w: World) -> Scene:
    """Afterwards no model holds a guarded alias under a name that its certificate lacks."""
    version = w.version()
    answers = together(lambda: w.alias(version), lambda: _renamed(w, version.name))
    assert all(a.status_code < 500 for a in answers), [a.text for a in answers]
    assert not (answers[0].ok and answers[1].ok), "renamed, and promoted under the old name"
    yield Attempt(lambda: w.alias(w.version(seed=1, certified=False)))


@attack(14)
def deleted_meanwhile(w: World) -> Scene:
    version = w.version()
    body = {"name": version.name, "version": version.number}
    answers = together(
        lambda: w.alias(version),
        lambda: w.call("model-versions/delete", body, method="DELETE"),
    )
    assert all(a.status_code < 500 for a in answers), [a.text for a in answers]
    assert not (answers[0].ok and answers[1].ok), "deleted, and promoted"
    yield Attempt(lambda: w.alias(w.version(version.name, seed=1, certified=False)))


@attack(14)
def swapped_while_it_is_promoted(w: World) -> Scene:
    """What is served afterwards is what was certified, or nothing is."""
    for round_ in range(5):
        version = w.version(seed=0)
        path, honest = version.folder / "model.onnx", version.files["model.onnx"]
        evil = bytes([honest[0]]) + honest[1:-1] + bytes([honest[-1] ^ 1])
        stop = threading.Event()

        def swap(path: Any = path, evil: bytes = evil, honest: bytes = honest,
                 stop: threading.Event = stop) -> None:  # fmt: skip
            while not stop.is_set():
                path.write_bytes(evil)
                path.write_bytes(honest)

        thread = threading.Thread(target=swap)
        thread.start()
        answer = w.alias(version)
        stop.set()
        thread.join()
        path.write_bytes(evil)
        assert answer.status_code in (200, 403), answer.text
        if answer.ok:
            from mlflow_kdguard.files import sha256

            assert w.bytes_of(version)["model.onnx"] == sha256(honest), round_
    yield Attempt(lambda: w.alias(w.version(seed=1, certified=False)))
