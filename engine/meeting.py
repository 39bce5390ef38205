"""Where the ranks of a session meet, who may come, and how they know that the others live.

                     on one host                          on several, one torchrun on each
    started by       rank 0, which spawns the others      torchrun: every process is one rank
    they meet at     127.0.0.1, a free port               MASTER_ADDR, MASTER_PORT + 1
    the key          drawn, handed to whoever is spawned  made of a secret that the operator shares
    a death is seen  the system tells rank 0              no beat for LOST seconds, or a closed line

torchrun starts all ranks at one moment, so whoever has come may expect the others soon: who needs
more than twice as long (to_come) has died before it was heard of. Nothing listens on an address
that nobody named. Under torchrun on one host rank 0 still spawns the others: a key that never
leaves a family of processes needs nobody's care.
"""

import hashlib
import hmac
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

LOOPBACK = "127.0.0.1"
MEET_WITHIN = timedelta(seconds=120)  # to be told what to do, once connected
BEAT = 0.5  # seconds between two signs of life
LOST = 5.0  # seconds without one until a rank of another host counts as dead
LONGER = 3.0  # seconds that one host may take to start beyond twice the time of another
SHORTEST = 16  # characters of a secret
NO_SECRET = (
    "ranks on several hosts share a secret, and there is none of {0} characters or more: set "
    "MATRIX_GAME_SECRET, or MATRIX_GAME_SECRET_FILE to a file with it, on every host; "
    "openssl rand -hex 32 makes one"
)
NOT_COME = (
    "{0} within {1:.0f} s: see what torchrun says there; if that host only starts slowly, "
    "let it: MATRIX_GAME_PATIENCE=120 on every host"
)
GONE = ("connection", "gloo", "nccl", "died")  # words of torch's errors when another rank is gone
SIOCGIFADDR = 0x8915  # Linux: the address of a network interface


def says_rank_is_gone(error: BaseException | None) -> bool:
    """Whether an error only means that another rank has ended."""
    words = str(error).lower()
    torn = isinstance(error, RuntimeError) and any(word in words for word in GONE)
    return torn or isinstance(error, ConnectionError)


class Place(NamedTuple):
    """One rank's: who it is, where all meet, and what orders are signed with."""

    rank: int
    world: int
    address: str
    port: int  # 0: any free one
    key: bytes
    apart: bool = False  # on several hosts: nobody has spawned anybody

    def open(self) -> dist.TCPStore:
        """Rank 0: the store, at this address alone."""
        try:
            listener = socket.create_server((self.address, self.port))
        except OSError as error:
            raise ValueError(
                f"rank 0 cannot listen at {self.address}:{self.port} ({error.strerror}): MASTER_ADDR "
                "must be an address of its host, and the port behind MASTER_PORT free"
            ) from error
        port = listener.getsockname()[1]
        return dist.TCPStore(
            self.address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=MEET_WITHIN,
            master_listen_fd=listener.detach(),
        )

    def join(self) -> dist.TCPStore:
        """Everybody else."""
        seconds = to_come()
        within = timedelta(seconds=seconds)
        try:
            store = dist.TCPStore(self.address, self.port, is_master=False, timeout=within)
        except dist.DistError as error:
            nobody = f"rank {self.rank} met nobody at {self.address}:{self.port}"
            firewall = "does a firewall keep rank 0 from listening?"
            raise ConnectionError(f"{NOT_COME.format(nobody, seconds)}; {firewall}") from error
        store.set_timeout(MEET_WITHIN)
        return store

    def with_session_key(self, store: dist.Store) -> "Place":
        """A secret serves many sessions; an order of one of them means nothing in the next."""
        if self.rank == 0:
            store.set("session", secrets.token_hex(32))
        return self._replace(key=hmac.digest(self.key, store.get("session"), "sha256"))

    def sign(self, name: str, text: str) -> str:
        """A text with a signature that binds it to its name: it cannot be played again elsewhere."""
        return f"{signature(self.key, name, text)} {text}"

    def checked(self, name: str, signed: bytes) -> str:
        """What was signed; nothing else is read."""
        given, _, text = signed.decode(errors="replace").partition(" ")
        if not hmac.compare_digest(given.encode(), signature(self.key, name, text).encode()):
            raise ValueError(f"{name} is not signed with our key: a stranger, or another secret")
        return text


