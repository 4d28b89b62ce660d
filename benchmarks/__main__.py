"""python -m benchmarks [NAME…]: run benchmarks one after the other (default: all of them).

certify   bounds on the confidence gap, Fashion-MNIST          about 5 minutes
audit     what calibrates universal inversion, mnist5k         about 15 minutes

`python -m benchmarks.story FOLDER` draws a finished demo or story; `python -m benchmarks.gate.load`
crowds a gated server.
"""

import argparse
import runpy
import sys

NAMES = ("certify", "audit")


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
