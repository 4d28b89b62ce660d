"""How a run of this benchmark ends when it cannot go on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow_kdguard.errors import KDGuardError


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
