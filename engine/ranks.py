"""N ranks denoise, one decodes: how they meet, speak and fail.

Three channels, none of which can carry code:

    orders     rank 0  ->  all who read a box     the store: JSON text, signed       post, Inbox
    tensors    rank 0  ->  whoever got the order  send, in the order they are named  send_all
    answers    rank N  ->  rank 0                 send of a JSON text, then tensors  answer, ask

    box "denoise" is read by ranks 1 .. N−1, box "decode" by rank N. Rank 0 does what it posts itself.

The store listens on the loopback address alone, and gloo with it. Whoever else can reach that address cannot
sign: the key is drawn at every start and handed to the ranks when they are spawned.
"""

import contextlib
import hashlib
import hmac
import json
import multiprocessing
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
FOR_EVER = timedelta(days=7)  # players pause
MEET_WITHIN = timedelta(seconds=120)  # to connect to the store
KEPT_ORDERS = 8  # older ones are deleted from the store


def open_store() -> dist.TCPStore:
    """A meeting point for the processes of this machine."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=MEET_WITHIN,
        master_listen_fd=listener.detach(),
    )


def join_store(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=MEET_WITHIN)


def new_key() -> bytes:
    return secrets.token_bytes(32)


def end_with_parent() -> None:
    """A rank whose parent is gone ends, whatever it waits for."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- messages ------------------------------------------------------------------------------------


