"""Little effort for bounds: they hold for any, and little of it is quick."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from mlflow_kdguard.certify import branch, refine, split

LINEAR = ((split, "STEPS", 4), (refine, "STEPS", 3), (refine, "ROUNDS", 2))
SEARCH = ((branch, "STEPS", 3), (branch, "ROOT_STEPS", 4))


@contextmanager
def little(*effort: tuple[ModuleType, str, Any]) -> Iterator[None]:
    """Constants of some modules (module, name, value) until the end of the block."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in effort:
            patch.setattr(module, name, value)
        yield
