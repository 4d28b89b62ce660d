"""Hear from MLflow that a certificate or an alias was set, and run `kdguard gate` on the version.

    KDGUARD_WEBHOOK_SECRET=… python receiver.py --port 8000 --key builder.pem.pub --pin mnist5k#test

A webhook comes after the write and undoes nothing: this tells people, it does not guard. The
guard is the registry's own store (`kdguard+…`). A message counts only if it is signed with the
secret, fresh, and heard for the first time; everything else is answered 401 and forgotten.
"""

import argparse
import base64
import binascii
import hashlib
import hmac
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

log = logging.getLogger("kdguard.webhook")

WINDOW = 300.0
"""Seconds by which a message may be late or early; it is remembered for as long."""
LARGEST = 1 << 20
CERTIFICATE = "kdguard.certificate"
WAITING = 100
"""Versions that may wait for their decision; more are answered 503, and MLflow tries again."""


class Refused(Exception):  # noqa: N818  (an answer, not a failure)
    """A message that does not count, and why."""


@dataclass
class Verifier:
    """Checks `v1,base64(HMAC-SHA256(secret, id.timestamp.body))`, the clock, and repetition."""

    secret: bytes
    seen: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, identity: str, timestamp: str, signature: str, body: bytes) -> None:
        """Raise Refused unless the message is signed, fresh and new."""
        version, _, encoded = signature.partition(",")
        try:
            given = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refused("the signature is not base64") from error
        signed = f"{identity}.{timestamp}.".encode() + body
        expected = hmac.new(self.secret, signed, hashlib.sha256).digest()
        if version != "v1" or not hmac.compare_digest(given, expected):
            raise Refused("the signature is wrong")
        self._check_fresh(identity, timestamp)

    def forget(self, identity: str) -> None:
        """Let a message be heard once more: it could not be taken."""
        with self.lock:
            self.seen.pop(identity, None)

    def _check_fresh(self, identity: str, timestamp: str) -> None:
        now = time.time()
        if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 12):
            raise Refused("the timestamp is no number")
        if abs(now - int(timestamp)) > WINDOW:
            raise Refused("the message is too old, or of the future")
        with self.lock:
            for old in [key for key, until in self.seen.items() if until < now]:
                del self.seen[old]
            if not identity or identity in self.seen:
                raise Refused("the message was heard before")
            self.seen[identity] = now + 2 * WINDOW


def concerns(message: dict[str, Any]) -> str | None:
    """`models:/name/version` where the message is about a certificate or an alias, else None."""
    what, data = (message.get("entity"), message.get("action")), message.get("data")
    if not isinstance(data, dict):
        return None
    certified = what == ("model_version_tag", "set") and data.get("key") == CERTIFICATE
    if not certified and what != ("model_version_alias", "created"):
        return None
    name, version = data.get("name"), str(data.get("version", ""))
    if not isinstance(name, str) or not name or not (version.isascii() and version.isdecimal()):
        return None
    return f"models:/{name}/{version}"


class Receiver(ThreadingHTTPServer):
    """Answers at once; one thread decides, one version after the other."""

    daemon_threads = True

    def __init__(self, port: int, secret: bytes, command: list[str], out: Path) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.verifier = Verifier(secret)
        self.waiting: queue.Queue[str] = queue.Queue(WAITING)
        self.command, self.out = command, out
        threading.Thread(target=self._decide, daemon=True).start()

    def _decide(self) -> None:
        while True:
            uri = self.waiting.get()
            try:
                self._decide_about(uri)
            except Exception:  # one version that cannot be decided must not end the thread
                log.exception("no decision about %s", uri)

    def _decide_about(self, uri: str) -> None:
        words = [*self.command, uri, "--json"]  # words, not a shell's line
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)  # noqa: S603
        row = {"uri": uri, "exit": done.returncode, "answer": _parsed(done.stdout)}
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        level = logging.INFO if done.returncode == 0 else logging.WARNING
        log.log(level, "%s: exit %d %s", uri, done.returncode, done.stderr.strip()[-500:])


class Handler(BaseHTTPRequestHandler):
    """POST: 202 taken, 204 none of our business, 401 not believed, 413 too long, 503 busy."""

    server: Receiver
    timeout = 10

    def do_POST(self) -> None:
        """Check the message, and queue the version that it is about."""
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            return self._answer(411)
        if not 0 <= length <= LARGEST:
            return self._answer(413)
        body = self.rfile.read(length)
        names = ("X-MLflow-Delivery-Id", "X-MLflow-Timestamp", "X-MLflow-Signature")
        identity, timestamp, signature = (self.headers.get(name, "") for name in names)
        try:
            self.server.verifier.check(identity, timestamp, signature, body)
        except Refused as why:
            log.warning("not believed: %s", why)
            return self._answer(401)
        message = _parsed(body)
        uri = concerns(message) if isinstance(message, dict) else None
        if uri is None:
            return self._answer(204)
        try:
            self.server.waiting.put_nowait(uri)
        except queue.Full:
            self.server.verifier.forget(identity)  # MLflow tries again, with the same headers
            return self._answer(503)
        return self._answer(202)

    def _answer(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Our own log says what matters."""


def _parsed(text: bytes | str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", action="append", required=True, help="trusted key (.pub)")
    parser.add_argument("--pin", action="append", default=[], help="accepted evaluation data")
    parser.add_argument("--policy", help="the operator's policy")
    parser.add_argument("--out", type=Path, default=Path("decisions.jsonl"))
    given = parser.parse_args()
    secret = os.environ.get("KDGUARD_WEBHOOK_SECRET", "")
    if len(secret) < 16:
        parser.error("KDGUARD_WEBHOOK_SECRET must hold the webhook's secret, 16 characters or more")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = [str(Path(sys.executable).with_name("kdguard")), "gate"]
    for flag, values in (("--key", given.key), ("--pin", given.pin)):
        command += [word for value in values for word in (flag, value)]
    if given.policy:
        command += ["--policy", given.policy]
    with Receiver(given.port, secret.encode(), command, given.out) as server:
        log.info("listening on 127.0.0.1:%d", server.server_port)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("stopped")


if __name__ == "__main__":
    main()
