"""python -m benchmarks.solvers --reference R.onnx --student S.onnx [--eps E] [--seconds S]

(a) On five images of the training set: HiGHS on the big-M integer program with softmax in pieces,
for --seconds an image, worst direction of the top class first, and the bound that it *claims*
(nothing recomputes it); then the time in which `branch` has a bound as low, with growing numbers
of nodes, and the time in which it is within 1e-3 of it (`closed`): for each image alone, and for
all of them in one call, as `certify` bounds images, in seconds an image (`together`).
(b) On --images images: joint CROWN, alone and with the halved boxes of the row `crown`, beside
α-CROWN with softmax on raw logits (`alpha`): share of images where ours is tighter, means,
processor time.
Writes benchmarks/results/solvers.json with --record.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import machine, write
from benchmarks.solvers import alpha
from mlflow_kdguard import data, graph
from mlflow_kdguard.certify import Ball, Joint, gap, join
from mlflow_kdguard.certify.budget import Aim
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.milp import Questions
from mlflow_kdguard.certify.milp.pieces import integer_program
from mlflow_kdguard.certify.propagate import relax
from mlflow_kdguard.certify.relax import branch, crown, plain_arithmetic
from mlflow_kdguard.files import read_bytes
from mlflow_kdguard.solvers.adapter import NOTHING, Limits
from mlflow_kdguard.solvers.oracle import Oracle

IMAGES = (1, 2, 3, 5, 8)
"""The five images of (a), by number in the training set."""
NODES = (1, 100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600)
AIM = Aim(relative=0.0, absolute=1e-4)
"""How far `branch` goes on: beyond what an integer program closes to."""
CLOSED = 1e-3


def main() -> None:
    """Both comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--data", default="fashion-mnist#train")
    parser.add_argument("--eps", type=float, default=0.025)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--named", type=int, nargs="*", default=list(IMAGES))
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pair = [
        graph.read(read_bytes(file, what=name), where=name)
        for file, name in ((given.reference, "the reference"), (given.student, "the student"))
    ]
    joint, images = join(*pair, device=torch.device("cpu")), data.load(given.data)
    body: dict[str, Any] = {"eps": given.eps, "seconds": given.seconds, "data": given.data}
    body["alpha"] = against_alpha(pair, joint, images.batch(range(given.images))[0], given.eps)
    pixels = [images.batch([i])[0] for i in given.named]
    claims = [
        claimed(joint, x, given.eps, given.seconds, i)
        for i, x in zip(given.named, pixels, strict=True)
    ]
    body["milp"] = claims
    body["branch"] = {
        "alone": [beaten(joint, x, given.eps, [claim], "alone")
                  for x, claim in zip(pixels, claims, strict=True)],
        "together": beaten(joint, np.concatenate(pixels), given.eps, claims, "together"),
    }  # fmt: skip
    if given.record:
        print(f"wrote {write('solvers.json', {**machine(), **body})}")


def claimed(joint: Joint, x: Any, eps: float, seconds: float, number: int) -> dict[str, Any]:
    """What HiGHS claims after `seconds`, for the worst direction of the top class."""
    ball = Ball.around(torch.from_numpy(x), eps=eps)
    top = joint.logits(ball.centre)[0].argmax(1)
    with torch.no_grad():
        found = Questions.of(joint, ball, top, refining=False)
    began, claims = time.monotonic(), []
    with Oracle("highs") as oracle:
        questions = found.tree(0, oracle.ask, ball.centre.clone(), branching=False).questions
        for row in found.start.upper.argsort(descending=True).tolist():
            left = seconds - (time.monotonic() - began)
            linear = float(found.start.upper[row])
            if claims and linear <= max(claims):
                continue
            model, _ = integer_program(questions[row], questions[row].root(1.0))
            limits = Limits(seconds=max(1.0, left), gap=1e-3)
            answer = oracle.ask(model, limits, NOTHING)
            claims.append(min(linear, answer.bound) if answer.bound == answer.bound else linear)
    spent = time.monotonic() - began
    print(f"image {number}: HiGHS claims {max(claims):.5f} after {spent:.1f} s", flush=True)
    return {"image": number, "claim_unverified": max(claims), "seconds": spent}


