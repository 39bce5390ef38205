"""Whatever comes, it is taken or refused in words: never a traceback, a hang, or somebody else's code.

Files, folders and requests are made good first, then spoiled by a seeded hand: values of other kinds,
bytes flipped and cut off, nesting without end, pickles that would run something.
"""

import contextlib
import functools
import json
import os
import pickle
import random
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from playing import Viewer, act, arguments, ask, main, page, wait_for
from safetensors.torch import save_file

import data
import moe
import vae
from dataset import episode
from engine import checkpoint, weights
from page import folder as folders
from page.player import Player
from page.server import SLOTS

SECONDS = 120  # of one attempt, on a machine that is busy with other things
LETTERS = 1000  # of a refusal
STREAM = 40_000  # bytes: no answer but the endless one is longer
ODD = (
    *(None, True, False, -1, 0, 1, 3, 0.5, 1e308, 10**9, 2**63, 10**30),
    *(float("nan"), float("inf"), "", "x", "../../x", "/dev/zero", "\x00", "σ\n\x1b[2J", "hf:a/b"),
    *([], {}, [[]], [1, "x"], [10**9, 10**9], {"a": 1}, "x" * 5000),
)


# ---- the hand ----------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """No handler of errors may take it for one."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(run: Callable, *names: str) -> bool:
    """Was it refused? Then in one line, printable, that names one of these."""
    try:
        with within(SECONDS):
            run()
    except (ValueError, OSError) as error:
        check_line(str(error), *names)
        return True
    return False


def check_line(message: str, *names: str) -> None:
    assert message.isprintable(), message
    assert len(message) < LETTERS, message
    assert any(name in message for name in names), f"{message!r} names none of {names}"


def places(tree: object) -> list[tuple]:
    """(container, key) of everything in a tree of JSON."""
    if isinstance(tree, dict):
        here = [(tree, key) for key in tree]
    elif isinstance(tree, list):
        here = [(tree, key) for key in range(len(tree))]
    else:
        return []
    below = [place for container, key in here for place in places(container[key])]
    return here + below


def spoil_tree(rng: random.Random, tree: object) -> object:
    """One to three values of another kind, lost, or under another name."""
    if rng.random() < 0.05:
        return rng.choice(ODD)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(tree) or [({"": 0}, "")])
        deed = rng.random()
        if deed < 0.7:
            container[key] = rng.choice(ODD)
        elif deed < 0.85:
            container.pop(key)
        elif isinstance(container, dict):
            container[str(rng.choice(ODD))] = container.pop(key)
    return tree


def spoil_json(rng: random.Random, text: bytes) -> bytes:
    deep = [b"[" * 50_000, b'{"a":' * 50_000, b"[" * 50_000 + b"]" * 50_000]
    if rng.random() < 0.1:
        return rng.choice(deep)
    if rng.random() < 0.2:
        return spoil_bytes(rng, text)
    return json.dumps(spoil_tree(rng, json.loads(text))).encode()


def spoil_lines(rng: random.Random, text: bytes) -> bytes:
    """A journal: a line of JSON is spoiled, or lines change places."""
    lines = text.splitlines()
    k = rng.randrange(len(lines))
    if rng.random() < 0.2:
        rng.shuffle(lines)
    else:
        lines[k] = spoil_json(rng, lines[k]).replace(b"\n", b" ")
    return b"\n".join(lines) + b"\n"


def spoil_bytes(rng: random.Random, good: bytes, head: int = 0) -> bytes:
    """Flipped, cut off, overwritten or longer; mostly near the head, where files say what they are."""
    bad = bytearray(good)
    end = min(len(bad), head or len(bad))
    deed = rng.randrange(4)
    if deed == 0:
        return bytes(bad[: rng.randrange(len(bad) + 1)])
    if deed == 1:
        return bytes(bad) + rng.randbytes(rng.randint(1, 100))
    if deed == 2:
        at = rng.randrange(end)
        bad[at : at + 8] = rng.choice([bytes(8), b"\xff" * 8, rng.randbytes(8)])
        return bytes(bad)
    for _ in range(rng.randint(1, 5)):
        bad[rng.randrange(end)] = rng.randrange(256)
    return bytes(bad)


