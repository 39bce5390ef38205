"""What the page's server promises: the newest frame, the keys that are held, an answer to everything."""

import base64
import contextlib
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from playing import ROOT, Viewer, arguments, ask, page, wait_for
from test_web import javascript, needs_node

import play
from page import commands
from page import server as page_server
from page.player import COMMANDS, Player
from page.screen import STREAMS, WINDOW
from page.server import SLOTS, addresses, bind


def test_the_page_is_served_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    with page(tmp_path) as (_, server):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        connection.request("GET", "/")
        text = connection.getresponse().read().decode()
    assert "http://" not in text and "https://" not in text
    assert set(re.findall(r'(?:src|href)="([^"]*)"', text)) == {"data:,"}, "all is inside"
    for part in [*ROOT.glob("page/*.js"), *ROOT.glob("page/*.css")]:
        assert text.count(part.read_text()) == 1, part.name


@pytest.mark.parametrize("pattern", ["page/*.html", "page/*.css", "page/*.js"])
def test_what_a_browser_reads_can_be_read_by_people(pattern: str) -> None:
    for path in ROOT.glob(pattern):
        lines = path.read_text().splitlines()
        assert len(lines) <= 300 and max(map(len, lines)) <= 100, path.name
        assert path.suffix == ".html" or re.match(r"// [A-Z]|/\* [A-Z]", lines[0]), path.name


def test_frames_carry_what_the_page_shows(tmp_path: Path) -> None:
    with page(tmp_path) as (_, server):
        viewer = Viewer(server)
        assert (
            viewer.hello["hello"] == 1
            and viewer.hello["role"] == "play"
            and viewer.hello["preset"] == "fake"
        )
        assert len(viewer.hello["gallery"]) == 10
        header = viewer.frame()
        assert {
            "i",
            "t",
            "keys",
            "pose",
            "ms",
            "gen",
            "n",
            "policy",
            "view",
            "pace",
            "paused",
            "seed",
            "left",
            "slots",
            "psnr",
        } <= set(header)
        notes = [note for note, jpeg in (viewer.record() for _ in range(20)) if not jpeg]
        picks = next(note["memory"] for note in notes if "memory" in note)
        assert {"frame", "score", "sink", "thumb", "pose"} <= set(picks[-1])
        viewer.close()


def test_keys_posted_are_keys_played(tmp_path: Path) -> None:
    with page(tmp_path) as (_, server):
        viewer = Viewer(server)
        viewer.frame()
        assert viewer.post("/input", keys=["w", "l", "nonsense"])[0] == 204
        assert sorted(ask(server, "GET", "/state")[1]["held"]) == ["l", "w"]
        for _ in range(400):
            header, jpeg = viewer.record()
            if jpeg:
                viewer.post("/input", keys=["w", "l"], shown=header["n"])
                if header["keys"] == ["l", "w"]:
                    break
        assert header["keys"] == ["l", "w"]
        viewer.close()


@pytest.mark.long
def test_only_a_window_of_frames_is_on_its_way_and_a_late_viewer_skips(tmp_path: Path) -> None:
    with page(tmp_path) as (player, server):
        viewer = Viewer(server)
        seen = []
        viewer.socket.settimeout(3)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            header, jpeg = viewer.record()
            seen += [header["n"]] if jpeg else []
        assert len(seen) == WINDOW == 4, "nothing more without an acknowledgement"
        viewer.post("/input", keys=[], shown=seen[-1])
        late = viewer.frame(ack=False)
        assert late["n"] > seen[-1] + 1, "the newest frame, not the next one"
        viewer.close()


def test_one_plays_the_others_watch_and_the_next_one_takes_over(tmp_path: Path) -> None:
    with page(tmp_path) as (player, server):
        first, second = Viewer(server), Viewer(server)
        assert (first.hello["role"], second.hello["role"]) == ("play", "watch")
        second.post("/input", keys=["w"])
        assert ask(server, "GET", "/state")[1]["held"] == []
        assert second.post("/cmd", cmd="pause") == (
            403,
            {"ok": False, "error": "another tab plays, this one watches"},
        )
        first.close()
        wait_for(lambda: len(player.screen.viewers) == 1)
        second.frame(role="play")
        second.post("/input", keys=["a"])
        assert ask(server, "GET", "/state")[1]["held"] == ["a"]
        second.close()