def beaten(
    joint: Joint, x: Any, eps: float, claims: list[dict[str, Any]], how: str
) -> dict[str, Any]:
    """With how many nodes, and in what time an image, `branch` has bounds as low as all claims."""
    ball = Ball.around(torch.from_numpy(x), eps=eps)
    top = joint.logits(ball.centre)[0].argmax(1)
    level = np.array([claim["claim_unverified"] for claim in claims])
    spent = sum(claim["seconds"] for claim in claims) / len(claims)
    rows: list[dict[str, Any]] = []
    while len(rows) < len(NODES) and not (rows and (rows[-1]["upper"] <= level).all()):
        start = time.monotonic()
        upper = branch(joint, ball, top, NODES[len(rows)], aim=AIM).upper.numpy()
        seconds = (time.monotonic() - start) / len(claims)
        rows.append({"nodes": NODES[len(rows)], "upper": upper.tolist(), "seconds": seconds,
                     "times_faster": spent / seconds})  # fmt: skip
    found = {
        name: next((row for row in rows if (row["upper"] <= level + slack).all()), None)
        for name, slack in (("as_low", 0.0), ("closed", CLOSED))
    }
    told = "; ".join(
        f"{name.replace('_', ' ')}: " + (f"{row['nodes']} nodes, {row['seconds']:.2f} s an image, "
        f"{row['times_faster']:.0f} x faster" if row else "NOT reached")
        for name, row in found.items()
    )  # fmt: skip
    print(f"branch {how}, images {[claim['image'] for claim in claims]}: {told}", flush=True)
    return {"images": [claim["image"] for claim in claims], "rows": rows, **found}


def joint_alone(joint: Joint, ball: Ball, top: torch.Tensor) -> torch.Tensor:
    """One joint backward pass with chosen multipliers, before any box is halved: B."""
    with plain_arithmetic(ball.centre.device):
        relaxed = relax(joint, ball, tighten=True)
        items = Items(torch.arange(len(top)), top)
        start = gap.directions(relaxed, items, refining=False)
        return gap.sound(start.upper.view(2, -1).amax(0), relaxed)


def against_alpha(pair: list[Any], joint: Joint, x: Any, eps: float) -> dict[str, Any]:
    """Joint CROWN and α-CROWN of softmax on the same images, top class, processor time."""
    ball = Ball.around(torch.from_numpy(x), eps=eps)
    top = joint.logits(ball.centre)[0].argmax(1)
    nets = [layers(each) for each in pair]
    lo, hi = ball.lo.flatten(1), ball.hi.flatten(1)

    def baseline(count: int) -> torch.Tensor:
        found = [alpha.gap(nets[1], nets[0], lo[i], hi[i], int(top[i])) for i in range(count)]
        return torch.tensor(found, dtype=torch.float64)

    baseline(1)  # The first pass of automatic differentiation takes a second of its own.
    theirs, their_seconds = timed(lambda: baseline(len(x)))
    figures: dict[str, Any] = {
        "images": len(x),
        "alpha_mean": float(theirs.mean()),
        "alpha_seconds": their_seconds / len(x),
    }
    for name, bound in (
        ("joint CROWN", lambda: joint_alone(joint, ball, top)),
        ("with halved boxes", lambda: crown(joint, ball, top).upper),
    ):
        bound()
        ours, seconds = timed(bound)
        figures[name] = {
            "mean": float(ours.mean()), "seconds": seconds / len(x),
            "tighter_share": float((ours < theirs).double().mean()),
            "times_faster": their_seconds / seconds,
        }  # fmt: skip
        print(
            f"{len(x)} images, eps {eps}: {name} mean {ours.mean():.4f} in "
            f"{seconds / len(x):.3f} s, α-CROWN on raw softmax mean {theirs.mean():.4f} in "
            f"{their_seconds / len(x):.3f} s ({their_seconds / seconds:.1f} x); ours tighter on "
            f"{figures[name]['tighter_share']:.0%}",
            flush=True,
        )
    return figures


def timed(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """What it returns, and the processor time that it takes."""
    began = time.process_time()
    found = work()
    return found, time.process_time() - began


def layers(model: graph.Graph) -> alpha.Layers:
    """The dense layers of an MLP whose pixels only pass a clip and scales of nothing."""
    found = []
    for layer in model.layers:
        if isinstance(layer, graph.Affine):
            weight, bias = (
                torch.from_numpy(np.array(a, dtype=float)) for a in (layer.weight, layer.bias)
            )
            found.append((weight, bias))
        elif isinstance(layer, graph.Scale):
            scale, shift = np.asarray(layer.factor), np.asarray(layer.offset)
            if not ((scale == 1.0).all() and (shift == 0.0).all()):
                raise SystemExit("the baseline takes MLPs without normalisation.")
        elif not isinstance(layer, graph.Relu | graph.Clip | graph.Reshape):
            raise SystemExit(f"the baseline does not know the layer {type(layer).__name__}.")
    return found


if __name__ == "__main__":
    main()
