"""Dockerfiles carried out without an engine: their own steps, in a folder that stands for `/`.

Every stage uses one root, one after the other, so that what knows its own path (a virtual
environment) stays where it was made; `COPY --from` brings it back, and all else is gone. Paths of
the image are translated wherever they stand. Nothing else is: RUN lines, variables, user, entry
point, command and health check are the Dockerfile's own words.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import dockerfiles as d
from requirements import require

TREES = (
    "opt/build",
    "opt/kdguard",
    "src",
    "srv",
    "usr/local/bin",
    "var/lib/kdguard",
    "etc/kdguard",
)
TREES += ("run/secrets", "work", "tmp")
_ANCHOR = r"(?<![\w./-])/(?=({})\b)".format("|".join(TREES))
_INHERITED = ("PIP_", "SSL_", "REQUESTS_", "http_proxy", "https_proxy", "no_proxy", "LANG")


@dataclass
class Native:
    """An image whose steps were carried out below `root`."""

    root: Path
    target: str
    environment: dict[str, str] = field(default_factory=dict)
    instructions: list[d.Instruction] = field(default_factory=list)

    def here(self, text: str) -> str:
        """The text with the image's absolute paths below the root; `file:///` URIs, too."""
        text = text.replace("file:///", f"file://{self.root}/")
        return re.sub(_ANCHOR, f"{self.root}/", text)

    def words(self, keyword: str) -> list[str]:
        """The words of the last ENTRYPOINT, CMD or HEALTHCHECK, translated."""
        found = d.last(self.instructions, keyword)
        assert found is not None
        text = found.text[found.text.index("[") :]
        return [self.here(word) for word in d.Instruction(keyword, text).words]

    def prefix(self) -> list[str]:
        """What turns root into the image's user, who owns nothing but the volumes."""
        user = d.last(self.instructions, "USER")
        assert user is not None
        uid, _, gid = user.text.partition(":")
        return ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]


def build(path: Path, target: str, root: Path) -> Native:
    """Carry out every step that makes the target stage, below the empty folder `root`."""
    require("docker", os.geteuid() == 0, "only root can give files to the image's user")
    require("docker", shutil.which("setpriv") is not None, "setpriv was not found")
    root.chmod(0o755)
    image = Native(root, target)
    kept: dict[str, Path] = {}
    stages = d.stages(path)
    for name in _needed(stages, target):
        stage = stages[name]
        image.instructions = d.lineage(path, name)
        image.environment = _interpreter(root)
        for folder in ("tmp", "usr/local/bin", "src", "opt"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "tmp").chmod(0o1777)
        for instruction in stage.own:
            _STEPS.get(instruction.keyword, _declared)(image, instruction, kept)
        if name != target:
            kept[name] = root.with_name(f"{root.name}-{name}")
            kept[name].mkdir()
            for entry in root.iterdir():
                entry.rename(kept[name] / entry.name)
    return image


def _needed(stages: dict[str, d.Stage], target: str) -> list[str]:
    """The target, after every stage that it copies from; inheritance is not carried out."""
    stage = stages[target]
    assert stage.base not in stages, "a stage of its own is simplest to carry out"
    sources = [i.options["from"] for i in stage.own if "from" in i.options]
    return [name for source in sources for name in _needed(stages, source)] + [target]


def _interpreter(root: Path) -> dict[str, str]:
    """The variables that the base image would set, with its `python` on the path."""
    place = root.with_name(f"{root.name}-base")
    if not place.exists():
        (place / "bin").mkdir(parents=True)
        python = Path(sys.executable).resolve()
        if not _reachable(python):
            python = _copied(place)
        (place / "bin" / "python").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
        (place / "bin" / "python").chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if k.startswith(_INHERITED)}
    if list(place.glob("lib/libpython*")):
        inherited["LD_LIBRARY_PATH"] = f"{place}/lib"
    return inherited | {"PATH": f"{root}/usr/local/bin:{place}/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


def _reachable(python: Path) -> bool:
    """Whether somebody without rights can run it; setpriv's own step still has them."""
    somebody = ["setpriv", "--reuid=10001", "--regid=10001", "--clear-groups"]
    tried = [*somebody, "sh", "-c", f"exec {python} -c ''"]
    return subprocess.run(tried, capture_output=True, check=False, cwd="/").returncode == 0


def _copied(place: Path) -> Path:
    """The interpreter and its library, out of a folder that only root may enter."""
    prefix, name = Path(sys.base_prefix), f"python{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copy(prefix / "bin" / name, place / "bin" / name)
    left_out = shutil.ignore_patterns("test", "site-packages", "__pycache__", "idlelib", "config-*")
    shutil.copytree(prefix / "lib" / name, place / "lib" / name, ignore=left_out)
    (place / "lib" / name / "site-packages").mkdir()
    for shared in (prefix / "lib").glob("libpython*.so*"):
        shutil.copy(shared, place / "lib", follow_symlinks=False)
    return place / "bin" / name


def _declared(_image: Native, instruction: d.Instruction, _kept: dict[str, Path]) -> None:
    assert instruction.keyword in ("USER", "WORKDIR", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD")


def _env(image: Native, instruction: d.Instruction, _kept: dict[str, Path]) -> None:
    for key, value in d.values([instruction], "ENV").items():
        given = dict(image.environment)
        image.environment[key] = re.sub(
            r"\$(\w+)", lambda m, g=given: g[m.group(1)], image.here(value)
        )


def _copy(image: Native, instruction: d.Instruction, kept: dict[str, Path]) -> None:
    *sources, target = instruction.arguments
    place = Path(image.here(target))
    if "from" in instruction.options:
        assert sources == [target], "what knows its own path stays there"
        place.parent.mkdir(parents=True, exist_ok=True)
        (kept[instruction.options["from"]] / target.lstrip("/")).rename(place)
        return
    for source in sources:
        found = d.ROOT / source
        if found.is_dir():
            shutil.copytree(found, place, ignore=shutil.ignore_patterns("__pycache__"))
            continue
        one = place / found.name if target.endswith("/") else place
        one.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(found, one)
        if "chmod" in instruction.options:
            one.chmod(int(instruction.options["chmod"], 8))


def _run(image: Native, instruction: d.Instruction, _kept: dict[str, Path]) -> None:
    done = subprocess.run(
        ["sh", "-euc", image.here(instruction.text)],
        env=image.environment | {"HOME": str(image.root / "tmp")},
        cwd=image.root,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    reached = "No matching distribution" not in done.stderr and "Retry" not in done.stderr
    require("registry", done.returncode == 0 or reached, f"pip found no index: {done.stderr}")
    assert done.returncode == 0, f"{instruction.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


_STEPS: dict[str, Callable[[Native, d.Instruction, dict[str, Path]], None]] = {
    "ENV": _env,
    "COPY": _copy,
    "RUN": _run,
}


def writable(root: Path, prefix: Sequence[str]) -> list[str]:
    """Folders below `root` that the image's user may write to."""
    find = [*prefix, "find", str(root), "-type", "d", "-writable", "-prune"]
    done = subprocess.run(find, capture_output=True, text=True, check=False)
    return sorted(str(Path(line).relative_to(root)) for line in done.stdout.splitlines())
