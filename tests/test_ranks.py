"""Ranks make the frames of one process, and listen to nobody else.

And never left hanging: whatever happens to one of them, all end within seconds.
"""

import contextlib
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe
import realtime
from engine import meeting, parts, ranks
from engine.meeting import Place

OPTIONS = parts.Options(preset="micro", weights="random", device="cpu", dtype="float32")
IMAGE = torch.randint(
    0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
HERE = Place(0, 3, meeting.LOOPBACK, 0, b"key")


def actions(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    keyboard = torch.randint(0, 2, (n, 6), generator=g).float()
    return keyboard, 0.1 * torch.randn(n, 2, generator=g)


def walk(session: realtime.Session, segments: int, first: int = 0) -> list[realtime.Chunk]:
    return [
        session.step(*actions(session.frames_needed, k)) for k in range(first, first + segments)
    ]


@pytest.fixture(scope="module")
def session() -> realtime.Session:
    return realtime.Session(OPTIONS)


@pytest.fixture(scope="module")
def three(session: realtime.Session) -> list[realtime.Chunk]:
    session.reset(IMAGE)
    return walk(session, 3)


def pixels(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


# ---- on one host -------------------------------------------------------------------------------------------


def test_two_denoisers_and_a_decoder_make_the_frames_of_one_process(
    three: list[realtime.Chunk], session: realtime.Session, tmp_path: Path
) -> None:
    session.reset(IMAGE)
    walk(session, 3)
    ranks = realtime.open_session(replace(OPTIONS, threads=1, patience=200.0), 2)
    ranks.reset(IMAGE)
    for k in range(2):
        ranks.submit(*actions(ranks.frames_needed, k))
    chunks = [ranks.collect(), ranks.collect()]
    ranks.save(tmp_path / "ranks.safetensors")
    chunks += walk(ranks, 1, 2)
    mine, right = ranks.denoiser.now.past, session.denoiser.now.past
    assert (mine - right).norm() / right.norm() < 1e-4
    assert all(pixels(a.frames, b.frames) <= 1 for a, b in zip(chunks, three, strict=True))
    ranks.undo()
    assert torch.equal(walk(ranks, 1, 2)[0].frames, chunks[2].frames)
    ranks.restore(tmp_path / "ranks.safetensors")
    assert torch.equal(walk(ranks, 1, 2)[0].frames, chunks[2].frames)
    # a rank that fails is named, and nobody is left behind
    ranks.team.post("denoise", "nonsense")
    with pytest.raises(
        ConnectionError, match=r"rank 1 \(denoise\) failed: ValueError: unknown order 'nonsense'"
    ):
        walk(ranks, 2, 3)
    ranks.close()
    for process in ranks.team.crew:
        process.wait(20)
    assert (
        all(process.poll() is not None for process in ranks.team.crew) and not dist.is_initialized()
    )


@pytest.mark.slow
def test_eight_denoisers_and_a_decoder_make_the_frames_of_one_process(
    three: list[realtime.Chunk], session: realtime.Session
) -> None:
    """Slow: nine processes import torch. As published, 8 + 1; two heads and 16 places among eight."""
    session.reset(IMAGE)
    walk(session, 2)
    ranks = realtime.open_session(replace(OPTIONS, threads=1, patience=200.0), 8)
    ranks.reset(IMAGE)
    chunks = walk(ranks, 2)
    mine, right = ranks.denoiser.now.past, session.denoiser.now.past
    ranks.close()
    assert (mine - right).norm() / right.norm() < 1e-4
    assert all(pixels(a.frames, b.frames) <= 1 for a, b in zip(chunks, three, strict=False))
    for process in ranks.team.crew:
        process.wait(20)
    assert all(process.poll() is not None for process in ranks.team.crew)


def test_a_killed_decoder_ends_all_ranks_within_seconds(three: list[realtime.Chunk]) -> None:
    ranks = realtime.open_session(replace(OPTIONS, threads=1, patience=200.0), 1)
    ranks.reset(IMAGE)
    assert torch.equal(walk(ranks, 1)[0].frames, three[0].frames)  # 1 + 1 is exact
    os.kill(ranks.team.crew[0].pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="rank 1 died"):
        walk(ranks, 1, 1)
    assert time.monotonic() - began < 10
    ranks.close()
    assert not dist.is_initialized()


@pytest.mark.slow
def test_a_stalled_denoiser_ends_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow: waits for the deadline."""
    ranks = realtime.open_session(replace(OPTIONS, threads=1), 2)
    ranks.reset(IMAGE)
    walk(ranks, 1)
    os.kill(ranks.team.crew[0].pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="denoiser died or stalled"):
        walk(ranks, 1, 1)
    assert time.monotonic() - began < 30
    ranks.close()
    for process in ranks.team.crew:
        process.wait(5)
    assert all(process.poll() is not None for process in ranks.team.crew)


def test_ranks_with_other_options_or_weights_are_named() -> None:
    store, said = dist.HashStore(), []

    def join(rank: int, options: parts.Options, shift: float) -> None:
        model = moe.build("micro")
        torch.nn.init.constant_(model.head.head.bias, shift)
        for p in list(model.parameters())[:-1]:
            torch.nn.init.ones_(p)
        try:
            place = HERE._replace(rank=rank)
            ranks.Team(place, store, options, model if rank < 2 else None)
        except ValueError as error:
            said.append(str(error))

    threads = [
        threading.Thread(target=join, args=(r, o, b))
        for r, o, b in ((0, OPTIONS, 0.0), (1, OPTIONS, 1.0), (2, replace(OPTIONS, steps=4), 0.0))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(said)) == 1 and len(said) == 3
    assert (
        "rank 1 differs from rank 0 in its weights; rank 2 differs from rank 0 in its options"
        in said[0]
    )


class Evil:
    """What a pickle does when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def listening(pids: set[int]) -> set[str]:
    """Local addresses, in the kernel's hexadecimal, on which these processes wait for connections."""
    sockets = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(entry).removeprefix("socket:[").rstrip("]"))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in sockets:
                found.add(columns[1].split(":")[0])
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_ranks_meet_on_this_machine_alone_and_obey_nobody_but_rank_0(tmp_path: Path) -> None:
    team = realtime.open_session(replace(OPTIONS, threads=1, patience=200.0), 1)
    assert listening({os.getpid(), team.team.crew[0].pid}) <= LOOPBACK
    team.reset(IMAGE)

    # a stranger on this machine who found the port writes the next order
    marker = tmp_path / "executed"
    stranger = team.team.place.join()
    number = team.team.posted["decode"] + 1
    stranger.set(f"decode{number}", pickle.dumps(Evil(marker)))
    team.team.crew[0].wait(20)
    assert not marker.exists()
    assert "is not signed with our key" in ranks.last_words(stranger)
    team.close()


def test_orders_are_signed_for_their_place_and_say_only_what_json_can() -> None:
    order = {"x": torch.ones(2, 3), "names": ["a", 1, None], "none": torch.zeros(0)}
    tensors: list[Tensor] = []
    text = json.dumps(ranks.pack(order, tensors))
    said = json.loads(text)
    assert [x.shape for x in ranks.shapes_in(said)] == [x.shape for x in tensors]
    again = ranks.unpack(said, iter(tensors))
    assert torch.equal(again["x"], order["x"]) and again["names"] == order["names"]
    signed = HERE.sign("decode1", text)
    assert HERE.checked("decode1", signed.encode()) == text
    with pytest.raises(ValueError, match="decode2 is not signed with our key"):
        HERE.checked("decode2", signed.encode())
    with pytest.raises(ValueError, match="a stranger, or another secret"):
        HERE._replace(key=b"other").checked("decode1", signed.encode())
    with pytest.raises(TypeError):
        json.dumps(ranks.pack(Evil(Path("x")), []))


# ---- on several hosts --------------------------------------------------------------------------------------

SECRET = "open sesame, all of you"
PROGRAM = f"""
import sys; sys.path.insert(0, {str(parts.ROOT)!r})
import torch
import realtime
from engine import cli, meeting, parts
def main(argv):
    if not meeting.is_first():
        return realtime.help_out()
    options = parts.Options(**{vars(OPTIONS)!r} | {{"threads": 1, "patience": 200.0}})
    session = realtime.open_session(options, 2)
    session.reset(torch.full((64, 64, 3), 90, dtype=torch.uint8))
    for k in range(int(argv[0])):
        print(int(session.step(*realtime.walk_actions(session.frames_needed)).frames.sum()), flush=True)
    session.close()
if __name__ == "__main__":
    cli.run(main)
"""
HOSTS = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def free_port() -> int:
    """Two in a row, so that the second is what the ranks meet at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def as_hosts(folder: Path, segments: int, **more: str) -> list[subprocess.Popen]:
    """Three processes that take themselves for three hosts."""
    script = folder / "rank.py"
    script.write_text(PROGRAM)
    port = str(free_port())
    named = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MATRIX_GAME_SECRET": SECRET}
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(segments)],
            env=os.environ | HOSTS | named | more | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]


def test_ranks_of_several_hosts_make_the_frames_of_one_process(tmp_path: Path) -> None:
    alone = realtime.Session(OPTIONS)
    alone.reset(torch.full((64, 64, 3), 90, dtype=torch.uint8))
    actions = realtime.walk_actions(alone.frames_needed)
    total = int(alone.step(*actions).frames.sum())
    processes = as_hosts(tmp_path, 1)
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert int(said[0][0]) == pytest.approx(total, rel=1e-4)


def test_hosts_without_a_secret_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (HOSTS | {"RANK": "1", "MASTER_PORT": "1234"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MATRIX_GAME_SECRET", raising=False)
    with pytest.raises(ValueError, match="share a secret.*MATRIX_GAME_SECRET.*openssl") as error:
        meeting.named()
    assert "\n" not in str(error.value)
    monkeypatch.setenv("MATRIX_GAME_SECRET", "short")
    with pytest.raises(ValueError, match="16 characters"):
        meeting.named()

    (tmp_path / "secret").write_text(f"{SECRET}\n")
    monkeypatch.setenv("MATRIX_GAME_SECRET_FILE", str(tmp_path / "secret"))
    place = meeting.named()
    assert place == Place(1, 3, "127.0.0.1", 1235, SECRET.encode(), apart=True)


def test_a_secret_makes_another_key_for_every_session() -> None:
    keys = [HERE.with_session_key(dist.HashStore()).key for _ in range(2)]
    assert keys[0] != keys[1] != HERE.key
    store = dist.HashStore()
    first = HERE.with_session_key(store)
    assert HERE._replace(rank=1).with_session_key(store).key == first.key


@pytest.mark.slow
def test_a_rank_with_another_secret_ends_all(tmp_path: Path) -> None:
    """Slow: six processes import torch."""
    port = str(free_port())
    first, *rest = as_hosts(tmp_path, 1, MASTER_PORT=port)
    rest[0].kill()
    stranger = as_hosts(tmp_path, 1, MASTER_PORT=port, MATRIX_GAME_SECRET="x" * 20)
    for process in (stranger[0], stranger[2]):
        process.kill()
    _, said = first.communicate(timeout=100)
    assert first.returncode == 2 and said.count("\n") <= 2
    assert "options is not signed with our key: a stranger, or another secret" in said
    for process in (rest[1], stranger[1]):
        assert process.wait(20) == 1


def test_torchrun_on_one_host_leaves_the_others_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (HOSTS | {"RANK": "2", "LOCAL_WORLD_SIZE": "3"}).items():
        monkeypatch.setenv(name, value)
    assert not meeting.is_first() and not meeting.apart()
    assert realtime.help_out() == 0


def test_an_address_that_is_not_ours_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    place = HERE._replace(address="192.0.2.77", port=1234)
    with pytest.raises(ValueError, match="cannot listen at 192.0.2.77:1234.*MASTER_ADDR"):
        place.open()


# ---- twenty deaths -----------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"PPid:\t{pid}\n" in (path / "status").read_text():
                found += family(int(path.name))
    return found


def alive(pid: int) -> bool:
    """There, and not only waiting to be buried."""
    with contextlib.suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def all_end(pids: list[int], within: float = 10) -> None:
    deadline = time.monotonic() + within
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, f"{len(left)} of {len(pids)} ranks outlived one of them"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for orphans in Linux's /proc")
@pytest.mark.parametrize("seed", range(20))
def test_a_rank_that_is_killed_at_any_moment_ends_all(seed: int, tmp_path: Path) -> None:
    """Slow: twenty times three ranks and a decoder, killed while they start, load, meet or walk."""
    dice = random.Random(seed)
    script = tmp_path / "rank.py"
    script.write_text(PROGRAM)
    first = subprocess.Popen([sys.executable, str(script), "100000"], stdout=subprocess.DEVNULL)
    time.sleep(dice.uniform(0, 20))
    pids = family(first.pid)
    os.kill(dice.choice(pids), signal.SIGKILL)
    threading.Thread(target=first.wait, daemon=True).start()
    all_end(pids)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_rank_that_is_killed_on_one_of_several_hosts_ends_all(seed: int, tmp_path: Path) -> None:
    """Slow: nobody has started the others, so nobody is told by the system."""
    dice = random.Random(seed)
    processes = as_hosts(tmp_path, 100_000)
    assert processes[0].stdout.readline(), "never walked"  # before, nobody is missed so soon
    for process in processes:
        threading.Thread(target=process.communicate, daemon=True).start()
    time.sleep(dice.uniform(0, 3))
    dice.choice(processes).kill()
    all_end([process.pid for process in processes])
