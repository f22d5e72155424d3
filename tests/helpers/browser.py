"""A headless Chromium, driven through its DevTools protocol."""

import json
import shutil
import subprocess
import time
from base64 import b64decode
from pathlib import Path

import websocket  # of websocket-client, which jupyter-server brings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 180  # seconds for one answer


class Browser:
    """One page of one browser: `with Browser(folder) as browser: browser.open(path)`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number, self.events = folder, 0, []

    def __enter__(self) -> "Browser":
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={self.folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file, end = self.folder / "DevToolsActivePort", time.monotonic() + WAIT
        while not port_file.exists() or port_file.read_text().count("\n") < 1:
            assert time.monotonic() < end and self.process.poll() is None, "the browser did not start"
            time.sleep(0.1)
        port, path = port_file.read_text().splitlines()
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=WAIT)
        self.session = None
        [page] = [target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(WAIT)

    def call(self, method: str, **parameters) -> dict:
        """The answer of one call; what else the browser says meanwhile goes to `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def show(self, width: int, scheme: str) -> None:
        """Be `width` CSS pixels wide, and `light` or `dark`."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                  mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, address: str) -> None:
        """Open a page and wait until it has loaded; `events` begins anew."""
        self.events = []
        assert "errorText" not in (answer := self.call("Page.navigate", url=address)), answer
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(json.loads(self.socket.recv()))

    def value(self, expression: str):
        """What a JavaScript expression is on the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions, since the page was opened."""
        found = []
        for event in self.events:
            said = event.get("params", {})
            if event.get("method") == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
                found.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
            elif event.get("method") == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(said["args"]))
            elif event.get("method") == "Runtime.exceptionThrown":
                found.append(json.dumps(said["exceptionDetails"]))
        return found

    def requested(self) -> list[str]:
        """The addresses asked for since the page was opened."""
        return [event["params"]["request"]["url"] for event in self.events
                if event.get("method") == "Network.requestWillBeSent"]

    def picture(self, whole: bool = False) -> bytes:
        """The visible part of the page, or the whole of it, as PNG."""
        return b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])
