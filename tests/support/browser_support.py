"""A browser without a window, driven over its DevTools protocol.

The protocol runs over a WebSocket, and the package for that comes with uvicorn; so a Chromium
that the system has is all that is needed.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_S = 300.0


def find_browser() -> str | None:
    """The browser named by TEGULA_BROWSER, or one that is installed."""
    named = os.environ.get("TEGULA_BROWSER")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Browser:
    """One tab; ``said`` is what its pages complained of, ``requested`` each address they loaded."""

    socket: ClientConnection
    session: str = ""
    said: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv(timeout=PATIENCE_S))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self._hear(answer)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        wanted = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=script, **wanted)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            try:
                value = self.run(
                    f"(() => {{ try {{ return {script} }} catch {{ return null }} }})()"
                )
            except AssertionError as error:
                if "navigated or closed" not in str(error):
                    raise
                value = None  # the page went to another one meanwhile
            if value:
                return value
            time.sleep(0.05)
        shown = self.run("document.body && document.body.innerText")
        raise AssertionError(f"{script} never came true; the page says: {shown}; {self.said}")

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **_KEYS[key])

    def names(self) -> dict[str, list[str]]:
        """What a screen reader calls the things that can be used, by their kind."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        named: dict[str, list[str]] = {}
        for node in nodes:
            kind = node.get("role", {}).get("value")
            if kind in _USED and not node.get("ignored"):
                named.setdefault(kind, []).append(node.get("name", {}).get("value", ""))
        return named

    def look(self, path: Path, width: int = 1100, *, dark: bool = False) -> None:
        """Write a picture of the whole page."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.resize(width)
        time.sleep(0.2)
        options = {"format": "png", "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))

    def resize(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", mobile=width < 600, **size)

    def _hear(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.said.append(params["exceptionDetails"]["exception"].get("description", "?"))
        if event.get("method") == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.said.append(params["entry"]["text"])


_USED = {
    "button", "checkbox", "combobox", "link", "radio", "slider", "textbox", "image", "progressbar",
}  # fmt: skip
_KEYS = {
    "Tab": {"windowsVirtualKeyCode": 9},
    "ArrowRight": {"windowsVirtualKeyCode": 39},
    "Home": {"windowsVirtualKeyCode": 36},
    " ": {"windowsVirtualKeyCode": 32, "text": " "},
}


@contextmanager
def opened_browser(program: str, profile: Path) -> Iterator[Browser]:
    """Start the browser with a fresh profile, until the block is left."""
    words = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--hide-scrollbars", "--remote-debugging-port=0", f"--user-data-dir={profile}",
        "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(
        [program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = _address(profile, process)
        # A browser that is kept from running answers no ping in time, and goes on all the same.
        patience = {"open_timeout": PATIENCE_S, "ping_interval": None}
        with connect(address, max_size=None, **patience) as socket:
            browser = Browser(socket)
            target = browser.call("Target.createTarget", url="about:blank")["targetId"]
            found = browser.call("Target.attachToTarget", targetId=target, flatten=True)
            browser.session = found["sessionId"]
            for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
                browser.call(f"{domain}.enable")
            yield browser
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """Where it listens, which it writes into its profile."""
    port_file = profile / "DevToolsActivePort"
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        assert process.poll() is None, "the browser ended at once"
        lines = port_file.read_text().splitlines() if port_file.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.05)
    raise AssertionError("the browser does not listen")
