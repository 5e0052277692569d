"""A headless Chromium, spoken to over its debugging pipe: no port, no library."""

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--mute-audio"),
)
BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEADLINE = 30.0


def binary():
    """Return where a Chromium is, or None."""
    return next(filter(None, map(shutil.which, BINARIES)), None)


class Browser:
    """One page in a browser of its own; a context manager.

    Attributes:
        problems: what the page's console said that is worse than a remark, violations of its
            policy among it.
        asked: the URL of all that was asked for.
    """

    def __init__(self, width=1280, height=1600, *, dark=False):
        self.problems, self.asked = [], []
        self._size = width, height
        self._dark = dark
        self._ids = itertools.count(1)
        self._rest = b""
        self._session = None

    def __enter__(self):
        self._folder = tempfile.mkdtemp(prefix="aiosgd-chromium-")
        own, theirs = os.pipe(), os.pipe()  # Chromium reads 3 and writes 4
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{own[0]} 4>&{theirs[1]}', "_", binary(), *FLAGS,
             f"--user-data-dir={self._folder}", "about:blank"],
            pass_fds=(own[0], theirs[1]), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(own[0])
        os.close(theirs[1])
        self._out, self._in = own[1], theirs[0]
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        width, height = self._size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        self.prefer("dark" if self._dark else "light")
        return self

    def __exit__(self, *_):
        os.close(self._out)
        os.close(self._in)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, method, **params):
        """Call a method of the debugging protocol and return its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + DEADLINE
        while True:
            answer = self._next(deadline)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self, deadline):
        while b"\0" not in self._rest:
            ready = select.select([self._in], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, "the browser is silent"
            self._rest += os.read(self._in, 1 << 20)
        raw, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(raw)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method, params):
        if method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(json.dumps(params["args"])[:500])

    def prefer(self, scheme):
        """Have the reader prefer `light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def open(self, url):
        """Go to a page, and wait until it is there."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def read(self, expression):
        """Return the value of an expression of the page's script."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression, seconds=DEADLINE):
        """Wait until an expression of the page's script holds, and return its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.read(expression)):
            shown = "document.body.innerText.slice(0, 2000)"
            assert time.monotonic() < deadline, f"{expression}: {self.read(shown)}"
            time.sleep(0.05)
        return value

    def shoot(self, path, *, whole=True):
        """Write a picture of the page."""
        options = {"captureBeyondViewport": True} if whole else {}
        if whole:
            height = self.read("document.documentElement.scrollHeight")
            options["clip"] = {"x": 0, "y": 0, "width": self._size[0], "height": height, "scale": 1}
        picture = self.call("Page.captureScreenshot", format="png", **options)["data"]
        path.write_bytes(base64.b64decode(picture))
