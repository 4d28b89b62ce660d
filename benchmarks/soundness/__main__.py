"""Bounds that are too low: python -m benchmarks.soundness --cases 10000 --seed 0 [--state FILE].

A case is a pair of random networks, an image, a ball (l_inf or l2), classes (top or all) and a
method. Its raw upper bound, which no attack has touched, is held against the best point that an
attack in float64 finds, and on networks of two pixels against the exact gap, from enumeration of
activation patterns. Prints cases by method and kind, violations (none, or exit code 1) and the
smallest margin (of bounds below 1), and writes benchmarks/results/soundness.json. With --state the
work goes on where it stopped; the networks follow from --seed alone.

Rows "proof of …" are what the independent checker derives from the search's proofs. With --hostile
every network gets numbers that floating point dislikes (`networks.hostile`), and a witness is
believed up to the interpreter's own rounding; the record is soundness-hostile.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import machine, write
from benchmarks.soundness import networks, planar, witness
from mlflow_kdguard import extensions
from mlflow_kdguard.certify import Ball, Joint, anytime, join, keep
from mlflow_kdguard.certify import relax as relaxations
from mlflow_kdguard.certify.budget import Budget
from mlflow_kdguard.certify.proofs import Writer
from mlflow_kdguard.certify.propagate import relax
from mlflow_kdguard.certify.relax import plain_arithmetic
from mlflow_kdguard.certify.rounding import gamma
from mlflow_kdguard.errors import NonFiniteError
from mlflow_kdguard.files import write_json
from mlflow_kdguard.graph import Graph
from mlflow_kdguard.proof import Checker, Claim
from mlflow_kdguard.proof.lower import joined

Bound = Callable[[Joint, Ball, Tensor | None], Tensor]
IMAGES, SEARCHED, EXACT = 24, 3, 6
"""Images a pair, those of them for the searches (a hundred times as slow), those enumerated."""
RADII: dict[str, tuple[float, ...]] = {
    "linf": (1e-6, 0.01, 0.05, 0.2, 0.6), "l2": (1e-6, 0.05, 0.2, 1.0)
}  # fmt: skip
TIE = 1e-12
"""What float64 may add to a gap between confidences: the interpreter's own rounding."""
KEPT = 20


def main() -> None:
    """Draw pairs until there are enough cases; record what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=8, help="of the search, an image")
    parser.add_argument("--hostile", action="store_true")
    parser.add_argument("--state", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    methods = _methods(given.nodes)
    state = _begun(given.state, seed=given.seed, nodes=given.nodes, hostile=given.hostile)
    last = time.monotonic()
    while _cases(state) < given.cases:
        began = time.process_time()
        _pair(state, methods, given.seed)
        state["seconds"] += time.process_time() - began
        if given.state is not None:
            write_json(given.state, state)
        if time.monotonic() - last > 15:
            last = time.monotonic()
            print(f"{_cases(state)} cases, {len(state['violations'])} violations, "
                  f"{state['seconds']:.0f} s", flush=True)  # fmt: skip
    _told(state)
    name = "soundness-hostile.json" if given.hostile else "soundness.json"
    print(f"wrote {write(name, {**machine(), **state})}")
    sys.exit(bool(state["violations"]))


def _methods(nodes: int) -> dict[str, Bound]:
    """Every row of table "bound", and the search without its attack beforehand."""
    found: dict[str, Bound] = {}
    for name in extensions.names("bound"):
        bound = extensions.load("bound", name)
        found[name] = lambda joint, ball, classes, bound=bound: (
            bound(joint, ball, classes, nodes).upper
        )

    def alone(joint: Joint, ball: Ball, classes: Tensor | None) -> Tensor:
        with plain_arithmetic(ball.centre.device):
            known = relax(joint, ball, tighten=True)
            return anytime.bounds(known, classes, Budget(nodes)).upper

    return found | {"branch, no attack": alone}


def _begun(path: Path | None, **asked: Any) -> dict[str, Any]:
    if path is not None and path.exists():
        state: dict[str, Any] = json.loads(path.read_text())
        if any(state.get(key) != value for key, value in asked.items()):
            sys.exit(f"{path} is the state of another run: {state['seed']=}, {state['nodes']=}")
        return state
    empty: dict[str, Any] = {"pairs": 0, "counts": {}, "margins": {}, "violations": []}
    return {**asked, **empty, "exact": {"cells": 0, "largest_witness_above": -1.0}, "seconds": 0.0}


def _cases(state: dict[str, Any]) -> int:
    return sum(state["counts"].values())


def _pair(state: dict[str, Any], methods: dict[str, Bound], seed: int) -> None:
    """One pair, one ball's radius, norm and classes, IMAGES images, every method."""
    number = state["pairs"]
    random = np.random.default_rng((seed, number))
    kind = list(networks.KINDS)[number % len(networks.KINDS)]
    reference, student, scale = networks.pair(kind, random)
    if state["hostile"]:
        reference, student = (networks.hostile(model, random) for model in (reference, student))
    norm: Literal["linf", "l2"] = "linf" if random.random() < 0.7 else "l2"
    eps = float(random.choice(RADII[norm]))
    x = random.uniform(-0.2, 1.2, (IMAGES, *reference.input_shape)).clip(0, 1)
    ball = Ball.around(torch.from_numpy(x.astype(np.float32)), eps=eps, norm=norm)
    joint = join(reference, student, device=torch.device("cpu"))
    classes = None if random.random() < 0.6 else joint.logits(ball.centre)[0].argmax(1)
    lower = witness.strongest((reference, student), joint, ball, classes, number)
    tie = _tie(joint, ball) if state["hostile"] else TIE
    exact = _exact(state, reference, student, ball, lower) if kind == "planar" else {}
    proved = {f"proof of {name}": _proof(name, (reference, student), state["nodes"])
              for name in relaxations.PROVABLE}  # fmt: skip
    for name, bound in (methods | proved).items():
        some = IMAGES if name in ("crown", "interval", "lp", "milp") else SEARCHED
        part = Ball(*(each[:some] for each in (ball.centre, ball.lo, ball.hi)), eps, norm)
        try:
            upper = bound(joint, part, None if classes is None else classes[:some]).numpy()
        except NonFiniteError:
            continue
        key = f"{name}|{kind}"
        state["counts"][key] = state["counts"].get(key, 0) + some
        truth = lower[:some].copy()
        if classes is None:
            for i in exact.keys() & set(range(some)):
                truth[i] = max(truth[i], exact[i])
        margin = float(np.where(upper < 1.0, upper - truth, 1.0).min())
        state["margins"][key] = min(state["margins"].get(key, 1.0), margin)
        for i in np.flatnonzero(~(upper >= truth - tie))[:KEPT]:
            case = {"pair": number, "image": int(i), "method": name, "kind": kind, "norm": norm,
                    "eps": eps, "scale": scale, "classes": "all" if classes is None else "top",
                    "upper": float(upper[i]), "lower": float(truth[i])}  # fmt: skip
            state["violations"].append(case)
            print(f"VIOLATION {case}", flush=True)
    state["pairs"] = number + 1


