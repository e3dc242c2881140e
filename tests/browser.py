"""A headless Chromium of this machine, driven by the DevTools protocol: what a test of a page needs, and no more.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 60.0  # that a page may take for what it is asked, on a machine that is busy
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0")


class Page:
    """One page. ``problems`` are errors of its scripts; ``asked`` every address that it has asked for."""

    def __init__(self, connection: Any) -> None:
        self.connection, self.numbers = connection, itertools.count(1)
        self.problems: list[str] = []
        self.asked: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self.connection.recv(SECONDS))
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]
            self._heard(said)

    def _heard(self, said: dict[str, Any]) -> None:
        told = said.get("params", {})
        if said["method"] == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])
        if said["method"] == "Runtime.exceptionThrown" or told.get("entry", {}).get("level") == "error":
            self.problems.append(json.dumps(told)[:500])

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression."""
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Until a JavaScript expression is true; what it is."""
        end = time.monotonic() + SECONDS
        while not (found := self.value(expression)):
            assert time.monotonic() < end, f"never true: {expression}\n{self.value('document.body.innerText')}"
            time.sleep(0.1)
        return found

    def click(self, selector: str) -> None:
        """Where it is, as a hand does."""
        self.wait(f"document.querySelector({selector!r}) !== null")
        box = self.value(
            f"(e => (e.scrollIntoView({{block: 'center'}}), (b => [b.x + b.width / 2, b.y + b.height / 2])"
            f"(e.getBoundingClientRect())))(document.querySelector({selector!r}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def write(self, selector: str, text: str) -> None:
        """In the place of what an input holds."""
        self.wait(f"document.querySelector({selector!r}) !== null")
        self.value(f"document.querySelector({selector!r}).select()")
        self.send("Input.insertText", text=text)

    def give(self, selector: str, path: Path) -> None:
        """A file to an input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        found = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=found)

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        said = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(said["data"]))


@contextmanager
def page(address: str, folder: Path) -> Iterator[Page]:
    """An address in a new browser, whose profile is in ``folder``; no host but this machine can be found from it."""
    from websockets.sync.client import connect

    rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    command = [str(CHROMIUM), *FLAGS, rules, f"--user-data-dir={folder}", "--window-size=1400,1000", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = _port(folder / "DevToolsActivePort")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=SECONDS) as listed:
            targets = json.load(listed)
        socket = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
        with connect(socket, max_size=None) as connection:
            opened = Page(connection)
            opened.send("Page.navigate", url=address)
            yield opened
    finally:
        browser.terminate()
        browser.wait(30)


def _port(file: Path) -> int:
    end = time.monotonic() + SECONDS
    while not (file.is_file() and file.read_text().strip()):
        assert time.monotonic() < end, "Chromium does not start"
        time.sleep(0.1)
    return int(file.read_text().splitlines()[0])
