"""Many clients at once, and what each of them was answered."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import requests

from flows.attacks.world import Version, World

Job = Callable[[requests.Session], requests.Response]


@dataclass
class Tally:
    """Answers by job and status (0: none at all), and seconds by job."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    oddities: list[str] = field(default_factory=list)

    def count(self, job: str, status: int) -> int:
        """How often a job was answered so."""
        return self.answers[job, status]

    def median(self, job: str) -> float:
        """Median seconds of a job."""
        found = sorted(self.seconds.get(job, [0.0]))
        return found[len(found) // 2]


def crowd(
    w: World, jobs: Callable[[int], Mapping[str, Job]], *, clients: int, seconds: float
) -> Tally:
    """Let `clients` threads go through their jobs, each in turn, for some time."""
    tally, lock, end = Tally(), threading.Lock(), time.monotonic() + seconds

    def client(number: int) -> None:
        mine = jobs(number)
        with requests.Session() as http:
            http.auth = w.http.auth
            while time.monotonic() < end:
                for name, job in mine.items():
                    begin = time.monotonic()
                    try:
                        answer = job(http)
                        status, text = answer.status_code, answer.text
                    except requests.RequestException as error:
                        status, text = 0, repr(error)
                    with lock:
                        tally.answers[name, status] += 1
                        tally.seconds.setdefault(name, []).append(time.monotonic() - begin)
                        if status == 0 or status >= 500:
                            tally.oddities.append(f"{name} {status} {text[:300]}")

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


@dataclass(frozen=True)
class Mix:
    """What every client does: promote in turn, be refused, read, write what is not guarded."""

    w: World
    good: tuple[Version, ...]
    bad: tuple[Version, ...]

    @staticmethod
    def of(w: World, models: int) -> "Mix":
        """Models with two certified versions and one that is not."""
        good: list[Version] = []
        bad: list[Version] = []
        for _ in range(models):
            first = w.version(seed=0)
            good += [first, w.version(first.name, seed=1)]
            bad.append(w.version(first.name, seed=2, certified=False))
        return Mix(w, tuple(good), tuple(bad))

    def jobs(self, number: int) -> dict[str, Job]:
        """The jobs of one client; clients share models, so that they meet."""
        turn = {"n": number}
        model = number % len(self.bad)

        def promote(http: requests.Session) -> requests.Response:
            turn["n"] += 1
            return self._alias(http, self.good[2 * model + turn["n"] % 2], "champion")

        return {
            "promote": promote,
            "read": lambda http: self._get(http, self.bad[model].name),
            "refuse": lambda http: self._alias(http, self.bad[model], "champion"),
            "shadow": lambda http: self._alias(http, self.bad[model], f"shadow-{number}"),
            "tag": lambda http: self._tag(http, self.bad[model], f"note-{number}"),
        }

    def _url(self, path: str) -> str:
        return f"{self.w.server.uri}/api/2.0/mlflow/{path}"

    def _alias(self, http: requests.Session, version: Version, alias: str) -> requests.Response:
        body: dict[str, Any] = {"name": version.name, "alias": alias, "version": version.number}
        return http.post(self._url("registered-models/alias"), json=body, timeout=120)

    def _get(self, http: requests.Session, name: str) -> requests.Response:
        return http.get(self._url("registered-models/get"), params={"name": name}, timeout=120)

    def _tag(self, http: requests.Session, version: Version, key: str) -> requests.Response:
        body = {"name": version.name, "version": version.number, "key": key, "value": "x"}
        return http.post(self._url("model-versions/set-tag"), json=body, timeout=120)
