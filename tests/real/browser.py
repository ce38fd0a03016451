"""A headless Chromium, spoken to through the DevTools protocol, for the tests of HTML pages."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

START = 60  # seconds for a browser to start on a busy machine


class Browser:
    """One page in one browser; a context manager.

    ``complaints`` collects what the console, uncaught exceptions and the page's own policy said, ``fetched`` every
    address that was asked for.
    """

    def __init__(self, folder: Path) -> None:
        program = shutil.which("chromium")
        assert program is not None
        self._log = (folder / "chromium.log").open("w+")
        words = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        words += ["--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=self._log)
        self.complaints: list[str] = []
        self.fetched: list[str] = []
        self._number = 0
        self._socket: Any = None

    def __enter__(self) -> Browser:
        from urllib.request import urlopen

        import websocket

        try:
            port = self._port()
            deadline = time.monotonic() + START
            while True:
                with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=START) as answer:
                    pages = [p for p in json.load(answer) if p["type"] == "page"]
                if pages:
                    break
                assert time.monotonic() < deadline
                time.sleep(0.1)
            address = pages[0]["webSocketDebuggerUrl"]
            self._socket = websocket.create_connection(address, timeout=START, suppress_origin=True)
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _port(self) -> int:
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self._process.poll() is None:
            self._log.seek(0)
            found = re.search(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/", self._log.read())
            if found:
                return int(found[1])
            time.sleep(0.1)
        raise AssertionError("the browser did not start")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, values = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(values["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(values["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(str(values["entry"]))
        elif method == "Network.requestWillBeSent":
            self.fetched.append(values["request"]["url"])

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """The window's size, and the system's theme."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path) -> None:
        """Open a page of ours and wait until its script has set it up."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=page.as_uri())
        deadline = time.monotonic() + START
        while self.run("document.documentElement?.dataset.ready") != "yes":
            assert time.monotonic() < deadline, self.complaints
            time.sleep(0.1)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def press(self, key: str, times: int = 1) -> None:
        codes = {"ArrowDown": 40, "ArrowUp": 38, "ArrowRight": 39, "ArrowLeft": 37, "Enter": 13, "End": 35, "Tab": 9}
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key])

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> bytes:
        """The whole page as PNG."""
        data = base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        path.write_bytes(data)
        return data
