"""Documents that are followed to the letter: commands out of Markdown, run in one shell.

A ```bash block is typed into the shell as it stands; a ```text block after it shows what the
command prints: its lines must appear in that order, `…` stands for any text within a line.
"""

import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flows.servers import kill_group

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```([\w ]*)\n(.*?)^```$|^(#+ [^\n]+)$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its content, the heading above it, its place in the page."""

    language: str
    text: str
    heading: str
    number: int


def blocks(page: Path, heading: str | None = None) -> list[Block]:
    """The fenced blocks of a page, or those below one heading (without its number of `#`)."""
    above, found = "", []
    for match in _FENCE.finditer(page.read_text()):
        if match.group(3):
            above = match.group(3).lstrip("# ")
            continue
        found.append(Block(match.group(1), match.group(2), above, len(found)))
    return [block for block in found if heading in (None, block.heading)]


def steps(found: list[Block]) -> Iterator[tuple[Block, Block | None]]:
    """Each ```bash block with the ```text block that follows it, if one does."""
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language == "bash":
            shown = after if after is not None and after.language == "text" else None
            yield block, shown


class Shell:
    """One bash that is typed into; what it starts in the background ends with it."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.transcript: list[tuple[str, str, float]] = []
        self._output = folder.with_name(f"{folder.name}.out")
        self._log = self._output.open("w+b")
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**environment, "PWD": str(folder)},
            start_new_session=True,
        )

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        kill_group(self._process)
        self._log.close()

    def type(self, text: str, *, patience: float = 1800) -> tuple[int, str]:
        """Type a block; the exit code of its last command, and all that it printed."""
        mark, begun = secrets.token_hex(8), time.monotonic()
        start = self._output.stat().st_size
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text.rstrip()}\necho {mark} $?\n".encode())
        self._process.stdin.flush()
        while True:
            printed = self._output.read_bytes()[start:].decode(errors="replace")
            found = re.search(rf"^(.*?){mark} (\d+)$", printed, re.DOTALL | re.MULTILINE)
            if found:
                self.transcript.append((text, found.group(1), time.monotonic() - begun))
                return int(found.group(2)), found.group(1)
            if time.monotonic() - begun > patience or self._process.poll() is not None:
                os.killpg(self._process.pid, signal.SIGKILL)
                raise AssertionError(f"no end of\n{text}\n{printed[-5000:]}")
            time.sleep(0.05)


def missing(shown: str, printed: str) -> str | None:
    """The first line of a ```text block that was not printed after the lines before it."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in printed.splitlines()]
    place = 0
    for wanted in filter(None, (re.sub(r"\s+", " ", w).strip() for w in shown.splitlines())):
        pattern = ".*".join(re.escape(part) for part in wanted.split("…"))
        later = (i for i in range(place, len(lines)) if re.fullmatch(pattern, lines[i]))
        here = next(later, None)
        if here is None:
            return wanted
        place = here + 1
    return None


def follow(shell: Shell, found: list[Block]) -> None:
    """Type every block of a page; each must succeed and print what the page shows."""
    for block, shown in steps(found):
        code, printed = shell.type(block.text)
        where = f"{block.heading}, block {block.number}:\n{block.text}\n{printed[-5000:]}"
        assert code == 0, f"exit code {code}\n{where}"
        if shown is not None:
            gone = missing(shown.text, printed)
            assert gone is None, f"not printed: {gone}\n{where}"
