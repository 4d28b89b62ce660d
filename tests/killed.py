"""A stage with other inputs is killed before its k-th change of the disk, for every k.

Run as a program: python killed.py FOLDER. Prints at how many places it was killed.
"""

import os
import sys
from pathlib import Path
from typing import Any

from mlflow_kdguard.ledger import Ledger

CHANGES = {"os.remove", "os.rmdir", "os.rename", "os.mkdir", "os.truncate"}
KILLED = 9


def stage(folder: Path, i: int) -> None:
    """Run a stage with the input `i`, unless it is finished; what it finds must be its own."""
    ledger = Ledger(folder)
    entry = ledger.open("stage", {"i": i})
    if entry.record is not None:
        assert entry.path("a.bin").read_bytes() == bytes([i]) * 9, "a done.json that lies"
        return
    whole = [entry.path(f"sub/{n}.pt").exists() for n in range(3)]
    assert i == 2 or all(whole) or not any(whole), "half of what was there before"
    assert not whole[0] or entry.path("sub/0.pt").read_text() == str(i), "another's"
    entry.path("sub").mkdir(exist_ok=True)
    for n in range(3):
        entry.path(f"sub/{n}.pt").write_text(str(i))
    entry.path("a.bin").write_bytes(bytes([i]) * 9)
    ledger.finish(entry, ["a.bin"], {"i": i})


def killed_before(change: int, folder: Path) -> int:
    """The exit code of a process that runs the stage with the input 2 until then."""
    left = [change]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and args[2] & os.O_CREAT):
            left[0] -= 1
            if left[0] < 0:
                os._exit(KILLED)

    child = os.fork()
    if child == 0:
        sys.addaudithook(hook)
        stage(folder, 2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(root: Path) -> int:
    """Kill at every place; go on with the old inputs, the new ones, and others."""
    change = 0
    while True:
        for then in (1, 2, 3):
            folder = root / f"{change}-{then}"
            stage(folder, 1)
            ended = killed_before(change, folder)
            assert ended in (0, KILLED), ended
            stage(folder, then)
            stage(folder, then)
        if ended == 0:
            return change
        change += 1


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
