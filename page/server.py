"""Frames out, keys in: the page over plain HTTP.

Five routes (play.py lists them). One stream per viewer, a thread per connection; HTTP threads touch
the controls, the screen and a queue of commands, never the model. Only this machine is served;
another host demands a token. The page is sent as one text, so its policy (HEADERS) can forbid the
browser to load anything else.
"""

import base64
import contextlib
import functools
import json
import re
import secrets
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from page import commands
from page.controls import KEYS
from page.screen import STREAMS

HERE = Path(__file__).resolve().parent
INSIDE = re.compile(  # what index.html asks for: its style, or one of its scripts
    r'<link rel="stylesheet" href="(\w+\.css)">|<script src="(\w+\.js)"></script>'
)
BODY = 16_384  # bytes of an input
PICTURE = 16_000_000  # bytes of a command: it may carry a picture
SLOTS = 64  # connections at once; more are closed unheard
PORTS = 20  # tried one after the other
HEARD = 10.0  # seconds in which a request must have been made
CARRIED = 60.0  # seconds in which its body must have come, once it is known who asks
THIS_MACHINE = ("127.0.0.1", "localhost", "[::1]")
NOT_UNDERSTOOD = (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError)
OURSELVES = (
    "same-origin",
    "none",
    None,
)  # who asks: our page, an address that was typed, no browser
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def whole_page() -> str:
    """index.html with its style and its scripts in the places where it names them."""

    def put_in(found: re.Match) -> str:
        style, script = found.groups()
        tag = "style" if style else "script"
        content = (HERE / (style or script)).read_text("utf-8")
        return f"<{tag}>\n{content}</{tag}>"

    return INSIDE.sub(put_in, (HERE / "index.html").read_text("utf-8"))


class Handler(BaseHTTPRequestHandler):
    """What a client sends is bounded, checked and treated as data.

    A wrong request is a 4xx, never a crash.
    """

    protocol_version = "HTTP/1.1"
    timeout = 20  # seconds without a byte

    def log_message(self, *_: object) -> None:
        return  # requests are not news: errors go to the page and to /state

    def handle(self) -> None:
        if not self.server.slots.acquire(blocking=False):
            return
        try:
            # a client that hangs up in the middle is no error of ours
            with contextlib.suppress(OSError):
                super().handle()
        finally:
            self.server.slots.release()

    def handle_one_request(self) -> None:
        """As always, but who only ever sends the next byte holds a slot no longer than others do."""
        self.must_end_in(HEARD)
        try:
            super().handle_one_request()
        finally:
            self.server.deadlines.pop(self.connection, None)

    def must_end_in(self, seconds: float) -> None:
        """From now on, whatever it was before."""
        self.server.deadlines[self.connection] = time.monotonic() + seconds

    def end_headers(self) -> None:
        """Of every answer, errors included."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def reply(self, status: int, body: bytes | dict = b"", kind: str = "application/json") -> None:
        """The whole answer at once; nothing of ours is ever cached."""
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        # what is left unread must not be taken for a request
        self.close_connection |= status >= 400
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, error: str) -> None:
        """An error that a page, or a person with curl, can read."""
        self.reply(status, {"ok": False, "error": error})

    @property
    def route(self) -> str:
        return self.path.partition("?")[0]

    def refused(self) -> str:
        """Foreign hosts (DNS rebinding), foreign pages and missing tokens have no business here."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        token = self.server.token
        given = self.path.partition("?token=")[2]
        if token and not secrets.compare_digest(given.encode(), token.encode()):
            return "the token is missing: open the URL that play.py printed"
        if not token and re.sub(r":\d+$", "", host) not in THIS_MACHINE:
            return f"host {host!r} is not this machine"
        if origin not in (None, f"http://{host}"):
            return f"origin {origin!r} is not this page"
        # an <img> of another page sends no Origin, but browsers say where it stands; a link may be followed
        followed = self.headers.get("Sec-Fetch-Mode") == "navigate" and self.route == "/"
        if not followed and self.headers.get("Sec-Fetch-Site") not in OURSELVES:
            return "another page may not look in here"
        return ""

    # ---- GET

    def do_GET(self) -> None:
        error = self.refused()
        player = self.server.player
        if error:
            self.refuse(403, error)
        elif self.route == "/":
            self.reply(200, whole_page().encode(), "text/html; charset=utf-8")
        elif self.route == "/state":
            self.reply(200, player.state())
        elif self.route == "/frames":
            with player.screen.seat() as viewer:
                if viewer:
                    self.stream(player, viewer)
                else:
                    self.refuse(503, f"{STREAMS} viewers are connected already")
        else:
            self.refuse(404, "there is /, /state and /frames")

    def stream(self, player: object, viewer: str) -> None:
        """Records for as long as somebody listens; the first one says who is greeted, and how things are."""
        self.close_connection = True
        self.server.deadlines.pop(self.connection, None)  # a stream goes on as long as one looks
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        pictures = [base64.b64encode(path.read_bytes()).decode() for path in player.gallery]
        hello = {
            "hello": 1,
            "version": 1,
            "server": self.server.name,
            "id": viewer,
            "role": "play" if player.screen.plays(viewer) else "watch",
            "fps": player.fps,
            "keys": KEYS,
            "gallery": pictures,
        }

        # a length and the text, a length and the picture, for ever
        records = [(hello | player.state(), b"")]
        while not player.args.stop.is_set():
            for header, jpeg in records:
                text = json.dumps(header).encode()
                sizes = [len(part).to_bytes(4, "big") for part in (text, jpeg)]
                self.wfile.write(sizes[0] + text + sizes[1] + jpeg)
            records = player.screen.take(viewer)

    # ---- POST

    def do_POST(self) -> None:
        error = self.refused()
        length = self.headers.get("Content-Length", "")
        limit = PICTURE if self.route == "/cmd" else BODY
        if error:
            self.refuse(403, error)
        elif self.route not in ("/input", "/cmd"):
            self.refuse(404, "there is /input and /cmd")
        elif not re.fullmatch(r"\d{1,9}", length) or int(length) > limit:
            status = 413 if length.isdecimal() else 411
            self.refuse(status, f"Content-Length must be at most {limit}")
        else:
            self.hear(int(length))

    def hear(self, length: int) -> None:
        """Whatever the body says, it is answered."""
        self.must_end_in(CARRIED)
        try:
            body = json.loads(self.rfile.read(length))
            status, error = commands.heard(self.server.player, self.route, body)
        except NOT_UNDERSTOOD as wrong:
            status, error = 400, f"not understood: {wrong}"
        if status == 204:
            self.reply(204)
        else:
            self.reply(status, {"ok": not error, "error": error})


