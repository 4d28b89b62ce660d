"""How the commands of this benchmark begin and end."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.guard import specification
from benchmarks.guard.cells import Cells
from benchmarks.guard.rows import Guard, guards
from benchmarks.guard.teachers import JUDGES
from mlflow_kdguard import devices
from mlflow_kdguard.errors import KDGuardError, UsageError

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Begun:
    """A specification, its guards, and the cells that are made of it."""

    spec: dict[str, Any]
    guards: dict[str, Guard]
    cells: Cells

    def named(self, names: list[str]) -> dict[str, Guard]:
        """Guards by name; UsageError for one that there is not."""
        unknown = sorted(set(names) - set(self.guards))
        if unknown:
            raise UsageError(
                f"there is no guard {', '.join(unknown)}.",
                remedy=f"Known: {', '.join(self.guards)}.",
            )
        return {name: guard for name, guard in self.guards.items() if name in names}


def parser(text: str, *, out: str) -> argparse.ArgumentParser:
    """The options that all commands have; `text` is the help, `out` the results file."""
    made = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--config", type=Path, default=HERE / "spec.yaml")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--data-root", type=Path)
    made.add_argument("--jobs", type=count, default=1)
    made.add_argument("--folder", type=Path, default=Path("kdguard-work/guard"))
    made.add_argument("--out", default=out)
    return made


def count(text: str) -> int:
    """A whole number from 1 on, as an argument."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def begin(given: argparse.Namespace, *, on: str = JUDGES[-1]) -> Begun:
    """What the options of `parser` name. Raises what reading it raises."""
    torch.set_num_threads(1)
    spec = specification.read(given.config)
    device = devices.pick(given.device)
    cells = Cells(given.folder, spec["sets"], on=on, device=device, root=given.data_root)
    return Begun(spec, guards(spec), cells)


@contextmanager
def ended(folder: Path) -> Iterator[None]:
    """End with the command line's exit codes: one line for bad input; Ctrl-C keeps `folder`."""
    try:
        yield
    except KDGuardError as error:
        print(f"error: {error.message}\n  {error.remedy}".rstrip(), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"interrupted; finished cells are kept in {folder}.", file=sys.stderr)
        sys.exit(130)
