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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from walking import IMAGE, OPTIONS, actions, pixels, walk

import moe
import realtime
from engine import meeting, parts, ranks, weights
from engine.meeting import Place

HERE = Place(0, 3, meeting.LOOPBACK, 0, b"key")


# ---- on one host -------------------------------------------------------------------------------------------


@pytest.fixture(scope="class")
def ranks_of_three() -> Iterator[realtime.Session]:
    """Two denoise, one decodes."""
    ranks = realtime.open_session(replace(OPTIONS, threads=1, patience=200.0), 2)
    yield ranks
    ranks.close()
    for process in ranks.team.crew:
        process.wait(20)
    assert not dist.is_initialized()


class TestTwoDenoisersAndADecoder:
    """One family of processes, which the last test ends."""

    def test_they_make_the_frames_of_one_process(
        self,
        ranks_of_three: realtime.Session,
        three: list[realtime.Chunk],
        session: realtime.Session,
        tmp_path: Path,
    ) -> None:
        ranks = ranks_of_three
        session.reset(IMAGE)
        walk(session, 3)
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

    def test_a_state_larger_than_a_value_of_the_store_reaches_all_of_them(
        self,
        ranks_of_three: realtime.Session,
        session: realtime.Session,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """8 MiB are all that a TCPStore takes at once: it is for orders; tensors go from rank to rank."""
        fat = tmp_path / "fat.safetensors"
        session.reset(IMAGE)
        walk(session, 2)
        session.save(fat)
        state, about = weights.read_weights(fat)
        for name, x in state.items():
            if name.startswith("bank."):  # the first latent again and again
                state[name] = torch.cat([x[:1].expand(6000, *x.shape[1:]), x])
        weights.write_weights(fat, state, about)
        assert state["bank.latents"].nbytes > 2 * 2**23

        chunks = {}
        for player in (ranks_of_three, session):
            player.restore(fat)
            assert len(player.denoiser.bank) > 6000
            monkeypatch.setattr(player, "policy", "random")  # recalled from anywhere in the bank
            chunks[player] = walk(player, 2, 2)
        for ours, right in zip(*chunks.values(), strict=True):
            assert ours.info["memory"] == right.info["memory"]
            assert pixels(ours.frames, right.frames) <= 1

    def test_one_that_fails_is_named_and_nobody_is_left_behind(
        self, ranks_of_three: realtime.Session
    ) -> None:
        ranks = ranks_of_three
        ranks.reset(IMAGE)
        ranks.team.post("denoise", "nonsense")
        failed = r"rank 1 \(denoise\) failed: ValueError: unknown order 'nonsense'"
        with pytest.raises(ConnectionError, match=failed):
            walk(ranks, 2)
        for process in ranks.team.crew:
            process.wait(20)
        assert all(process.poll() is not None for process in ranks.team.crew)


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


@pytest.mark.long
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
            ranks.Team(place, store).meet(options, model if rank < 2 else None)
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


@pytest.mark.long
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
    """One that is free, and so is the next, where the ranks meet.

    Drawn below those that systems give away by themselves, so that two runs do not meet there.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            for number in (port, port + 1):
                probes.enter_context(socket.create_server(("", number)))
            return port


def as_hosts(
    folder: Path, segments: int, started: Sequence[int] = range(3), **more: str
) -> list[subprocess.Popen]:
    """Three processes that take themselves for three hosts; or only those of them that are started."""
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
        for rank in started
    ]


def other_address() -> str:
    """One of this machine that is not 127.0.0.1; "" if there is none."""
    candidates = [a for a in meeting.interfaces() if not a.startswith("127.")]
    for address in [*candidates, "127.0.0.2"]:  # all of 127 is Linux's own
        with contextlib.suppress(OSError), socket.create_server((address, 0)):
            return address
    return ""


def in_hexadecimal(address: str) -> set[str]:
    """As the kernel lists it, of either family."""
    backwards = socket.inet_aton(address)[::-1].hex().upper()
    return {backwards, f"0000000000000000FFFF0000{backwards}"}


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
@pytest.mark.skipif(not other_address(), reason="this machine has no address but 127.0.0.1")
def test_ranks_of_several_hosts_make_the_frames_of_one_process(tmp_path: Path) -> None:
    """They meet at an address that other machines could reach, and nowhere else."""
    alone = realtime.Session(OPTIONS)
    alone.reset(torch.full((64, 64, 3), 90, dtype=torch.uint8))
    actions = realtime.walk_actions(alone.frames_needed)
    total = int(alone.step(*actions).frames.sum())

    address = other_address()
    processes = as_hosts(tmp_path, 100_000, MASTER_ADDR=address)
    said = processes[0].stdout.readline()
    assert said, processes[0].stderr.read()
    assert int(said) == pytest.approx(total, rel=1e-4)
    everywhere = {process.pid for process in processes}
    found = listening(everywhere)
    assert found & in_hexadecimal(address) and found <= in_hexadecimal(address) | LOOPBACK

    # one host goes down while they walk: nobody has started the others, and all end
    processes[1].kill()
    for process in processes:
        threading.Thread(target=process.communicate, daemon=True).start()
    all_end([process.pid for process in processes])


@pytest.fixture(scope="module")
def to_start() -> float:
    """Seconds that three processes need here and now to stand; twice that is doubted by nobody."""
    began = time.monotonic()
    command = [sys.executable, "-c", "import realtime"]
    for process in [subprocess.Popen(command, cwd=parts.ROOT) for _ in range(3)]:
        process.wait()
    return 1.25 * (time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_host_that_dies_before_it_was_heard_of_ends_all(
    dead: int, tmp_path: Path, to_start: float
) -> None:
    """Slow: the others wait until it is clear that it does not come."""
    left = [rank for rank in range(3) if rank != dead]
    processes = as_hosts(tmp_path, 1, left)
    within = 10 + 2 * to_start
    said = {rank: p.communicate(timeout=within)[1] for rank, p in zip(left, processes, strict=True)}
    assert all(process.returncode for process in processes)
    if dead:
        assert f"error: rank {dead} has not come within" in said[0]
        assert "MATRIX_GAME_PATIENCE" in said[0] and said[0].count("\n") <= 2


def test_whoever_needs_much_longer_to_start_than_we_did_is_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, now = dist.HashStore(), [1000.0]
    monkeypatch.setattr(meeting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(meeting, "age", lambda: 3.0)
    beats = meeting.Beats(store)

    def after(seconds: float, *beating: int) -> list[str]:
        now[0] += seconds
        for rank in beating:
            store.add(f"beat{rank}", 1)
        return beats.dead(range(1, 4))

    assert after(0) == [] and after(7.5, 2) == []
    assert after(0.7, 2) == [
        meeting.NOT_COME.format(f"rank {rank} has not come", 8.0) for rank in (1, 3)
    ]
    assert after(5.5, 1, 3) == ["rank 2 died"], "who has come is missed sooner"

    # all of them need as long on a slow disk, and an operator may know better
    monkeypatch.setattr(meeting, "age", lambda: 40.0)
    assert meeting.to_come() == 43
    monkeypatch.setenv("MATRIX_GAME_PATIENCE", "70")
    assert meeting.Beats(store).to_come == 70
    monkeypatch.setenv("MATRIX_GAME_PATIENCE", "long")
    with pytest.raises(ValueError, match="MATRIX_GAME_PATIENCE must be whole seconds, got 'long'"):
        meeting.to_come()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux")
def test_the_age_of_a_process_is_known() -> None:
    time.sleep(0.1)
    child = subprocess.Popen(["sleep", "60"])
    young = meeting.age(child.pid)
    time.sleep(0.5)
    assert 0.4 < meeting.age(child.pid) - young < 20
    assert meeting.age() > meeting.age(child.pid) + 0.1
    child.kill()
    child.wait()


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


@pytest.mark.parametrize("hosts", [1, 3])
def test_a_mistyped_patience_is_refused_before_anything_is_started(
    hosts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hosts > 1:
        named = {"MASTER_PORT": "1234", "MATRIX_GAME_SECRET": SECRET, "RANK": "0"}
        for name, value in (HOSTS | named).items():
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("MATRIX_GAME_PATIENCE", "2 minutes")

    def opened(place: Place) -> None:
        pytest.fail("the others are waited for")

    monkeypatch.setattr(Place, "open", opened)
    with pytest.raises(ValueError, match="must be whole seconds, got '2 minutes'") as error:
        realtime.open_session(OPTIONS, 2)
    assert "\n" not in str(error.value)
    if hosts > 1:
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(ValueError, match="must be whole seconds"):
            realtime.help_out()


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
def test_a_rank_that_is_killed_on_one_of_several_hosts_ends_all(
    seed: int, tmp_path: Path, to_start: float
) -> None:
    """Slow: nobody has started the others, so nobody is told by the system."""
    dice = random.Random(seed)
    processes = as_hosts(tmp_path, 100_000)
    for process in processes:
        threading.Thread(target=process.communicate, daemon=True).start()
    after = dice.uniform(0, 3 * to_start)
    time.sleep(after)
    dice.choice(processes).kill()
    # before all were heard of, who is missed may still be starting
    all_end([process.pid for process in processes], 10 + max(0, 2 * to_start - after))
