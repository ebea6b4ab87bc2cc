"""Chromium without a window, spoken to over two pipes: https://chromedevtools.github.io/devtools-protocol/."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["CHROMIUM", "Tab", "browsing"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--no-proxy-server",
    "--remote-debugging-pipe",
)


class Tab:
    """One tab; keeps what the page complained of and which addresses it asked for."""

    def __init__(self, commands: int, events: int) -> None:
        self._commands, self._events = commands, os.fdopen(events, "rb")
        self._number, self._session, self._loaded = 0, "", False
        self.complaints: list[str] = []
        self.asked: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, url: str, *, width: int = 1280, dark: bool = False) -> None:
        """Go to a page."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self("Page.navigate", url=url)
        while not self._loaded:
            self._read()

    def run(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        result = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait, within the page, until an expression is true; for 30 seconds at most."""
        self.run(
            "new Promise((done, fail) => { const end = performance.now() + 30000; const look = () => "
            f"({condition}) ? done(true) : performance.now() > end ? fail(document.body.innerText) : "
            "setTimeout(look, 20); look(); })"
        )

    def choose(self, selector: str, files: list[Path]) -> None:
        """Put files into a file input."""
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key."""
        described = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self("Input.dispatchKeyEvent", type="keyDown", text=text, **described)
        self("Input.dispatchKeyEvent", type="keyUp", **described)

    def picture(self, path: Path) -> None:
        """A PNG of the whole page."""
        shot = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _read(self) -> dict[str, Any]:
        said = bytearray()
        while (byte := self._events.read(1)) not in (b"\0", b""):
            said += byte
        assert said, "the browser has gone"
        message: dict[str, Any] = json.loads(said)
        parameters = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.asked.append(parameters["request"]["url"])
        elif message.get("method") == "Page.loadEventFired":
            self._loaded = True
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(parameters["entry"]["text"])
        return message


@contextmanager
def browsing(home: Path) -> Iterator[Tab]:
    """A browser with one tab, which keeps its files in `home`."""
    assert CHROMIUM is not None
    (theirs, ours), (events, their_events) = os.pipe(), os.pipe()
    # It expects commands at 3 and writes to 4; moved out of the way first, for they may be these already.
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs, their_events))

    def place() -> None:
        os.dup2(read, 3)
        os.dup2(write, 4)

    command = [CHROMIUM, *FLAGS, f"--user-data-dir={home}", "about:blank"]
    with (home / "browser.log").open("w") as log:
        process = subprocess.Popen(
            command, preexec_fn=place, pass_fds=(3, 4), stdout=log, stderr=log, env={**os.environ, "HOME": str(home)}
        )
    for end in (theirs, their_events, read, write):
        os.close(end)
    try:
        yield Tab(ours, events)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
