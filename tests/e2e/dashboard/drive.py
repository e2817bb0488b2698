"""Drives the dashboard in headless Chromium over its debugging port, and looks at what a person would see.

drive.py PLAIN_URL SECURED_URL TOKEN DIRECTORY [SECONDS]: PLAIN_URL is a pool under load, with a key that is HTML and two tenants;
SECURED_URL wants TOKEN. Screenshots are left in DIRECTORY. Fails when anything is missing, an error was logged, or another host was
asked. Python's standard library only.
"""

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time


class Browser:
    """Chromium, one page, and the protocol's messages over a WebSocket."""

    def __init__(self):
        self.home = tempfile.mkdtemp()
        arguments = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-port=0"
        ).split()
        self.process = subprocess.Popen(
            [shutil.which("chromium"), *arguments, f"--user-data-dir={self.home}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = os.path.join(self.home, "DevToolsActivePort")
        wait(lambda: os.path.exists(port_file) and "\n" in open(port_file).read(), 30, "chromium to start")
        port, path = open(port_file).read().split("\n")[:2]
        self.socket = socket.create_connection(("127.0.0.1", int(port)), 10)
        self.socket.settimeout(30)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.socket.recv(1)
        assert b" 101 " in head.split(b"\r\n")[0], head
        self.number, self.session, self.errors, self.urls = 0, None, [], set()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def exactly(self, count):
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            assert piece, "chromium closed the connection"
            data += piece
        return data

    def receive(self):
        text = b""
        while True:
            first, second = self.exactly(2)
            length = second & 0x7F
            if length == 126:
                (length,) = struct.unpack(">H", self.exactly(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self.exactly(8))
            text += self.exactly(length)
            if first & 0x80:
                return json.loads(text)

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data, mask = json.dumps(message).encode(), os.urandom(4)
        size = len(data)
        head = bytes([0x81])
        head += bytes([0x80 | size]) if size < 126 else bytes([0xFE]) + struct.pack(">H", size) if size < 65536 else bytes([0xFF]) + struct.pack(">Q", size)
        self.socket.sendall(head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))
        while True:
            reply = self.receive()
            self.note(reply)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def note(self, message):
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(parameters["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.urls.add(parameters["request"]["url"])

    def look(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url, width, height, scheme, mobile=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        wait(lambda: self.look("document.getElementById('footer') !== null && document.readyState === 'complete'"), 20, "the page")

    def picture(self, path, whole=True):
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def close(self):
        self.process.terminate()
        self.process.wait(10)
        shutil.rmtree(self.home, ignore_errors=True)


def wait(until, seconds, what):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def text(browser, element):
    return browser.look(f"document.getElementById({element!r}).textContent")


def shows_the_pool(browser):
    """Every part of the page has something in it."""
    wait(lambda: browser.look("!document.getElementById('board').hidden"), 20, "the first frame")
    wait(lambda: browser.look("document.querySelectorAll('#events .event').length") > 5, 20, "events")
    wait(lambda: browser.look("document.querySelectorAll('#latency tr').length") > 1, 20, "latencies")
    wait(lambda: text(browser, "puts-now") not in ("–", "0"), 20, "a rate of puts")
    wait(lambda: browser.look("document.querySelectorAll('#rates polyline').length") == 3, 20, "three lines in the chart")
    assert browser.look("document.querySelectorAll('.node').length") == 3
    assert browser.look("document.querySelectorAll('.strip i:not([class=\"\"])').length") > 10, "occupied parts of segments"
    assert "%" in text(browser, "used") and "%" in text(browser, "hit"), text(browser, "hit")
    assert text(browser, "state") == "serving", text(browser, "state")
    assert browser.look("document.querySelectorAll('#prefixes tr').length") > 3
    wait(lambda: browser.look("document.querySelectorAll('#hot tr').length") > 3, 20, "hot keys")
    assert not browser.look("document.getElementById('tenants-panel').hidden"), "two tenants"
    assert browser.look("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"


def keys_are_text(browser):
    assert browser.look("document.querySelectorAll('img, iframe, object, [onerror]').length") == 0
    assert browser.look("document.title") == "mooncake"
    assert "<img" in text(browser, "prefixes"), "the key that is HTML is shown as it is written"


def token_is_asked_for(browser, url, token, directory):
    browser.open(url, 1280, 800, "dark")
    wait(lambda: browser.look("!document.getElementById('login').hidden"), 10, "the form")
    browser.picture(os.path.join(directory, "token.png"), whole=False)
    enter = "document.getElementById('token').value = {!r}; document.getElementById('login').requestSubmit()"
    browser.look(enter.format("wrong"))
    wait(lambda: "refused" in text(browser, "login-error"), 10, "the refusal")
    browser.look(enter.format(token))
    wait(lambda: browser.look("!document.getElementById('board').hidden"), 10, "the board")
    assert browser.look("localStorage.length") == 0 and browser.look("document.cookie") == ""
    assert token not in browser.look("location.href") and token not in browser.look("document.body.innerHTML")
    assert not any(token in u for u in browser.urls)
    # 401 is what it was told; the browser logs it.
    browser.errors = [e for e in browser.errors if "401" not in e]


def main():
    plain, secured, token, directory = sys.argv[1:5]
    patience = float(sys.argv[5]) if len(sys.argv) > 5 else 0
    browser = Browser()
    try:
        views = [("light", 1280, 900, "light", False), ("dark", 1280, 900, "dark", False), ("phone", 390, 844, "dark", True), ("phone-light", 390, 844, "light", True)]
        for name, width, height, scheme, mobile in views:
            browser.open(plain, width, height, scheme, mobile)
            shows_the_pool(browser)
            keys_are_text(browser)
            time.sleep(patience if name in ("light", "dark") else min(patience, 3))
            browser.picture(os.path.join(directory, f"{name}.png"))
            print(f"{name}: {text(browser, 'used')}, {text(browser, 'hit')}, {text(browser, 'puts-now')} puts/s")
        token_is_asked_for(browser, secured, token, directory)
        hosts = (plain, secured)
        strange = [u for u in browser.urls if not u.startswith(hosts) and not u.startswith(("data:", "about:"))]
        assert not strange, strange
        assert not browser.errors, browser.errors
        print(f"{len(browser.urls)} addresses asked, all of the master; no error logged")
    finally:
        browser.close()


main()
