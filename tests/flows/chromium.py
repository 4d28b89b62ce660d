"""A real Chromium, driven over its debugging pipe: no driver and no further package is needed."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.servers import kill_group
from requirements import require

PATIENCE = 90.0
"""Seconds that an answer may take on a busy machine."""
NOTABLE = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")


def program() -> str:
    """Where Chromium is; the test is skipped, or fails, where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    require("chromium", found is not None, "chromium was not found (apt-get install chromium)")
    return str(found)


@dataclass
class Browser:
    """One page of a running browser. `console` holds everything that it complained about."""

    process: "subprocess.Popen[bytes]"
    reading: int
    writing: int
    session: str = ""
    console: list[dict[str, Any]] = field(default_factory=list)
    _events: list[dict[str, Any]] = field(default_factory=list)
    _number: int = 0
    _rest: bytes = b""

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        """One command of the debugging protocol, and its result."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": values}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == number:
                assert "error" not in told, (method, told["error"])
                result: dict[str, Any] = told["result"]
                return result
            self._heard(told)

    def open(self, url: str) -> float:
        """Load a page; the seconds until its load event."""
        self._events.clear()
        start = time.perf_counter()
        told = self.ask("Page.navigate", url=url)
        assert not told.get("errorText"), told
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._heard(self._next())
        return time.perf_counter() - start

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        told = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def look(self, *, width: int, height: int = 800, dark: bool = False) -> None:
        """Set the window's size in CSS pixels, and what its user prefers."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=9
            )

    def picture(self, path: Path) -> bytes:
        """Save what is in the window."""
        data = base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return data

    def _heard(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        if event.get("method") in NOTABLE:
            self.console.append(event["params"])

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.reading], [], [], max(left, 0))
            assert ready, "Chromium does not answer"
            data = os.read(self.reading, 1 << 20)
            assert data, "Chromium has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told


_CONNECTED = """
import os, sys
reading, writing = os.dup(int(sys.argv[1])), os.dup(int(sys.argv[2]))
while min(reading, writing) <= 4:
    reading, writing = os.dup(reading), os.dup(writing)
os.dup2(reading, 3)
os.dup2(writing, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium without a window, with a profile in `folder`."""
    to_read, to_write = os.pipe(), os.pipe()
    options = ["--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu"]
    options += ["--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            # The browser reads from descriptor 3 and writes to 4. A shell would not do: dash knows
            # descriptors of one digit only.
            [
                *(sys.executable, "-c", _CONNECTED, str(to_read[0]), str(to_write[1]), program()),
                *(*options, f"--user-data-dir={folder / 'profile'}", "about:blank"),
            ],
            pass_fds=(to_read[0], to_write[1]),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    os.close(to_read[0])
    os.close(to_write[1])
    try:
        made = Browser(process, to_write[0], to_read[1])
        target = made.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = made.ask("Target.attachToTarget", targetId=target, flatten=True)
        made.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            made.ask(f"{domain}.enable")
        yield made
    finally:
        kill_group(process)
        os.close(to_write[0])
        os.close(to_read[1])
