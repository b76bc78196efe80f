"""A real browser for tests: headless Chromium by the DevTools protocol over a pipe, without further libraries.

`python tests/browser.py PAGE.html WIDTH OUT.png [dark]` takes a screenshot of the whole page.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars")
PATIENCE = 60.0  # seconds


def executable() -> str | None:
    """The browser, if there is one: $ONNXPRUNE_CHROMIUM, or one on the path."""
    return os.environ.get("ONNXPRUNE_CHROMIUM") or next((p for n in NAMES if (p := shutil.which(n))), None)


@dataclass
class Visit:
    """What a browser saw on a page. errors: of the console and the protocol's log. requests: addresses that it asked for."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    found: Any = None
    picture: bytes = b""


class Browser:
    """One browser process. All calls wait for their answer."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self.events.append(answer)

    def wait(self, method: str) -> None:
        """Until an event has come."""
        while not any(e.get("method") == method for e in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            part = os.read(self._back, 1 << 16)
            if not part or time.monotonic() > end:
                raise RuntimeError("the browser went away")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def visit(self, page: Path, width: int, *, dark: bool = False, script: str = "", picture: bool = False) -> Visit:
        """Opens a page in a window of this width. script: an expression whose value comes back as `found`."""
        self.events.clear()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", session, features=scheme)
        phone = width < 600
        metrics: dict[str, Any] = {"width": width, "height": 844, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", session, **metrics)
        self.events.clear()
        self.call("Page.navigate", session, url=page.resolve().as_uri())
        self.wait("Page.loadEventFired")
        visit = Visit()
        if script:
            visit.found = self.call("Runtime.evaluate", session, expression=script, returnByValue=True)["result"].get("value")
        if picture:
            made = self.call("Page.captureScreenshot", session, captureBeyondViewport=True, **_clip(self, session, width))
            visit.picture = base64.b64decode(made["data"])
        self.call("Target.closeTarget", targetId=target)
        for event in self.events:
            name, told = event.get("method"), event.get("params", {})
            if name == "Network.requestWillBeSent":
                visit.requests.append(told["request"]["url"])
            elif name in ("Log.entryAdded", "Runtime.exceptionThrown") or (
                name == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert")
            ):
                visit.errors.append(json.dumps(told))
        return visit


def _clip(browser: Browser, session: str, width: int) -> dict[str, Any]:
    size = browser.call("Page.getLayoutMetrics", session)["cssContentSize"]
    return {"clip": {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}}


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a fresh profile, ended with the block."""
    program = executable()
    assert program is not None
    there, to = os.pipe()  # what the browser reads as descriptor 3
    back, here = os.pipe()  # what it writes as descriptor 4
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = " ".join(f"'{f}'" for f in (*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"))
        shell = f"exec 3<&{there} 4>&{here}; exec '{program}' {flags} about:blank"
        process = subprocess.Popen(
            ["/bin/bash", "-c", shell], pass_fds=(there, here), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(there)
        os.close(here)
        try:
            yield Browser(process, to, back)
        finally:
            os.close(to)
            os.close(back)
            process.terminate()
            process.wait(timeout=PATIENCE)


if __name__ == "__main__":
    with browser() as opened:
        seen = opened.visit(Path(sys.argv[1]), int(sys.argv[2]), dark="dark" in sys.argv[4:], picture=True)
    Path(sys.argv[3]).write_bytes(seen.picture)
    print(seen.errors, seen.requests)
