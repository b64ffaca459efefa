"""Headless Chromium as the tests drive it: a page at a width, keys, what it computes, what it says to a screen reader.

It is spoken to by its own protocol through two pipes, so that nothing has to be installed beside it.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
_SECONDS = 30.0  # for an answer


class Page:
    """A tab of a browser."""

    def __init__(self, asks: Any, answers: Any) -> None:
        self._asks, self._answers, self._numbers = asks, answers, itertools.count(1)
        self._waiting: list[dict[str, Any]] = []
        self._received = b""
        self._session: dict[str, str] = {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.send("Page.enable")

    def send(self, method: str, **arguments: Any) -> dict[str, Any]:
        """A command of the protocol and its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": arguments, **self._session}
        self._asks.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self._waiting.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def show(self, file: Path, width: int, dark: bool = False, height: int = 900) -> None:
        """Load a page from a file, and wait until it is there."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self._waiting.clear()
        self.send("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self._waiting):
            self._waiting.append(self._read())

    def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key and let it go."""
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **pressed)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def accessible(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader finds, in order."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def _read(self) -> dict[str, Any]:
        """The next message; each ends with a zero."""
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._answers], [], [], _SECONDS)
            part = self._answers.read(65536) if ready else b""
            if not part:
                raise AssertionError("the browser has ended, or does not answer")
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with its profile in a folder; it is ended afterwards."""
    assert BROWSER is not None
    asks, answers = folder / "asks", folder / "answers"
    os.mkfifo(asks)
    os.mkfifo(answers)
    # it reads from descriptor 3 and writes to 4
    script = 'exec "$@" 3<"$0/asks" 4>"$0/answers"'
    command = ["sh", "-c", script, str(folder), BROWSER, *_ARGUMENTS, f"--user-data-dir={folder / 'profile'}"]
    # opened so that neither waits for a browser that may not come
    with (
        open(os.open(asks, os.O_RDWR), "wb", buffering=0) as to,
        open(os.open(answers, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as back,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process,
    ):
        try:
            yield Page(to, back)
        finally:
            process.kill()