def spoil_safetensors(rng: random.Random, good: bytes) -> bytes:
    """Its header is JSON, and some values of that are JSON again."""
    size = 8 + int.from_bytes(good[:8], "little")
    if rng.random() < 0.3:
        return spoil_bytes(rng, good, size)
    header = json.loads(good[8:size])
    words = header.get("__metadata__", {})
    if words and rng.random() < 0.4:
        key = rng.choice([*words])
        words[key] = spoil_json(rng, words[key].encode()).decode("utf8", "replace")
        text = json.dumps(header).encode()
    elif rng.random() < 0.2:  # as many bytes, of another kind
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        entry["dtype"] = rng.choice(["I32", "U32", "F64", "BOOL", "F8_E5M2", "C64"])
        text = json.dumps(header).encode()
    else:
        text = spoil_json(rng, json.dumps(header).encode())
    return len(text).to_bytes(8, "little") + text + good[size:]


class Evil:
    """A pickle of it calls a function that leaves a mark."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def spoil_torch(rng: random.Random, good: bytes, mark: Path) -> bytes:
    """A zip with a pickle in it, or a bare pickle that runs something."""
    if rng.random() < 0.5:
        return spoil_bytes(rng, good, rng.choice([0, 2000]))
    deeds = [
        Evil(os.system, f"touch {mark}"),
        Evil(exec, f"open({str(mark)!r}, 'w')"),
        Evil(Path.touch, mark),
        Evil(torch.save, 1, str(mark)),
    ]
    deed = rng.choice(deeds)
    content = rng.choice([deed, {"state_dict": deed}, {"a": torch.ones(1), "b": deed}, [deed]])
    file = mark.with_name("evil.pt")
    if rng.random() < 0.5:
        file.write_bytes(pickle.dumps(content, rng.randint(0, 5)))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.5)
    return file.read_bytes()


# ---- weights -----------------------------------------------------------------------------------------------


Attempt = tuple[Path, Callable, Callable]  # a file, what spoils it, what reads it


def as_released(cfg: object) -> dict:
    """A config in the words of the released one."""
    said = asdict(cfg)
    for theirs, ours in {"num_heads": "heads", "num_layers": "layers", "ffn_dim": "ffn"}.items():
        said[theirs] = said.pop(ours)
    return said


def make_weights(folder: Path) -> list[Attempt]:
    """One good file of every kind."""
    model = moe.build("micro").eval()
    tensors = model.state_dict()
    ours = folder / "ours.safetensors"
    weights.write_weights(ours, tensors, {"model": asdict(model.cfg), "step": 7})

    # as published: words beside the file; and in two files with an index
    released = folder / "released"
    shards = folder / "shards"
    for place in (released, shards):
        place.mkdir()
        (place / "config.json").write_text(json.dumps(as_released(model.cfg)))
    save_file(tensors, released / "model.safetensors")
    names = sorted(tensors)
    index = {name: f"part-{k % 2}.safetensors" for k, name in enumerate(names)}
    for k in range(2):
        save_file({name: tensors[name] for name in names[k::2]}, shards / f"part-{k}.safetensors")
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    decoder = vae.VAE(vae.PRESETS["micro"])
    about = weights.vae_metadata(decoder)
    weights.write_weights(folder / "vae.safetensors", decoder.state_dict(), about)
    torch.save({"state_dict": {"a": torch.ones(9), "b": torch.zeros(3)}}, folder / "torch.pt")

    code = functools.partial(spoil_torch, mark=folder / "mark")
    load = functools.partial
    return [
        (ours, spoil_safetensors, load(weights.load, ours)),
        (released / "model.safetensors", spoil_safetensors, load(weights.load, released)),
        (released / "config.json", spoil_json, load(weights.load, released)),
        (shards / "model.safetensors.index.json", spoil_json, load(weights.load, shards)),
        (shards / "part-1.safetensors", spoil_safetensors, load(weights.load, shards)),
        (
            folder / "vae.safetensors",
            spoil_safetensors,
            load(weights.load_vae, folder / "vae.safetensors"),
        ),
        (folder / "torch.pt", code, load(weights.read_weights, folder / "torch.pt")),
        *make_run(folder / "run", code),
    ]


def make_run(folder: Path, code: Callable) -> list[Attempt]:
    """What train.py leaves behind, and what going on from it reads."""
    model = moe.build("micro")
    params = list(model.parameters())
    averages = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    said = {"step": 3, "stage": "base"}
    checkpoint.save(folder, said, {"model": model}, averages, [optimizer])
    place = folder / "ckpt/000003"

    def restore() -> None:
        checkpoint.restore(folder, {"model": model}, averages, [optimizer])

    return [
        (folder / "latest", spoil_bytes, restore),
        (place / "model.safetensors", spoil_safetensors, restore),
        (place / "train_state.pt", code, restore),
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_spoiled_weight_files(tmp_path: Path) -> None:
    rng = random.Random(0)
    attempts = make_weights(tmp_path)
    names = {file.name for file, *_ in attempts} | {"part-", "ema.safetensors"}
    count = 0
    for k in range(1000):
        file, spoil, read = attempts[k % len(attempts)]
        good = file.read_bytes()
        file.write_bytes(spoil(rng, good))
        count += refused(read, *names)
        file.write_bytes(good)
    assert not (tmp_path / "mark").exists(), "code of a pickle was run"
    assert count > 600
    for _, _, read in attempts:  # the same files, unspoiled
        read()


# ---- episodes ----------------------------------------------------------------------------------------------


def spoil_folder(rng: random.Random, folder: Path, files: list[str]) -> None:
    """One file: its bytes, its words, its absence, or what stands in its place."""
    name = rng.choice(files)
    file = folder / name
    if rng.random() < 0.1:
        file.unlink()
        stand_in = rng.choice(
            [os.mkfifo, os.mkdir, functools.partial(os.symlink, "/dev/zero"), str]
        )
        stand_in(file)
        return
    good = file.read_bytes()
    if name.endswith(".json"):
        file.write_bytes(spoil_json(rng, good))
    elif name.endswith(".jsonl"):
        file.write_bytes(spoil_lines(rng, good))
    elif name.endswith(".safetensors"):
        file.write_bytes(spoil_safetensors(rng, good))
    else:
        file.write_bytes(spoil_bytes(rng, good, rng.choice([0, 200])))


def sign(folder: Path) -> None:
    """As whoever made the folder can."""
    meta = folder / "meta.json"
    done = folder / "_DONE"
    if meta.is_file() and done.is_file():
        done.write_text(episode.sha256_of(meta))


def use(folder: Path) -> None:
    """All that is done with a clip: it is checked, judged, filmed."""
    clip = episode.read_episode(folder)
    episode.inspect(folder, hashes=True)
    episode.filters(clip)
    data.view(clip, folder / "view.mp4", 64)


@pytest.mark.slow
def test_three_hundred_spoiled_episodes(tmp_path: Path) -> None:
    rng = random.Random(1)
    cfg = data.DataConfig(size=32, frames=9)
    clips = []
    for split in ("train", "third"):
        clip = data.render_episode(cfg, split, 0)
        clips.append(episode.write_episode(tmp_path / split, clip))
    files = [*episode.FILES, "_DONE"] + ["meta.json"] * 6 + [episode.WORDS] * 2
    count = 0
    for k in range(300):
        clip = Path(shutil.copytree(clips[k % 2], tmp_path / "clip"))
        spoil_folder(rng, clip, files)
        if rng.random() < 0.7:
            sign(clip)
        count += refused(functools.partial(use, clip), str(clip))
        shutil.rmtree(clip)
    assert count > 150


# ---- sessions ----------------------------------------------------------------------------------------------

FAKE = ("--fake", "--size", "32x32", "--no-open")


def make_cut_off(folder: Path) -> None:
    """A recording that was never ended."""
    player = Player(arguments(*FAKE, "--out", str(folder)), 40, can_undo=False)
    player.open()
    for chord in ("w", "w+l", "s"):
        act(player, chord)
    player.recording.wait()
    player.recording.abandon()


def recover(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """It is completed, or a line says why not."""
    folders.recover(str(folder))
    said = capsys.readouterr().out.splitlines()
    for line in said:
        if "cut off" in line:
            check_line(line, str(folder))


@pytest.mark.slow
def test_three_hundred_spoiled_sessions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = random.Random(2)
    whole = tmp_path / "good/whole"
    cut = tmp_path / "good/cut"
    main(tmp_path, *FAKE, "--actions", "w:4, w+l:4", "--out", str(whole))
    make_cut_off(cut)
    there = tmp_path / "there"
    again = str(tmp_path / "again")
    walks = {
        "replay": lambda: main(tmp_path, "--replay", str(there), "--out", again),
        "go on": lambda: main(tmp_path, *FAKE, "--actions", "w:4", "--out", str(there)),
        "recover": lambda: recover(there, capsys),
    }
    said = ["session.json"] * 6 + ["start.png"]
    files = {
        "replay": said,
        "go on": [*said, "state.safetensors", "state.safetensors", "meta.json", "rgb/video.npy"],
        "recover": ["session.jsonl"] * 6 + [file.name for file in cut.iterdir()],
    }
    counts = dict.fromkeys(walks, 0)
    for k in range(300):
        name = [*walks][k % 3]
        shutil.copytree(cut if name == "recover" else whole, there)
        spoil_folder(rng, there, files[name])
        counts[name] += refused(walks[name], str(there), "start.png", "state.safetensors")
        for path in tmp_path.glob("[ta]*"):
            shutil.rmtree(path)
    assert counts["replay"] > 50 and counts["go on"] > 40


# ---- requests ----------------------------------------------------------------------------------------------


def a_body(rng: random.Random, viewer: str) -> bytes:
    """What the page would post, spoiled or not, or anything."""
    said = {"id": viewer, "keys": ["w", "l"], "dx": 3, "dy": -2, "shown": 5}
    names = [*"pause step undo memory view pace prompt run image seed record".split()]
    command = {"id": viewer, "cmd": rng.choice(names), "plan": ["w", "w+l"], "text": "a place"}
    command["data"] = rng.choice(["", "bm8gcGljdHVyZQ==", "%%"])
    body = rng.choice([said, command])
    deed = rng.random()
    if deed < 0.2:
        return json.dumps(body).encode()
    if deed < 0.8:
        return spoil_json(rng, json.dumps(body).encode())
    return rng.randbytes(rng.randint(0, 300))


def a_request(rng: random.Random, viewer: str, port: int) -> bytes:
    """Good in most parts, odd in some, and cut off now and then."""
    odd = [
        b"/%00",
        b"//",
        b"*",
        b"/../../etc/passwd",
        b"http://x/",
        b"/\xff\xfe",
        b"/" + b"a" * 70_000,
    ]
    path = rng.choice([b"/", b"/input", b"/cmd", b"/state", b"/frames", b"/input?token=%ff", *odd])
    method = rng.choice(
        [b"GET", b"POST", b"POST", b"POST", b"PUT", b"HEAD", b"TRACE", b"\x00", b""]
    )
    version = rng.choice([b" HTTP/1.1"] * 8 + [b" HTTP/1.0", b" HTTP/9", b"", b" HTTP/1.1 x"])
    body = a_body(rng, viewer)
    length = rng.choice([len(body)] * 6 + [0, -5, "abc", "1" * 30, "", "١", 9_000_000])
    host = rng.choice([f"127.0.0.1:{port}"] * 8 + ["evil.example", "", "[::1]", "localhost:x"])
    lines = [method + b" " + path + version, f"Host: {host}".encode()]
    lines.append(f"Content-Length: {length}".encode())
    extra = [
        b"Origin: null",
        b"Sec-Fetch-Site: cross-site",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b"Connection: keep-alive",
        b": nothing",
        b"no colon",
        b"X: " + b"y" * 70_000,
        b"\r\n".join(b"A%d: b" % k for k in range(150)),
        b"Content-Length: 3",
    ]
    lines += rng.sample(extra, rng.choice([0, 0, 0, 1, 2]))
    request = b"\r\n".join(lines) + b"\r\n\r\n" + body
    return request[: rng.randrange(len(request))] if rng.random() < 0.1 else request


def ask_oddly(rng: random.Random, server: object, request: bytes) -> None:
    """An answer of HTTP or none; whoever asks hangs up early now and then."""
    address = ("127.0.0.1", server.server_port)
    early = rng.random() < 0.1
    answer = b""
    with socket.create_connection(address, SECONDS) as client:
        # a server that has heard enough closes while we still speak
        with contextlib.suppress(ConnectionError):
            client.sendall(request)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while not early and len(answer) < STREAM:
                part = client.recv(65536)
                answer += part
                early = not part
    if answer:
        assert b" 500 " not in answer.splitlines()[0]


def draw_all(viewer: Viewer) -> None:
    """A page that looks on until the end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        while True:
            viewer.record()


@pytest.mark.slow
def test_ten_thousand_odd_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    wrong = []
    monkeypatch.setattr(threading, "excepthook", wrong.append)
    with page(tmp_path, "--size", "32x32") as (player, server):
        monkeypatch.setattr(server, "handle_error", lambda *_: wrong.append(repr(_)))
        viewer = Viewer(server)
        threading.Thread(target=draw_all, args=[viewer], daemon=True).start()
        for _ in range(10_000):
            request = a_request(rng, viewer.hello["id"], server.server_port)
            with within(SECONDS):
                ask_oddly(rng, server, request)
        assert not wrong
        assert player.is_alive() and not player.failed
        assert len(player.screen.notes) <= 32 and player.commands.qsize() <= 16

        # nothing is held by anybody but the one who looks
        wait_for(lambda: server.slots._value >= SLOTS - 1, 60)
        assert ask(server, "GET", "/state")[0] == 200
        viewer.close()