def test_commands_do_what_they_say(tmp_path: Path) -> None:
    with page(tmp_path) as (player, server):
        viewer = Viewer(server)
        viewer.frame()
        assert viewer.post("/cmd", cmd="pause") == (200, {"ok": True, "error": ""})
        wait_for(lambda: player.set["paused"])
        time.sleep(0.2)
        frame = player.frame
        viewer.post("/cmd", cmd="step")
        wait_for(lambda: player.frame == frame + 4)
        viewer.post("/cmd", cmd="undo")
        wait_for(lambda: player.frame == max(0, frame + 4 - 40))
        viewer.post("/cmd", cmd="seed")
        wait_for(lambda: player.seed != 42 and player.frame == 0)
        picture = io.BytesIO()
        Image.new("RGB", (80, 60), (200, 30, 30)).save(picture, "PNG")
        viewer.post("/cmd", cmd="image", data=base64.b64encode(picture.getvalue()).decode())
        wait_for(
            lambda: "80x60 → 64x64 centre crop" in player.begun.note and player.begun.truth is None
        )
        viewer.post("/cmd", cmd="image", data=viewer.hello["gallery"][2])
        wait_for(lambda: player.begun.truth is not None)
        viewer.post("/cmd", cmd="image", data="bm8gcGljdHVyZQ==")
        wait_for(
            lambda: any(
                "the new picture cannot be read" in note.get("info", "")
                for _, note in player.screen.notes
            )
        )
        assert player.is_alive()
        viewer.close()


def test_a_command_too_many_is_refused_and_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(arguments("--fake", "--out", str(tmp_path)), 40)  # never started: obeys nothing
    body = {"cmd": "pause"}
    answers = [commands.heard(player, "/cmd", body)[0] for _ in range(COMMANDS + 1)]
    assert answers == [200] * COMMANDS + [429]

    # two that ask at one moment are both told that there is room
    monkeypatch.setattr(player.commands, "full", lambda: False)
    late = threading.Thread(
        target=lambda: answers.append(commands.heard(player, "/cmd", body)[0]), daemon=True
    )
    late.start()
    late.join(20)
    assert answers[-2:] == [429, 429]


def test_a_lost_browser_pauses_the_world_and_a_new_one_resumes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with page(tmp_path) as (player, server):
        viewer = Viewer(server)
        viewer.frame()
        viewer.close()
        wait_for(lambda: not player.screen.viewers)
        player.screen.seen -= 20
        wait_for(lambda: player.alone)
        time.sleep(0.1)
        frame = player.frame
        time.sleep(0.3)
        assert player.frame == frame
        viewer = Viewer(server)
        wait_for(lambda: player.frame > frame)
        viewer.close()
    said = capsys.readouterr().out
    assert (
        said.count("no viewer for 10 s: waiting") == 1
        and said.count("a viewer is back: going on") == 1
    )


