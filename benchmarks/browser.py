"""A headless browser for tests: the installed Chromium or Chrome, controlled over its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "ARPO_TEST_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

VIEW_IS_READY = "document.body && document.body.dataset.ready === 'true'"
"""Whether the page of `arpo-trl view` has run its script."""
IS_COMPLETE = "location.href !== 'about:blank' && document.readyState === 'complete'"
"""Whether any page is complete."""


def find_browser() -> str | None:
    """The browser that `ARPO_TEST_BROWSER` names, or the first of `NAMES` on the path."""
    return os.environ.get(VARIABLE) or next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page of the browser. `errors` has the messages of its exceptions and of what its policy blocked."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = os.fdopen(commands, "wb"), os.fdopen(answers, "rb")
        self._sent, self._rest = 0, b""
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._answers.fileno(), 1 << 16)
            assert chunk, "the browser has ended"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        event = json.loads(message)
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(event["params"]["exceptionDetails"])[:500])
            case "Log.entryAdded":
                entry = event["params"]["entry"]
                self.errors.append(f"{entry['text']} {entry.get('url', '')}")
            case "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
        return event

    def open(
        self, url: str, width: int = 1280, height: int = 900, *, dark: bool = False, ready: str = VIEW_IS_READY
    ) -> None:
        """Opens the page and waits until `ready` is true. `errors` and `requests` are those of this page."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url="about:blank")
        self.errors.clear()
        self.requests.clear()
        self.send("Page.navigate", url=url)
        self.until(ready)

    def run(self, code: str) -> Any:
        """The value of the JavaScript expression `code`; of a promise, its result."""
        result = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, condition: str) -> None:
        """Waits until the expression is true; the test's own timeout ends the wait."""
        while not self.run(condition):
            time.sleep(0.02)  # not in the page, whose promises end with it when it navigates

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browsing(browser: str, profile: Path) -> Iterator[Tab]:
    """A tab of a new browser with an empty profile in `profile`."""
    command_in, command_out = os.pipe()
    answer_in, answer_out = os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]

    def wire() -> None:  # the browser reads commands from descriptor 3 and answers on 4
        reads, writes = os.dup(command_in), os.dup(answer_out)
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    process = subprocess.Popen(
        [browser, *flags, f"--user-data-dir={profile}"],
        preexec_fn=wire,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_in)
    os.close(answer_out)
    try:
        yield Tab(command_out, answer_in)
    finally:
        process.terminate()
        process.wait()
