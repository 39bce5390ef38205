"""N ranks denoise, one decodes: how they speak, agree and fail.

They meet as engine/meeting.py says. Three channels, none of which can carry code:

    orders     rank 0  ->  all who read a box     the store: JSON text, signed       post, Inbox
    tensors    rank 0  ->  whoever got the order  send, in the order they are named  send_all
    answers    rank N  ->  rank 0                 send of a JSON text, then tensors  answer, ask

    box "denoise" is read by ranks 1 .. N−1, box "decode" by rank N. Rank 0 does what it posts
    itself.

Whoever else can reach the store cannot sign, and what is not signed is not read. A rank that dies
ends all within seconds: rank 0 watches, tells the others, and its next call, or the one that it
waits in, raises.
"""

import contextlib
import hashlib
import json
import os
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
from torch.distributed.distributed_c10d import _set_pg_timeout

from engine import meeting
from engine.meeting import Place

ROOT = Path(__file__).resolve().parents[1]
FOR_EVER = timedelta(days=7)  # players pause
CONNECT_WITHIN = timedelta(seconds=9)  # all have loaded, and only connect
KEPT_ORDERS = 8  # older ones are deleted from the store
WATCH = 0.2  # seconds between two looks at the others
GRACE = 3.0  # seconds in which a call notices by itself that a rank is dead


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


class Inbox:
    """The orders of one box, as they come: (name, arguments)."""

    def __init__(self, store: dist.Store, box: str, place: Place, allowed: Sequence[str]):
        self.store = store
        self.box = box
        self.place = place
        self.allowed = allowed
        self.read = 0

    def next(self) -> tuple[str, list]:
        self.read += 1
        order = f"{self.box}{self.read}"
        name, message = json.loads(self.place.checked(order, self.store.get(order)))
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


def last_words(store: dist.Store) -> str:
    """Of a rank that failed."""
    return store.get("failed").decode() if store.check(["failed"]) else ""