@pytest.mark.parametrize(
    "method, path, body, headers, status",
    [
        ("GET", "/etc/passwd", None, {}, 404),
        ("GET", "/../play.py", None, {}, 404),
        ("POST", "/frames", {}, {}, 404),
        ("DELETE", "/", None, {}, 501),
        ("POST", "/input", b"{", {}, 400),
        ("POST", "/input", b"[]", {}, 400),
        ("POST", "/input", b"\xff", {}, 400),
        ("POST", "/input", {"dx": "x"}, {}, 400),
        ("POST", "/input", b'{"dx": NaN}', {}, 400),
        ("POST", "/input", {"keys": 3}, {}, 400),
        ("POST", "/input", {"keys": {"w": 1}}, {}, 400),
        ("POST", "/input", {"keys": [[]], "id": []}, {}, 204),
        ("POST", "/input", b"[" * 9000, {}, 400),
        ("POST", "/input", b" " * 20_000, {}, 413),
        ("POST", "/input", None, {"Content-Length": "-1"}, 411),
        ("POST", "/cmd", {"cmd": "rm"}, {}, 400),
        ("POST", "/cmd", {"cmd": ["pause"]}, {}, 400),
        ("POST", "/cmd", {}, {"Content-Length": "99999999"}, 413),
        ("GET", "/state", None, {"Origin": "http://evil.example"}, 403),
        ("POST", "/cmd", {"cmd": "pause"}, {"Origin": "null"}, 403),
        ("GET", "/", None, {"Host": "evil.example:8000"}, 403),
        ("GET", "/state", None, {"Host": "localhost:9999", "Origin": "http://localhost:9999"}, 200),
    ],
)
def test_a_wrong_request_is_answered_and_nothing_happens(
    tmp_path, served, method, path, body, headers, status
) -> None:
    player, server = served
    assert ask(server, method, path, body, headers)[0] == status
    assert player.is_alive() and not player.set["paused"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    with page(tmp_path_factory.mktemp("served")) as pair:
        yield pair


def garbage(rng: random.Random) -> bytes:
    path = rng.choice([b"/", b"/input", b"/cmd", b"/state", b"/%00", b"//", b"/input?token=%ff"])
    line = rng.choice([b"GET", b"POST", b"PUT", b"\x00", b""]) + b" " + path
    known = [
        b"",
        b"{}",
        b"null",
        b'{"cmd": "image", "data": "%%"}',
        b'{"keys": {"w": 1}, "dx": 1e999}',
    ]
    body = rng.choice([*known, rng.randbytes(rng.randint(0, 200))])
    length = rng.choice([str(len(body)), str(len(body)), "0", "-5", "abc", "1" * 30, ""]).encode()
    return (
        line
        + rng.choice([b" HTTP/1.1\r\n", b" HTTP/9\r\n", b"\r\n"])
        + b"Host: 127.0.0.1\r\nContent-Length: "
        + length
        + b"\r\n\r\n"
        + body
    )


def bombard(player: Player, server, requests: int) -> None:
    rng = random.Random(2)
    for _ in range(requests):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as client,
        ):
            client.sendall(garbage(rng))
            client.shutdown(socket.SHUT_WR)
            while client.recv(4096):
                continue
    assert player.is_alive() and ask(server, "GET", "/state")[0] == 200
    wait_for(lambda: threading.active_count() < 40)
    assert (
        len(player.screen.notes) <= 32
        and player.commands.qsize() <= 16
        and len(player.controls.held) <= 8
    )


def test_garbage_leaves_the_server_up(served) -> None:
    bombard(*served, requests=500)


@pytest.mark.slow
def test_ten_thousand_garbage_requests_leave_the_server_up(served) -> None:
    bombard(*served, requests=10_000)


# ---- other pages, and clients that mean no good ------------------------------------------------------------


@pytest.mark.parametrize("site, status", [("cross-site", 403), ("same-site", 403), ("none", 200)])
def test_a_picture_in_a_foreign_page_takes_no_seat(served, site: str, status: int) -> None:
    player, server = served
    seen = player.screen.serial
    for path in ("/state", "/frames") if status == 403 else ("/state",):
        assert ask(server, "GET", path, headers={"Sec-Fetch-Site": site})[0] == status
    assert not player.screen.viewers and player.screen.serial >= seen


def test_a_link_in_a_foreign_page_opens_ours_and_nothing_else(served) -> None:
    _, server = served
    click = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    found = [ask(server, "GET", path, headers=click)[0] for path in ("/", "/state", "/frames")]
    assert found == [200, 403, 403]
    assert ask(server, "GET", "/", headers={"Sec-Fetch-Site": "cross-site"})[0] == 403


def test_the_page_cannot_be_framed_and_loads_nothing_else(served) -> None:
    _, server = served
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    for path in ("/", "/state", "/nothing"):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("GET", path)
        reply = connection.getresponse()
        policy = reply.headers["Content-Security-Policy"]
        assert reply.headers["X-Frame-Options"] == "DENY"
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        connection.close()


