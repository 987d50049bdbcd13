"""A headless Chromium spoken to over two pipes (DevTools protocol): no driver, no package, no port.

The browser reads commands from its file descriptor 3 and answers on 4, one JSON object after
another, each ended by a zero byte.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time

SECONDS = 60  # a busy machine is slow; nothing waits longer than it must
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"),
]


def find():
    """Path of Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One tab. What it fetched is in `requests`, what it complained about in `complaints`."""

    def __init__(self, program, profile):
        their_input, self._output = self._pipe()
        self._input, their_output = self._pipe()
        command = f'exec "$@" 3<&{their_input} 4>&{their_output}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", program, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(their_input, their_output),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        self._numbers, self._received, self._events = itertools.count(1), b"", []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")

    @staticmethod
    def _pipe():
        """(reading, writing), far from 3 and 4, so that the shell overwrites neither."""
        ends = os.pipe()
        far = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
        for end in ends:
            os.close(end)
        return far

    def close(self):
        """Ends the browser, and waits for it."""
        os.close(self._output)  # without somebody who commands it, it ends
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._input)

    def call(self, method, **params):
        """One command; returns its result and keeps the events that come before it."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._output, data) :]
        answer = self._until(lambda m: m.get("id") == number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _until(self, wanted):
        end = time.monotonic() + SECONDS
        while True:
            while b"\0" in self._received:
                text, self._received = self._received.split(b"\0", 1)
                message = json.loads(text)
                if "method" in message:
                    self._events.append(message)
                if wanted(message):
                    return message
            ready, _, _ = select.select([self._input], [], [], max(0, end - time.monotonic()))
            assert ready, f"no answer from Chromium within {SECONDS} s"
            received = os.read(self._input, 1 << 20)
            assert received, "Chromium has ended"
            self._received += received

    def open(self, url):
        """Goes to a page and waits until everything is loaded and drawn."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        self._until(lambda m: m.get("method") == "Page.loadEventFired")
        self.run("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => r(1))))")

    def run(self, script):
        """Value of a JavaScript expression; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def _said(self, method):
        return [e["params"] for e in self._events if e["method"] == method]

    @property
    def requests(self):
        """Addresses asked for since `open`, pictures inside the page left out."""
        urls = [event["request"]["url"] for event in self._said("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    @property
    def complaints(self):
        """Console messages, exceptions, and issues (as of the content policy) since `open`."""
        said = [event["entry"]["text"] for event in self._said("Log.entryAdded")]
        said += [str(event) for event in self._said("Runtime.consoleAPICalled")]
        said += [str(event) for event in self._said("Runtime.exceptionThrown")]
        return said + [event["issue"]["code"] for event in self._said("Audits.issueAdded")]

    def resize(self, width, height=800):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def pretend(self, *, medium="", scheme="light"):
        """The medium ("print", or "" for the screen) and the colour scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=medium, features=features)

    def press(self, key):
        """A key of the keyboard: "Tab", "ArrowRight", ..."""
        code = {"Tab": 9, "ArrowRight": 39}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def screenshot(self):
        """PNG of the whole page."""
        return base64.b64decode(
            self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        )

    def pdf(self):
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])