class Server(ThreadingHTTPServer):
    """A thread per connection, so many at once, each with a deadline."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], player: object, token: str) -> None:
        self.ended = threading.Event()  # first: a taken port closes what was never open
        super().__init__(address, Handler)
        self.player = player
        self.token = token
        self.slots = threading.Semaphore(SLOTS)
        self.deadlines: dict[socket.socket, float] = {}
        # a page that comes back knows by it whether it still talks to the same one
        self.name = secrets.token_hex(4)

    def server_close(self) -> None:
        """Who watches the deadlines goes home, too."""
        self.ended.set()
        super().server_close()


def end_late_requests(server: Server) -> None:
    """A timeout of reads alone would let 64 clients that drip hold the server for ever."""
    while not server.ended.wait(1.0):
        now = time.monotonic()
        for connection, deadline in list(server.deadlines.items()):
            if now > deadline:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def addresses(server: Server, host: str) -> tuple[str, str]:
    """The URL of the page; and, for another machine, how to reach it from there through ssh."""
    port = server.server_port
    door = f"/?token={server.token}" if server.token else ""
    # who listens everywhere, or nowhere else, is here; any other address listens on itself alone
    there = "127.0.0.1" if host in ("", "0.0.0.0", "localhost") else host
    tunnel = f"ssh -L {port}:{there}:{port} <this host>  then http://127.0.0.1:{port}{door}"
    return f"http://{host or there}:{port}{door}", tunnel


def bind(player: object, host: str, port: int) -> Server:
    """The server on this port, or on the next free one."""
    token = "" if host in ("127.0.0.1", "localhost") else secrets.token_hex(16)
    places = range(port, min(port + PORTS, 65_536))
    for place in places:
        try:
            server = Server((host, place), player, token)
        except OSError as error:
            if place == places[-1]:
                raise ValueError(
                    f"cannot serve {host}:{place} ({error.strerror}); pass another --host or --port"
                ) from error
            continue
        for work in (server.serve_forever, functools.partial(end_late_requests, server)):
            threading.Thread(target=work, daemon=True).start()
        return server
