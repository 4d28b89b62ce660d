"""python -m benchmarks [NAME…]: run benchmarks one after the other (default: all of them).

certify   bounds on the confidence gap, Fashion-MNIST          about 5 hours (--help)
patch     what any patch can do, Fashion-MNIST                 about 5 minutes
smooth    smoothed pairs of residual networks, Fashion-MNIST   about 20 minutes
soundness bounds against attacks and enumeration, random nets  about 20 minutes
audit     what calibrates universal inversion, mnist5k         about 15 minutes

`python -m benchmarks.guard` (or `kdguard bench guard`) holds guards against attacks that survive
distillation: two hours with --jobs 2; it goes on where it was stopped.
`python -m benchmarks.faithful` compares losses and recipes of training: hours; it goes on where it
was stopped. `python -m benchmarks.proof --reference R --student S` checks and alters proofs of
bounds; `python -m benchmarks.solvers` has our bounds beside those of an integer program;
`python -m benchmarks.story FOLDER` draws a finished demo or story; `python -m benchmarks.gate.load`
crowds a gated server.
"""

import argparse
import runpy
import sys

NAMES = ("certify", "patch", "smooth", "soundness", "audit")


def main() -> None:
    """Run the named benchmarks in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    chosen = parser.parse_args().names or NAMES
    for name in chosen:
        if name not in NAMES:
            parser.error(f"there is no benchmark {name!r}; known: {', '.join(NAMES)}")
    for name in chosen:
        sys.argv = [f"benchmarks.{name}"]
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