def pack(value: object, tensors: list[Tensor]) -> object:
    """A value as JSON can say it; its tensors are appended to the list and leave their dtype and shape."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, dict):
        return {"dict": {name: pack(part, tensors) for name, part in value.items()}}
    if isinstance(value, list | tuple):
        return [pack(part, tensors) for part in value]
    return value


def unpack(message: object, tensors: Iterator[Tensor]) -> object:
    """The other way round; lists stay lists."""
    if isinstance(message, list):
        return [unpack(part, tensors) for part in message]
    if isinstance(message, dict) and "tensor" in message:
        return next(tensors)
    if isinstance(message, dict):
        return {name: unpack(part, tensors) for name, part in message["dict"].items()}
    return message


def shapes_in(message: object) -> list[Tensor]:
    """Empty tensors for all that a message announces, in the order in which they are sent."""
    if isinstance(message, list):
        return [x for part in message for x in shapes_in(part)]
    if isinstance(message, dict) and "tensor" in message:
        dtype, shape = message["tensor"]
        return [torch.empty(shape, dtype=getattr(torch, dtype))]
    if isinstance(message, dict):
        return [x for part in message["dict"].values() for x in shapes_in(part)]
    return []


def send_all(tensors: Sequence[Tensor], to: int) -> None:
    for x in tensors:
        if x.numel():
            dist.send(x.cpu().contiguous(), to)


def receive_all(message: object, source: int) -> object:
    """What a message means, once its tensors have come."""
    tensors = shapes_in(message)
    for x in tensors:
        if x.numel():
            dist.recv(x, source)
    return unpack(message, iter(tensors))


def signature(key: bytes, place: str, text: str) -> str:
    """Binds a text to its place in its box: an old order cannot be played again."""
    return hmac.new(key, f"{place} {text}".encode(), hashlib.sha256).hexdigest()


class Inbox:
    """The orders of one box, as they come: (name, arguments)."""

    def __init__(self, store: dist.Store, box: str, key: bytes, allowed: Sequence[str]):
        self.store = store
        self.box = box
        self.key = key
        self.allowed = allowed
        self.read = 0

    def next(self) -> tuple[str, list]:
        self.read += 1
        place = f"{self.box}{self.read}"
        signed, _, text = self.store.get(place).decode(errors="replace").partition(" ")
        if not hmac.compare_digest(signed.encode(), signature(self.key, place, text).encode()):
            raise ValueError(f"order {place} is not signed by rank 0: somebody else wrote it")
        name, message = json.loads(text)
        if name not in self.allowed:
            raise ValueError(f"unknown order {name!r}; known are {', '.join(self.allowed)}")
        return name, receive_all(message, 0)


def answer(value: object, to: int = 0) -> None:
    """From the decoding rank to rank 0: the length of a JSON text, the text, its tensors."""
    tensors: list[Tensor] = []
    text = json.dumps(pack(value, tensors)).encode()
    dist.send(torch.tensor([len(text)]), to)
    dist.send(torch.tensor(list(text), dtype=torch.uint8), to)
    send_all(tensors, to)


def hear(source: int) -> object:
    """What answer() sent."""
    length = torch.empty(1, dtype=torch.long)
    dist.recv(length, source)
    text = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(text, source)
    return receive_all(json.loads(bytes(text.tolist())), source)


# ---- who says it ---------------------------------------------------------------------------------


def fingerprint(options: object, model: nn.Module | None) -> dict[str, str]:
    """What all ranks must agree on: otherwise their frames would silently differ."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("engine/*.py")])
    code = "".join(path.read_text() for path in files)
    facts = {
        "code": hashlib.sha256(code.encode()).hexdigest(),
        "options": json.dumps(asdict(replace(options, device="", threads=0))),
    }
    if model:
        samples = [p.flatten()[::97].double() for p in model.state_dict().values()]
        sums = [f"{x.abs().sum():.6g}" for x in samples]
        facts["weights"] = hashlib.sha256(" ".join(sums).encode()).hexdigest()
    return facts


class Team:
    """Ranks 0 .. N−1 denoise, rank N decodes.

    They meet once all have loaded and have the same code, options and weights. Players pause, so
    orders may take for ever; everything else has a deadline.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: dist.Store,
        options: object,
        model: nn.Module | None,
        key: bytes,
        crew: Sequence = (),
    ):
        self.last = world - 1
        self.store = store
        self.key = key
        self.crew = crew
        self.posted = {"denoise": 0, "decode": 0}
        self.readers = {"denoise": range(1, self.last), "decode": [self.last]}
        self.meet(rank, world, fingerprint(options, model))

        store.set_timeout(FOR_EVER)
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        deadline = timedelta(seconds=options.patience * (30 if options.compile else 1))
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", store),
            rank=rank,
            world_size=world,
            timeout=deadline,
        )
        backend = "nccl" if "cuda" in options.device else "gloo"
        self.group = dist.new_group(list(range(self.last)), timeout=deadline, backend=backend)
        self.decode = partial(self.ask, "decode")
        self.dump = partial(self.ask, "dump")
        self.load = partial(self.ask, "load")
        self.undo = partial(self.ask, "undo")

    def meet(self, rank: int, world: int, mine: dict[str, str]) -> None:
        """Wait until everybody has loaded, and compare."""
        self.store.set(f"facts{rank}", json.dumps(mine))
        keys = [f"facts{r}" for r in range(world)]
        while not self.store.check(keys):
            if self.failure() or not all(process.is_alive() for process in self.crew):
                raise RuntimeError(self.failure() or "a rank died while starting; see above")
            time.sleep(0.05)
        first, *others = (json.loads(self.store.get(key)) for key in keys)
        wrong = [
            f"rank {r} differs from rank 0 in its {what}"
            for r, them in enumerate(others, 1)
            for what in them
            if them[what] != first[what]
        ]
        if wrong:
            raise ValueError(
                f"{'; '.join(wrong)}. Start all ranks from one folder, with the same options and weights"
            )

    def failure(self) -> str:
        """The last words of a rank that failed."""
        return self.store.get("failed").decode() if self.store.check(["failed"]) else ""

    def post(self, box: str, name: str, *args: object) -> None:
        """Rank 0: an order for all who read this box, whenever they come to it."""
        tensors: list[Tensor] = []
        text = json.dumps([name, pack(args, tensors)])
        self.posted[box] += 1
        k = self.posted[box]
        self.store.set(f"{box}{k}", f"{signature(self.key, f'{box}{k}', text)} {text}")
        self.store.delete_key(f"{box}{k - KEPT_ORDERS}")
        for reader in self.readers[box]:
            send_all(tensors, reader)

    def ask(self, name: str, *args: object) -> object:
        """Rank 0: call a method of the decoder on the last rank."""
        with self.guarded("decoder"):
            self.post("decode", name, *args)
            return hear(self.last)

    @contextlib.contextmanager
    def guarded(self, who: str) -> Iterator[None]:
        """On rank 0: a broken connection is reported as what broke it, and nobody is left behind."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            time.sleep(1)  # for the last words of others
            dead = [
                f"rank {r} died" for r, process in enumerate(self.crew, 1) if not process.is_alive()
            ]
            reason = self.failure() or ", ".join(dead)
            for process in self.crew:
                process.kill()
            cause = str(error).splitlines()[0].split("] ")[-1]
            raise RuntimeError(reason or f"a {who} died or stalled ({cause})") from None