def test_an_error_in_a_request_gives_its_slot_back(served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 made slices hashable: {}[:16] is a KeyError there. Any error will do."""
    _, server = served
    monkeypatch.setattr(server, "handle_error", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(commands, "heard", lambda *_: 1 / 0)
        for _ in range(SLOTS + 1):
            with contextlib.suppress(OSError, http.client.HTTPException):
                ask(server, "POST", "/input", {})
    assert ask(server, "GET", "/state")[0] == 200
    assert ask(server, "POST", "/input", {"keys": {"w": 1}})[0] == 400


def test_clients_that_drip_do_not_hold_the_server(served, monkeypatch: pytest.MonkeyPatch) -> None:
    _, server = served
    monkeypatch.setattr(page_server, "HEARD", 0.3)
    clients = [
        socket.create_connection(("127.0.0.1", server.server_port), timeout=5) for _ in range(SLOTS)
    ]
    until = time.monotonic() + 10
    answered = False
    while not answered and time.monotonic() < until:
        for client in clients:
            with contextlib.suppress(OSError):
                client.sendall(b"G")
        with contextlib.suppress(OSError, http.client.HTTPException):
            answered = ask(server, "GET", "/state")[0] == 200
        time.sleep(0.05)
    for client in clients:
        client.close()
    assert answered
    wait_for(lambda: threading.active_count() < 40)


def test_viewers_are_bounded(tmp_path: Path) -> None:
    with page(tmp_path) as (player, server):
        viewers = [Viewer(server) for _ in range(STREAMS)]
        assert ask(server, "GET", "/frames") == (
            503,
            {"ok": False, "error": "8 viewers are connected already"},
        )
        for viewer in viewers:
            viewer.close()
        wait_for(lambda: not player.screen.viewers)


def test_another_host_demands_its_token(tmp_path: Path) -> None:
    player = Player(arguments("--fake"), 40)
    server = bind(player, "0.0.0.0", 18000 + os.getpid() % 2000)
    try:
        assert len(server.token) == 32
        status, said = ask(server, "GET", "/state")
        assert (
            status == 403
            and said["error"] == "the token is missing: open the URL that play.py printed"
        )
        assert ask(server, "GET", f"/state?token={server.token}")[0] == 200
        assert (
            ask(
                server,
                "GET",
                f"/state?token={server.token}",
                headers={"Origin": "http://evil.example"},
            )[0]
            == 403
        )
    finally:
        server.shutdown()
        server.server_close()


def test_the_last_port_may_be_taken(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 65_535))
        other.listen()
        with pytest.raises(ValueError, match="cannot serve 127.0.0.1:65535"):
            bind(SimpleNamespace(), "127.0.0.1", 65_535)


@pytest.mark.parametrize(
    "host, token, url, there",
    [
        ("127.0.0.1", "", "http://127.0.0.1:8000", "127.0.0.1"),
        ("0.0.0.0", "secret", "http://0.0.0.0:8000/?token=secret", "127.0.0.1"),
        ("10.1.2.3", "secret", "http://10.1.2.3:8000/?token=secret", "10.1.2.3"),
    ],
)
def test_the_ssh_line_leads_to_where_one_listens_and_brings_the_token(
    host: str, token: str, url: str, there: str
) -> None:
    said, tunnel = addresses(SimpleNamespace(server_port=8000, token=token), host)
    assert said == url
    door = "/?token=secret" if token else ""
    assert tunnel == f"ssh -L 8000:{there}:8000 <this host>  then http://127.0.0.1:8000{door}"


@needs_node
def test_a_refused_stream_says_why() -> None:
    program = """
        const said = [];
        const error = "8 viewers are connected already";
        Object.assign(globalThis, {
          location: { search: "" },
          say: (text) => said.push(text),
          fetch: async () => new Response(JSON.stringify({ error }), { status: 503 }),
        });
        const { runInThisContext } = await import("node:vm");
        runInThisContext(readFileSync("../page/talk.js", "utf8"));
        await readRecords();
        return said;
    """
    assert javascript(program) == ["8 viewers are connected already"]


def test_any_free_port_is_not_a_taken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    args = arguments("--fake", "--port", "0", "--no-open", "--out", str(tmp_path / "walk"))
    args.stop.set()
    assert play.serve(args) == 0
    assert capsys.readouterr().out.startswith("Open http://127.0.0.1:")


def test_start_up_prints_the_page_and_the_ssh_line(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "play.py"), "--fake", "--port", str(port)],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            env=env,
        )
        first, second = process.stdout.readline(), process.stdout.readline()
    other = int(first.rsplit(":", 1)[1])
    url = f"http://127.0.0.1:{other}"
    assert first == f"Port {port} is taken (another play.py?). Using {other}: {url}\n"
    assert port < other < port + 20
    tunnel = f"ssh -L {other}:127.0.0.1:{other} <this host>"
    assert second == f"Open from your machine:  {tunnel}  then {url}\n"
    connection = http.client.HTTPConnection("127.0.0.1", other, timeout=10)
    connection.request("GET", "/state")
    assert json.loads(connection.getresponse().read())["preset"] == "fake"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_the_page_tells_of_drawn_pictures_before_the_server_waits_for_it() -> None:
    talk = (ROOT / "page/talk.js").read_text()
    every = int(re.search(r"const ACKNOWLEDGE = (\d+);", talk)[1])
    assert 1 <= every < WINDOW
