"""Chromium without a window, driven by its DevTools protocol over a pipe."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from patience import PATIENCE_S

NAMES = ("chromium", "google-chrome", "chromium-browser")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
_FLAGS = (
    *("--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# The browser reads descriptor 3 and writes descriptor 4.
_WITH_PIPES = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for fd, pipe in enumerate(pipes, 3):
    os.dup2(pipe, fd)
os.execv(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}


class Browser:
    """A browser with an empty profile in a folder."""

    def __init__(self, folder: Path) -> None:
        assert PROGRAM is not None
        command_end, self._commands = os.pipe()
        self._events, event_end = os.pipe()
        ends = [str(command_end), str(event_end)]
        flags = [*_FLAGS, f"--user-data-dir={folder}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # which is not there for root
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WITH_PIPES, *ends, PROGRAM, *flags],
            pass_fds=(command_end, event_end),
            stderr=subprocess.DEVNULL,
        )
        os.close(command_end)
        os.close(event_end)
        self._rest, self._count = b"", 0
        self.seen: list[dict[str, Any]] = []  # events

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Send a command, and return its result."""
        self._count += 1
        command = {"id": self._count, "method": method, "params": params}
        if session is not None:
            command["sessionId"] = session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while (message := self._read()).get("id") != self._count:
            self.seen.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._events, 1 << 20)
            if not data:
                raise ConnectionError("the browser ended")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def close(self) -> None:
        self.call("Browser.close")
        os.close(self._commands)
        os.close(self._events)
        self._process.wait()


class Profile:
    """The pages that share a storage."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.id = browser.call("Target.createBrowserContext")["browserContextId"]

    def open(self, url: str, prepare: str = "", *, script: bool = True) -> "Page":
        """Open a page. `prepare` runs in it before its own scripts."""
        page = Page(self, prepare, script)
        page.go(url)
        return page

    def close(self) -> None:
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.id)


class Page:
    """A tab of 1,000 by 700 pixels."""

    def __init__(self, profile: Profile, prepare: str, script: bool) -> None:
        self.browser = profile.browser
        target = self.browser.call(
            "Target.createTarget", url="about:blank", browserContextId=profile.id
        )["targetId"]
        attached = self.browser.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Network.enable")
        self.call("Runtime.enable")
        self.call("Log.enable")
        size = {"width": 1000, "height": 700, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Page.addScriptToEvaluateOnNewDocument", source=prepare)

    def call(self, method: str, **params: Any) -> Any:
        return self.browser.call(method, self.session, **params)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self._loaded()

    def reload(self) -> None:
        self.run("window.isOld = true")
        self.call("Page.reload")
        self.wait("!window.isOld")
        self._loaded()

    def _loaded(self) -> None:
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Return the value of an expression, or the promised one."""
        result = self.call(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Return the value of an expression as soon as it is true."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := self._value(condition)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{condition}: {self.run('document.body.innerText')}")
        return value

    def _value(self, condition: str) -> Any:
        time.sleep(0.02)
        try:
            return self.run(f"((value) => (value instanceof Node ? true : value))({condition})")
        except RuntimeError:  # the page was left meanwhile, or has no such element yet
            return None

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        every = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.run(f"{every}.map((node) => node.textContent)")

    def click(self, selector: str) -> None:
        """Click on the last visible element."""
        every = f"[...document.querySelectorAll({json.dumps(selector)})]"
        self.run(f"{every}.filter((node) => node.checkVisibility()).at(-1).click()")

    def press(self, key: str) -> None:
        common = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        down = {"type": "keyDown", "text": "\r"} if key == "Enter" else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **down, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def events(self, method: str) -> list[Any]:
        self.run("0")
        mine = [e for e in self.browser.seen if e.get("sessionId") == self.session]
        return [event["params"] for event in mine if event["method"] == method]

    def faults(self) -> list[Any]:
        """Return the exceptions and the breaches of the page's policy."""
        thrown = [event["exceptionDetails"] for event in self.events("Runtime.exceptionThrown")]
        logged = [event["entry"] for event in self.events("Log.entryAdded")]
        return thrown + [entry for entry in logged if entry["source"] == "security"]
