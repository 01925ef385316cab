"""A page in headless Chromium, driven over its debugging protocol by a pipe: no other package is needed.

Chromium needs no network here: everything that it asks for is kept, and everything that it complains of.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_WITHIN_S = 60
_SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip


class Page:
    """A page that is shown, and what it did on the way: `requests` that it made, `complaints` on its console."""

    def __init__(self, process, write_to, read_from):
        self.requests, self.complaints = [], []
        self._process, self._write_to, self._read_from = process, write_to, read_from
        self._number, self._buffer, self._session, self._events = 0, b"", None, []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def open(self, url, width=1200, scheme="light"):
        """Show a page from the beginning: as a screen of that width, whose system likes that colour scheme, has it."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.like(scheme)
        self.requests.clear()
        self.complaints.clear()
        self._events.clear()
        self._ask("Page.navigate", url=url)
        deadline = time.monotonic() + _WITHIN_S
        while True:
            while "Page.loadEventFired" not in self._events:
                assert time.monotonic() < deadline, "the page did not load"
                self._take(self._message())
            if self.find("document.URL") == url:
                return
            self._events.clear()  # that was the empty page from before

    def like(self, scheme, media="screen"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._ask("Emulation.setEmulatedMedia", media=media, features=features)

    def find(self, expression):
        """What a JavaScript expression says of the page; the page itself runs none."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key, text=""):
        """A key of the keyboard: Tab, Enter, and so on."""
        code = {"Tab": 9, "Enter": 13, "ArrowRight": 39, " ": 32}[key]
        facts = {"key": key, "code": {" ": "Space"}.get(key, key), "windowsVirtualKeyCode": code}
        self._ask("Input.dispatchKeyEvent", type="keyDown", **facts, **({"text": text} if text else {}))
        self._ask("Input.dispatchKeyEvent", type="keyUp", **facts)

    def picture(self, path, whole=True):
        """A PNG of the page."""
        found = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
        return path

    def _ask(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write_to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._message()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self._take(found)

    def _message(self):
        while b"\0" not in self._buffer:
            more = os.read(self._read_from, 2**20)
            assert more, f"Chromium has ended with status {self._process.wait(_WITHIN_S)}"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _take(self, message):
        method, params = message.get("method", ""), message.get("params", {})
        self._events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))


@contextlib.contextmanager
def chromium():
    """A Page of a Chromium with a profile of its own."""
    to_it, write_to = os.pipe()
    read_from, from_it = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *_SWITCHES, f"--user-data-dir={profile}", "about:blank"]
        # It reads from descriptor 3 and writes to 4, whichever ours are.
        shell = f'exec "$@" 3<&{to_it} 4>&{from_it}'
        process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *command],
            pass_fds=(to_it, from_it), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile}, start_new_session=True,
        )  # fmt: skip
        os.close(to_it)
        os.close(from_it)
        try:
            yield Page(process, write_to, read_from)
        finally:
            os.close(write_to)  # the end of its orders ends it
            os.close(read_from)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