def signature(key: bytes, name: str, text: str) -> str:
    return hmac.new(key, f"{name} {text}".encode(), hashlib.sha256).hexdigest()


# ---- one host or several -----------------------------------------------------------------------------------


def started() -> int:
    """Processes that torchrun has started, on all hosts."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Rank 0 plays; whatever else torchrun has started helps."""
    return int(os.environ.get("RANK", 0)) == 0


def apart() -> bool:
    """Are some of them on other hosts?"""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < started()


def named() -> Place:
    """This process among several hosts, as torchrun names it."""
    to_come()  # or a line that says what is wrong with it
    return Place(
        rank=int(os.environ["RANK"]),
        world=started(),
        address=socket.gethostbyname(os.environ.get("MASTER_ADDR", LOOPBACK)),
        port=int(os.environ.get("MASTER_PORT", 29500)) + 1,  # the first is torchrun's own
        key=shared_secret(),
        apart=True,
    )


def shared_secret() -> bytes:
    """What the operator gave to all hosts."""
    text = os.environ.get("MATRIX_GAME_SECRET", "")
    file = os.environ.get("MATRIX_GAME_SECRET_FILE", "")
    if file:
        text = Path(file).read_text().strip()
    if len(text) < SHORTEST:
        raise ValueError(NO_SECRET.format(SHORTEST))
    return text.encode()


def use_interface(place: Place) -> None:
    """Tensors take the way that orders take; GLOO_SOCKET_IFNAME of the operator goes first."""
    name = "lo0" if sys.platform == "darwin" else "lo"
    if not place.address.startswith("127."):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((place.address, 1))  # sends nothing
            ours = probe.getsockname()[0]
        name = interfaces().get(ours, "")
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interfaces() -> dict[str, str]:
    """IPv4 address -> name of the network interface that has it; empty where the system cannot say."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                import fcntl

                request = struct.pack("256s", name.encode())
                address = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]
            except (ImportError, OSError):
                continue
            found[socket.inet_ntoa(address)] = name
    return found


# ---- who is alive ------------------------------------------------------------------------------------------


def age(pid: int | str = "self") -> float:
    """Seconds since a process was started."""
    try:
        began = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux: wait long rather than too short
        return MEET_WITHIN.seconds


def to_come() -> float:
    """Seconds until those who were started when this process was have come, or never will."""
    asked = os.environ.get("MATRIX_GAME_PATIENCE", "")
    if not asked:
        return min(max(age(), LOST) + LONGER, MEET_WITHIN.seconds)
    if not asked.isdecimal():
        raise ValueError(f"MATRIX_GAME_PATIENCE must be whole seconds, got {asked!r}")
    return float(asked)


def keep_beating(place: Place) -> threading.Event:
    """A rank of another host says that it lives, and ends with rank 0 or with the torchrun above it.

    Unless it has set the event: then it ends in good order.
    """
    done = threading.Event()
    store = place.join()  # a line of its own: the other one may wait for an order
    parent = os.getppid()

    def beat() -> None:
        while os.getppid() == parent and not done.is_set():
            try:
                store.add(f"beat{place.rank}", 1)
                if store.check(["failed"]):
                    break
            except RuntimeError:  # rank 0 is gone, and its store with it
                break
            time.sleep(BEAT)
        if not done.is_set():
            os._exit(1)

    threading.Thread(target=beat, daemon=True).start()
    return done


class Beats:
    """Rank 0: which ranks of other hosts have not been heard of."""

    def __init__(self, store: dist.Store) -> None:
        self.store = store
        self.to_come = to_come()
        self.heard: dict[int, tuple[int, float]] = {}  # of rank: its count, and when that was new

    def dead(self, ranks: range) -> list[str]:
        """What is to be said of the ranks that are silent; who has not come is waited for longer."""
        now = time.monotonic()
        silent = []
        for rank in ranks:
            count = self.store.add(f"beat{rank}", 0)
            before, since = self.heard.setdefault(rank, (0, now))
            if count != before:
                self.heard[rank] = (count, now)
            elif count and now - since > LOST:
                silent.append(f"rank {rank} died")
            elif not count and now - since > self.to_come:
                silent.append(NOT_COME.format(f"rank {rank} has not come", self.to_come))
        return silent


def when_left_alone(then: Callable[[], None]) -> None:
    """Call this once the torchrun that started this process is gone: killed, it can end nobody."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(BEAT)
        then()

    threading.Thread(target=watch, daemon=True).start()