def _tie(joint: Joint, ball: Ball) -> float:
    """What float64 may add to a gap of networks of any scale."""
    known = relax(joint, ball, tighten=False)
    sizes = [float(known.scales[i].max()) for i in (joint.reference, joint.student)]
    return TIE + gamma(joint.terms) * max(sizes)


def _proof(method: str, models: tuple[Graph, Graph], nodes: int) -> Bound:
    """What the checker derives from the proofs of a method."""

    def bound(joint: Joint, ball: Ball, classes: Tensor | None) -> Tensor:
        kept = keep.Kept()
        relaxations.PROVABLE[method](joint, ball, classes, nodes, kept=kept)
        checker = Checker(*models, joined(*models))
        asked = "all" if classes is None else "top"
        claim = Claim("0" * 64, "0" * 64, "0" * 64, "", 0, ball.norm, ball.eps, asked, 1.0)
        writer, found = Writer(checker, joint, claim), []
        for place, x in enumerate(ball.centre.float().numpy()):
            found.append(checker.check(writer.write(kept, place, place, x), x))
        return torch.tensor(found, dtype=torch.float64)

    return bound


def _exact(state: dict[str, Any], reference: Any, student: Any, ball: Ball, lower: Any) -> Any:
    """The exact gaps of the first images; the attack must not have found more than there is."""
    if ball.norm != "linf":
        return {}
    lo, hi = (end.flatten(1).numpy() for end in ball.inner())
    found = {}
    for i in range(EXACT):
        found[i], cells = planar.largest_gap(reference, student, lo[i], hi[i])
        known = state["exact"]
        known["cells"] += cells
        known["images"] = known.get("images", 0) + 1
        known["largest_witness_above"] = max(
            known["largest_witness_above"], float(lower[i] - found[i])
        )
    return found


def _told(state: dict[str, Any]) -> None:
    print("method             kind       cases   smallest margin")
    for key, count in sorted(state["counts"].items()):
        name, kind = key.split("|")
        print(f"{name:18} {kind:10} {count:6} {state['margins'][key]:12.3e}")
    exact = state["exact"]
    print(
        f"{_cases(state)} cases of {state['pairs']} pairs, {len(state['violations'])} violations; "
        f"{exact.get('images', 0)} images enumerated exactly in {exact['cells']} patterns (a "
        f"witness at most {exact['largest_witness_above']:.1e} above); {state['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
