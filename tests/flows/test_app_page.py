"""The page at /kdguard in a real Chromium: 1,000 versions, hostile names, light, dark, 400 % zoom.

With KDGUARD_PICTURES naming a folder, the pictures of the documentation are written there.
"""

import os
import statistics
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.store.model_registry.dbmodels.models import (
    SqlModelVersion,
    SqlModelVersionTag,
    SqlRegisteredModel,
    SqlRegisteredModelAlias,
)
from sqlalchemy.orm import Session

from flows.chromium import Browser, browser
from flows.gates import Gate, gated
from flows.operators import toy_bundle
from mlflow_kdguard.artifacts import CERTIFICATE

HOSTILE = 'z"><img src=x onerror="window.taken=1"><b>&amp;{{7*7}}\'`'
VERSIONS = 1_000
ZOOMED = 320
"""Width in CSS pixels of a window of 1,280 at 400 % zoom (WCAG 1.4.10)."""
VIEWS = {
    "models": "/kdguard",
    "version": "/kdguard/version?workspace=default&name=student&version=1",
    "refusals": "/kdguard/log?action=refusals",
    "log": "/kdguard/log",
    "missing": "/kdguard/version?workspace=default&name=none&version=1",
}


@dataclass
class World:
    """A gated server with many versions, and a browser."""

    gate: Gate
    browser: Browser
    folder: Path

    def open(self, path: str) -> float:
        """Show a page of the server; the seconds until it was loaded."""
        return self.browser.open(self.gate.uri + path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("page")
    with gated(folder / "server", app=True) as gate, browser(folder) as shown:
        gate.promote("student", gate.certified("student"))
        _refused(gate, "student", gate.registered("student", toy_bundle())[0])
        late = datetime.now(UTC) - timedelta(days=60)
        _refused(gate, "student", gate.certified("student", now=late))
        _refused(gate, HOSTILE, gate.registered(HOSTILE, toy_bundle())[0])
        _fill(gate)
        yield World(gate, shown, folder)


def _refused(gate: Gate, name: str, version: str) -> None:
    with pytest.raises(MlflowException, match="kdguard refuses"):
        gate.promote(name, version)


def _fill(gate: Gate) -> None:
    """Versions that are guarded by name alone, as a table shows them; one has a hostile name."""
    files = toy_bundle()
    rows: list[Any] = []
    for number in range(VERSIONS):
        name = HOSTILE if number == 0 else f"model-{number:04}"
        if number:
            rows.append(SqlRegisteredModel(workspace="default", name=name))
        signed = gate.operator.sign(
            gate.operator.certificate(files, name, days=3 if number % 17 == 5 else 20 + number % 60)
        )
        place = {"workspace": "default", "name": name, "version": 1}
        if number:
            rows.append(SqlModelVersion(**place, current_stage="None", source="s3://x/y"))
        rows.append(SqlRegisteredModelAlias(**place, alias="champion"))
        rows.append(SqlModelVersionTag(**place, key=CERTIFICATE, value=signed.decode()))
    engine = sqlalchemy.create_engine(gate.database, connect_args={"timeout": 60})
    with Session(engine) as session, session.begin():
        session.add_all(rows)
    engine.dispose()


def _every_view(world: World) -> Iterator[str]:
    for name, path in VIEWS.items():
        world.open(path)
        yield name


# ── Quick ───────────────────────────────────────────────────────────────────────────────────────


def test_a_thousand_versions_are_paged_and_quick(world: World) -> None:
    """Every page holds 50 rows and costs about the same; an idle 2-core machine needs 0.2 s."""
    path, names, seconds, bare = "/kdguard", [], [], []
    while path:
        start = time.perf_counter()
        told = requests.get(world.gate.uri + path, timeout=60)
        seconds.append(time.perf_counter() - start)
        bare.append(_bare(world))
        assert told.ok
        assert len(told.content) < 100_000
        world.open(path)
        script = "[...document.querySelectorAll('table:first-of-type tbody th a')].map(a => a.text)"
        found = world.browser.evaluate(script)
        names += [name for name in found if "version" in name]
        path = world.browser.evaluate("document.querySelector('a[rel=next]')?.getAttribute('href')")
    shown = [name.removesuffix(" version 1") for name in names if name.endswith(" version 1")]
    assert {f"model-{number:04}" for number in range(1, VERSIONS)} <= set(shown)
    assert len(names) == len(set(names))
    assert len(seconds) >= VERSIONS // 50
    last, first = statistics.median(seconds[-5:]), statistics.median(seconds[:5])
    print(f"page: {statistics.median(seconds):.3f} s, slowest {max(seconds):.3f} s; /version: "
          f"{statistics.median(bare):.3f} s")  # fmt: skip
    assert last < 3 * first + 0.2
    assert statistics.median(seconds) < 1 + 20 * statistics.median(bare)


def _bare(world: World) -> float:
    """Seconds of a request that MLflow answers from memory, on this machine, now."""
    start = time.perf_counter()
    assert requests.get(f"{world.gate.uri}/version", timeout=60).ok
    return time.perf_counter() - start


# ── Safe ────────────────────────────────────────────────────────────────────────────────────────


def test_hostile_names_are_text(world: World) -> None:
    hostile = f"/kdguard/version?workspace=default&name={quote(HOSTILE)}&version=1"
    field = f"/kdguard/log?model={quote(HOSTILE)}&action={quote(HOSTILE)}"
    for path in ("/kdguard", hostile, "/kdguard/log?action=refusals", field):
        world.open(path)
        assert HOSTILE in world.browser.evaluate(
            "document.body.innerText + document.querySelector('input')?.value"
        )
        assert world.browser.evaluate("window.taken") is None
        assert world.browser.evaluate("document.querySelectorAll('img, b, script').length") == 0
    linked = world.browser.evaluate("document.querySelector('td a')?.getAttribute('href') ?? ''")
    assert linked == "" or linked.startswith("/kdguard/version?")


def test_the_browser_runs_and_loads_nothing_else(world: World) -> None:
    told = requests.get(world.gate.uri + "/kdguard", timeout=60)
    rules = dict(
        part.strip().split(" ", 1) for part in told.headers["Content-Security-Policy"].split(";")
    )
    assert rules["default-src"] == "'none'"
    assert not {"script-src", "connect-src"} & set(rules)
    assert "unsafe" not in told.headers["Content-Security-Policy"]
    assert told.headers["X-Content-Type-Options"] == "nosniff"
    world.open("/kdguard")
    injected = """
        const s = document.createElement('script'); s.textContent = 'window.taken = 1';
        document.body.append(s); window.taken ?? 'refused'
    """
    assert world.browser.evaluate(injected) == "refused"
    world.browser.console.clear()


def test_the_console_stays_empty(world: World) -> None:
    world.browser.console.clear()
    views = [name for name in _every_view(world) if name != "missing"]
    assert views
    network = {"source": "network", "level": "error"}  # a 404 is a line of its own
    told = [
        entry for entry in world.browser.console if entry.get("entry", {}).items() >= {}.items()
    ]
    errors = [e for e in told if not (e.get("entry", {}).items() >= network.items())]
    assert errors == []
    assert len(told) <= 1


# ── Readable ────────────────────────────────────────────────────────────────────────────────────

CONTRAST = """
(() => {
  const light = c => {
    const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(c) && c !== 'transparent') return c;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || e.closest('.skip')) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), e.outerHTML.slice(0, 80)]);
  }
  return found.sort((x, y) => x[0] - y[0])[0];
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast_is_enough(world: World, dark: bool) -> None:
    world.browser.look(width=1280, dark=dark)
    for name in _every_view(world):
        least, where = world.browser.evaluate(CONTRAST)
        assert least >= 4.5, (name, where)
    lightness = world.browser.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    )
    assert (lightness < 64) is dark


def test_at_400_percent_nothing_is_cut_and_nothing_scrolls_sideways(world: World) -> None:
    world.browser.look(width=ZOOMED, height=256)
    for name in _every_view(world):
        width = world.browser.evaluate("document.scrollingElement.scrollWidth")
        assert width <= ZOOMED, name
        beyond = world.browser.evaluate(
            "[...document.querySelectorAll('main *, nav *')].filter(e => "
            "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert beyond == [], name
        small = world.browser.evaluate(
            "Math.min(...[...document.querySelectorAll('main *')].filter(e => e.innerText)"
            ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
        )
        assert small >= 13, name


@pytest.mark.parametrize("width", [1280, ZOOMED])
def test_a_screen_reader_finds_its_way(world: World, width: int) -> None:
    world.browser.look(width=width)
    titles = set()
    for name in _every_view(world):
        nodes = world.browser.ask("Accessibility.getFullAXTree")["nodes"]
        roles = [node["role"]["value"] for node in nodes if not node.get("ignored")]
        assert roles.count("main") == 1, name
        assert roles.count("banner") == 1
        assert "navigation" in roles
        assert world.browser.evaluate("document.documentElement.lang") == "en"
        titles.add(world.browser.evaluate("document.title"))
        levels = world.browser.evaluate(
            "[...document.querySelectorAll('h1,h2,h3')].map(h => Number(h.tagName[1]))"
        )
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        if name in ("models", "version", "refusals", "log"):
            assert {"table", "row", "columnheader", "rowheader", "cell"} <= set(roles), name
        named = ("textbox", "combobox", "button", "link", "table")
        assert all(
            node["name"]["value"].strip()
            for node in nodes
            if not node.get("ignored") and node["role"]["value"] in named
        )
    assert len(titles) == len(VIEWS)


def test_everything_is_reached_by_keyboard_and_shows_it(world: World) -> None:
    world.browser.look(width=1280)
    world.open("/kdguard/log")
    count = world.browser.evaluate("document.querySelectorAll('a, input, select, button').length")
    seen = []
    for _ in range(count):
        world.browser.press("Tab")
        seen.append(
            world.browser.evaluate(
                "(e => [e.tagName, e.text ?? e.name, getComputedStyle(e).outlineStyle, "
                "e.getBoundingClientRect().left >= 0])(document.activeElement)"
            )
        )
    assert seen[0][1] == "Skip to the content"
    assert all(style != "none" and visible for _, _, style, visible in seen), seen
    tags = [item[0] for item in seen]
    assert {"A", "INPUT", "SELECT", "BUTTON"} == set(tags)
    assert len(tags) == count
    world.browser.press("Tab")
    assert world.browser.evaluate("document.activeElement.tagName") in ("BODY", "A")  # no trap


# ── Pictures ────────────────────────────────────────────────────────────────────────────────────


def test_pictures_in_light_and_dark(world: World) -> None:
    wanted = os.environ.get("KDGUARD_PICTURES")
    folder = Path(wanted) if wanted else world.folder
    pictures = {}
    for name, width, height in (("models", 1280, 800), ("version", 1280, 1100), ("zoom", 320, 640)):
        for dark in (False, True):
            world.browser.look(width=width, height=height, dark=dark)
            world.open(VIEWS.get(name, VIEWS["version"]))
            path = folder / f"page-{name}-{'dark' if dark else 'light'}.png"
            data = world.browser.picture(path)
            assert struct.unpack(">II", data[16:24]) == (width, height)
            pictures[name, dark] = data
    assert len(set(pictures.values())) == len(pictures)
