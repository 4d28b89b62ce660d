"""Skips that cannot hide: with KDGUARD_REQUIRE set, what is missing fails the test.

`KDGUARD_REQUIRE=all` asks for everything that a machine without a GPU can have;
a comma-separated list asks for the named things only (`KDGUARD_REQUIRE=cuda,postgres`).
A GPU has to be asked for by name, because no installation step can add one.
"""

import os
import shutil
from pathlib import Path

import pytest


def require(name: str, available: bool, reason: str) -> None:
    """Go on if `available`; otherwise skip, or fail where KDGUARD_REQUIRE asks for `name`."""
    if available:
        return
    asked = {part.strip() for part in os.environ.get("KDGUARD_REQUIRE", "").split(",")}
    if name in asked or ("all" in asked and name != "cuda"):
        pytest.fail(f"{name} is required here (KDGUARD_REQUIRE): {reason}", pytrace=False)
    pytest.skip(f"{name}: {reason}")


def postgres_program(name: str) -> Path | None:
    """A PostgreSQL server program, also where Debian keeps it (not on the PATH)."""
    found = shutil.which(name)
    if found is not None:
        return Path(found)
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=_version)
    return places[-1] if places else None


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.parts[4].split(".") if part.isdigit())
