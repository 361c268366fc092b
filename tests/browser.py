"""A real browser for tests: headless Chromium, driven through chromedriver by the W3C WebDriver protocol.

The protocol is JSON over HTTP on this machine, a handful of requests of which are needed here; so no package is.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

NEEDED: Final = ("chromium", "chromedriver")  # the Debian packages chromium and chromium-driver
_ARGUMENTS: Final = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
_SECONDS: Final = 120  # for one answer, on a busy machine


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in NEEDED if shutil.which(name) is None]


@dataclass(frozen=True)
class Browser:
    """One open window."""

    port: int
    session: str

    def open(self, page: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Show a page at this size in pixels; below 500 wide as a phone does. Returns when it has been drawn."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._devtools("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._devtools("Emulation.setDeviceMetricsOverride", size)
        self._post("url", {"url": page.resolve().as_uri()})
        script = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        self._post("execute/async", {"script": script, "args": []})

    def run(self, script: str, *arguments: object) -> Any:
        """What a JavaScript function body returns, given ``arguments``."""
        return self._post("execute/sync", {"script": script, "args": arguments})

    def click(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).click()", selector)

    def messages(self) -> list[dict[str, Any]]:
        """What the console has said since it was last asked, blocked and failed requests included."""
        return self._post("se/log", {"type": "browser"})

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._post("goog/cdp/execute", {"cmd": command, "params": parameters})

    def _post(self, what: str, body: dict[str, Any]) -> Any:
        return request(self.port, "POST", f"/session/{self.session}/{what}", body)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser, and end it afterwards."""
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        try:
            said = (re.search(r"started successfully on port (\d+)", line) for line in driver.stdout)
            port = int(next(found[1] for found in said if found))
            options = {
                "goog:chromeOptions": {"args": _ARGUMENTS},
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            session = request(port, "POST", "/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]
            try:
                yield Browser(port, session)
            finally:
                request(port, "DELETE", f"/session/{session}")
        finally:
            driver.terminate()


def request(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """One request to chromedriver; fails with its message where it reports an error."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)) as connection:
        connection.request(method, path, json.dumps(body or {}), {"Content-Type": "application/json"})
        value = json.loads(connection.getresponse().read())["value"]
    if isinstance(value, dict) and "error" in value:
        raise AssertionError(f"{value['error']}: {value['message']}")
    return value