class Team:
    """Ranks 0 .. N−1 denoise, rank N decodes.

    Rank 0 watches the others from the first moment on, while all of them load. They meet once all
    have loaded and have the same code, options and weights. Players pause, so orders may take for
    ever; everything else has a deadline.
    """

    def __init__(
        self,
        place: Place,
        store: dist.Store,
        crew: Sequence = (),  # processes that rank 0 has spawned
    ):
        self.place = place
        self.last = place.world - 1
        self.store = store
        self.crew = crew
        self.posted = {"denoise": 0, "decode": 0}
        self.readers = {"denoise": range(1, self.last), "decode": [self.last]}
        self.waiting: list[str] = []  # calls that wait for others just now
        self.lost = ""  # why nobody is left
        self.closed = False
        if crew or (place.apart and place.rank == 0):
            threading.Thread(target=self.watch, daemon=True).start()

        self.decode = partial(self.ask, "decode")
        self.dump = partial(self.ask, "dump")
        self.load = partial(self.ask, "load")
        self.undo = partial(self.ask, "undo")

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """A death is not waited out meanwhile; who fails himself says why, and the others end too."""
        self.waiting.append("rank")
        try:
            yield
        except Exception:
            self.closed = True
            self.end_others(self.store)
            raise
        finally:
            self.waiting.remove("rank")

    def meet(self, options: object, model: nn.Module | None) -> dist.ProcessGroup:
        """All have loaded and fit together: the group of those who denoise."""
        with self.guarded("rank"):
            self.compare(fingerprint(options, model))
            return self.connect(options)

    def compare(self, mine: dict[str, str]) -> None:
        """Wait until everybody has loaded, and see that all are alike."""
        world = self.place.world
        keys = [f"facts{r}" for r in range(world)]
        mine_at = keys[self.place.rank]
        self.store.set(mine_at, self.place.sign(mine_at, json.dumps(mine)))
        while not self.store.check(keys):
            failed = last_words(self.store) or self.lost
            if failed:
                raise ConnectionError(failed)
            time.sleep(0.05)
        first, *others = (json.loads(self.place.checked(key, self.store.get(key))) for key in keys)
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

    def connect(self, options: object) -> dist.ProcessGroup:
        """Lines from everybody to everybody; the group of those who denoise."""
        self.store.set_timeout(FOR_EVER)
        meeting.use_interface(self.place)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", self.store),
            rank=self.place.rank,
            world_size=self.place.world,
            timeout=CONNECT_WITHIN,
        )
        # who is dead is not waited for as long as who computes
        deadline = timedelta(seconds=options.patience * (30 if options.compile else 1))
        backend = "nccl" if "cuda" in options.device else "gloo"
        group = dist.new_group(list(range(self.last)), timeout=CONNECT_WITHIN, backend=backend)
        _set_pg_timeout(deadline)
        if self.place.rank < self.last:
            _set_pg_timeout(deadline, group)
        return group

    # ---- rank 0

    def watch(self) -> None:
        """Whoever dies ends all: the others at once, a call that still waits after a moment of grace."""
        line = self.place.join()  # of its own: on the other one a call may wait
        beats = meeting.Beats(line)
        dead: list[str] = []
        while not (dead or self.closed):
            time.sleep(WATCH)
            if self.place.apart:
                dead = beats.dead(range(1, self.place.world))
            else:
                ended = [r for r, process in enumerate(self.crew, 1) if process.poll() is not None]
                dead = [f"rank {r} died" for r in ended]
        if self.closed:
            return

        # the last words of the dead say more than that they are dead
        time.sleep(WATCH)
        self.lost = last_words(line) or ", ".join(dead)
        self.end_others(line)
        time.sleep(GRACE)
        if self.waiting and not self.closed:
            print(f"error: {self.lost}", file=sys.stderr, flush=True)
            os._exit(1)

    def end_others(self, store: dist.Store) -> None:
        """Nobody is left behind: who was spawned is killed, who was not reads that it is over."""
        for process in self.crew:
            process.kill()
        if self.place.apart and not last_words(store):
            store.set("failed", self.lost or "rank 0 has ended")

    def post(self, box: str, name: str, *args: object) -> None:
        """An order for all who read this box, whenever they come to it."""
        tensors: list[Tensor] = []
        text = json.dumps([name, pack(args, tensors)])
        self.posted[box] += 1
        k = self.posted[box]
        self.store.set(f"{box}{k}", self.place.sign(f"{box}{k}", text))
        self.store.delete_key(f"{box}{k - KEPT_ORDERS}")
        for reader in self.readers[box]:
            send_all(tensors, reader)

    def ask(self, name: str, *args: object) -> object:
        """Call a method of the decoder on the last rank."""
        with self.guarded("decoder"):
            self.post("decode", name, *args)
            return hear(self.last)

    @contextlib.contextmanager
    def guarded(self, who: str) -> Iterator[None]:
        """On rank 0: a broken connection is reported as what broke it, and nobody is left behind."""
        if self.lost:
            raise ConnectionError(self.lost)
        self.waiting.append(who)
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            if self.place.rank:
                raise
            time.sleep(1)  # for the last words of others
            self.lost = self.lost or last_words(self.store)
            self.end_others(self.store)
            if isinstance(error, ValueError) and not self.lost:
                raise
            cause = str(error).splitlines()[0].split("] ")[-1]
            reason = self.lost or f"a {who} died or stalled ({cause})"
            raise ConnectionError(reason) from None
        finally:
            self.waiting.remove(who)

    def close(self) -> None:
        """In good order."""
        self.closed = True
        if not self.lost:
            self.post("denoise", "close")
            self.post("decode", "close")
            with contextlib.suppress(RuntimeError):
                dist.barrier()  # the store ends with this process: all shall have read it
        dist.destroy_process_group()
