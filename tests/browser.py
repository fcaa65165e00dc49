"A headless Chromium driven over its DevTools socket, for looking at built pages; nothing to install but the browser."
import json, os, shutil, subprocess, tempfile, threading, time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def find_chromium() -> str | None:
    "CHROME, or a Chromium on the path."
    return os.environ.get("CHROME") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell"))), None)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


def serve(folder: Path):
    "An HTTP server for `folder` on a free local port: (server, address)."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


class Browser:
    "One tab. `errors` and `requests` collect what the pages report."

    def __init__(self, chromium: str):
        import websocket
        self.folder = tempfile.mkdtemp(prefix="capnb-browser-")
        self.process = subprocess.Popen([chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", f"--user-data-dir={self.folder}", "about:blank"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = Path(self.folder) / "DevToolsActivePort"
        end = time.time() + 60
        while not port_file.exists() or len(port_file.read_text().split()) < 2:
            if time.time() > end or self.process.poll() is not None: self.close(); raise RuntimeError("the browser did not start")
            time.sleep(.1)
        port, path = port_file.read_text().split()
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=60, suppress_origin=True)
        self.n, self.session, self.errors, self.requests, self.loaded = 0, None, [], [], False
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"): self(f"{domain}.enable")

    def __call__(self, method: str, **params) -> dict:
        "Send one command and wait for its answer; events that come in between are noted."
        self.n += 1
        self.socket.send(json.dumps({"id": self.n, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})))
        while True:
            m = json.loads(self.socket.recv())
            if m.get("id") == self.n:
                if "error" in m: raise RuntimeError(f"{method}: {m['error']}")
                return m["result"]
            self.note(m)

    def note(self, m: dict) -> None:
        kind, p = m.get("method"), m.get("params", {})
        if kind == "Runtime.exceptionThrown": self.errors.append(p["exceptionDetails"].get("exception", {}).get("description") or p["exceptionDetails"]["text"])
        if kind == "Runtime.consoleAPICalled" and p["type"] == "error": self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in p["args"]))
        if kind == "Log.entryAdded" and p["entry"]["level"] == "error": self.errors.append(f"{p['entry']['text']} {p['entry'].get('url', '')}")
        if kind == "Network.requestWillBeSent": self.requests.append(p["request"]["url"])
        if kind == "Page.loadEventFired": self.loaded = True

    def resize(self, width: int, height: int = 900) -> None:
        "A window of another size; below 600 pixels that of a phone."
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def open(self, url: str, width: int = 1200, height: int = 900) -> None:
        "Load `url` in a window `width` pixels wide and wait until it stands."
        self.resize(width, height)
        self.loaded = False
        self("Page.navigate", url=url)
        end = time.time() + 60
        while not self.loaded:
            if time.time() > end: raise TimeoutError(url)
            self.note(json.loads(self.socket.recv()))

    def eval(self, script: str):
        "The value of a JavaScript expression, promises awaited."
        r = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in r: raise RuntimeError(r["exceptionDetails"])
        return r["result"].get("value")

    def wait(self, script: str, seconds: float = 20):
        "Evaluate `script` until it is true; its last value."
        end = time.time() + seconds
        while not (v := self.eval(script)) and time.time() < end: time.sleep(.1)
        return v

    def screenshot(self, path: Path) -> None:
        import base64
        Path(path).write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        if hasattr(self, "socket"): self.socket.close()
        self.process.kill(); self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
