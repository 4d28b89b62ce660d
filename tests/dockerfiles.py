"""Dockerfiles as data: stages of instructions, with variables filled in as the builder would."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
IMAGES = [(DOCKER / "server.Dockerfile", "server")] + [
    (DOCKER / "pipeline.Dockerfile", target) for target in ("cpu", "cuda")
]
"""Every image that is built: its Dockerfile and its target stage."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; `text` is what follows the keyword, on one line."""

    keyword: str
    text: str

    @property
    def words(self) -> list[str]:
        """The JSON form, or the words of the shell form."""
        return list(json.loads(self.text)) if self.text.startswith("[") else shlex.split(self.text)

    @property
    def options(self) -> dict[str, str]:
        """Leading `--name=value` options."""
        return dict(re.findall(r"--([a-z-]+)=(\S+)", self._leading()))

    @property
    def arguments(self) -> list[str]:
        """The words after the options."""
        return shlex.split(self.text[len(self._leading()) :])

    def _leading(self) -> str:
        found = re.match(r"(--\S+\s+)*", self.text)
        return found.group(0) if found else ""


@dataclass(frozen=True)
class Stage:
    """One FROM with what follows it."""

    base: str
    name: str
    own: list[Instruction] = field(default_factory=list)


def stages(path: Path) -> dict[str, Stage]:
    """The stages of a Dockerfile by name, in order; ARGs before the first FROM are filled in."""
    given: dict[str, str] = {}
    found: dict[str, Stage] = {}
    for instruction in _instructions(path.read_text()):
        if instruction.keyword == "FROM":
            base, _, name = (_filled(word, given) for word in instruction.words)
            found[name] = Stage(base, name)
        elif not found:
            assert instruction.keyword == "ARG", instruction
            key, _, value = instruction.text.partition("=")
            given[key] = value
        else:
            list(found.values())[-1].own.append(instruction)
    return found


def lineage(path: Path, target: str) -> list[Instruction]:
    """Everything that makes the target stage, inherited instructions first."""
    every = stages(path)
    stage = every[target]
    inherited = lineage(path, stage.base) if stage.base in every else []
    return inherited + stage.own


def values(instructions: list[Instruction], keyword: str) -> dict[str, str]:
    """The variables that ENV or ARG instructions set; later ones win."""
    pairs = [pair for i in instructions if i.keyword == keyword for pair in shlex.split(i.text)]
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


def last(instructions: list[Instruction], keyword: str) -> Instruction | None:
    """The instruction of this keyword that counts."""
    return next((i for i in reversed(instructions) if i.keyword == keyword), None)


def pins(*names: str) -> dict[str, str]:
    """Package -> version, over files of docker/requirements; every line must pin one."""
    found: dict[str, str] = {}
    for name in names:
        for line in (DOCKER / "requirements" / f"{name}.txt").read_text().splitlines():
            if line and not line.startswith("#"):
                package, equal, version = line.partition("==")
                assert equal, f"{name}.txt: {line} is not pinned"
                assert re.fullmatch(r"[A-Za-z0-9._-]+", package), line
                assert re.fullmatch(r"[0-9][A-Za-z0-9.]*(\+cpu)?", version), line
                found[re.sub(r"[-_.]+", "-", package).lower()] = version
    return found


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    split = [line.strip().split(None, 1) for line in joined.splitlines() if line.strip()]
    return [Instruction(keyword, re.sub(r"\s+", " ", rest)) for keyword, rest in split]


def _filled(word: str, given: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda match: given[match.group(1)], word)
