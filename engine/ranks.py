"""N ranks denoise, one decodes: how they meet, speak and fail."""

import contextlib
import pickle
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parents[1]


class Team:
    """Ranks 0 .. N−1 denoise, rank N decodes. Players pause, so orders may take for ever; everything else has a deadline.
    They meet once all have loaded and have the same code, options and weights: otherwise frames would silently differ."""

    def __init__(
        self,
        rank: int,
        world: int,
        store: dist.Store,
        options: object,
        model: nn.Module | None,
        crew: Sequence = (),
    ):
        self.last, self.store, self.crew, self.posted = (
            world - 1,
            store,
            crew,
            {"denoise": 0, "decode": 0},
        )
        code = [
            path.read_text() for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("engine/*.py")])
        ]
        sums = (
            [f"{p.flatten()[::97].double().abs().sum():.6g}" for p in model.state_dict().values()]
            if model
            else None
        )
        said = {"code": code, "options": replace(options, device="", threads=0)} | (
            {"weights": sums} if model else {}
        )
        store.set(f"said{rank}", pickle.dumps(said))
        while not store.check(keys := [f"said{r}" for r in range(world)]):
            if store.check(["failed"]) or not all(process.is_alive() for process in crew):
                raise RuntimeError(
                    store.get("failed").decode()
                    if store.check(["failed"])
                    else "a rank died while starting; see above"
                )
            time.sleep(0.05)
        first, *others = (pickle.loads(store.get(key)) for key in keys)
        if wrong := [
            f"rank {r} differs from rank 0 in its {k}"
            for r, them in enumerate(others, 1)
            for k in them
            if them[k] != first[k]
        ]:
            raise ValueError(
                f"{'; '.join(wrong)}. Start all ranks from one folder, with the same options and weights"
            )
        store.set_timeout(timedelta(days=7))
        deadline, backend = (
            timedelta(seconds=options.patience * (30 if options.compile else 1)),
            "nccl" if "cuda" in options.device else "gloo",
        )
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", store),
            rank=rank,
            world_size=world,
            timeout=deadline,
        )
        self.group = dist.new_group(list(range(self.last)), timeout=deadline, backend=backend)
        self.decode, self.dump, self.load, self.undo = (
            partial(self.ask, name) for name in ("decode", "dump", "load", "undo")
        )

    def post(
        self, box: str, *order: object
    ) -> None:  # rank 0: for all who read this box, whenever they come to it
        self.posted[box] += 1
        self.store.set(f"{box}{self.posted[box]}", pickle.dumps(order))
        self.store.delete_key(f"{box}{self.posted[box] - 8}")

    def ask(
        self, name: str, *args: object
    ) -> object:  # rank 0: a method of the Decoder on the last rank
        with self.guarded("decoder"):
            decodes = name == "decode"  # its latents and pixels travel as they are, not pickled
            self.post(
                "decode", name, *((args[0].shape, args[0].dtype, args[1]) if decodes else args)
            )
            if decodes:
                dist.send(args[0].cpu().contiguous(), self.last)
            dist.recv_object_list(reply := [None], self.last)
            if decodes:
                dist.recv(frames := torch.empty(reply[0][0], dtype=torch.uint8), self.last)
            return (frames, reply[0][1]) if decodes else reply[0]

    @contextlib.contextmanager
    def guarded(self, who: str):
        """On rank 0: a broken connection is reported as what broke it, and nobody is left behind."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            time.sleep(1)  # for the last words of others
            dead = [
                f"rank {r} died" for r, process in enumerate(self.crew, 1) if not process.is_alive()
            ]
            reason = (
                self.store.get("failed").decode()
                if self.store.check(["failed"])
                else ", ".join(dead)
            )
            for process in self.crew:
                process.kill()
            raise RuntimeError(
                reason or f"a {who} died or stalled ({str(error).splitlines()[0].split('] ')[-1]})"
            ) from None
