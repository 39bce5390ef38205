"""Denoise the next segment while the last one is being decoded.

What it does. A Session is one player in one world: reset(image, prompt, seed) gives frame 0, step(keyboard,
mouse) the next 56 frames, then 40 at a time, or 20, or 8. A step is submit + collect, and submit(k+1)
before collect(k) is the pipeline. open_session shares the work between N + 1 processes.
Paper: §3.4, Table 1: 40 FPS at 720p, eight GPUs denoise and one decodes.

Why it works. A segment of n frames takes D = t_dit seconds to denoise and V = t_vae to decode. Only the
latents of segment k are needed for segment k+1, never its pixels, so the two need not take turns:

    in turn     | D k | V k     | D k+1 | V k+1   |            a segment every D + V
    side by side| D k | D k+1 | D k+2 | D k+3 |                a segment every max(D, V)
                      | V k     | V k+1   | V k+2   |
    shown                       | k           | k+1         |

    P_serial = D + V                                                                  (1)

Side by side, let s_k be when segment k is denoised and e_k when it is decoded. Each actor takes the
next segment as soon as both it and the segment are there: s_k = s_(k−1) + D, e_k = max(s_k, e_(k−1)) + V.
After the first segments one of the two is always busy, and the distance of two e_k is its time:

    P = max(D, V)                                                                     (2)
    FPS = n / P                                                                       (3)

The gain is at most twofold, at D = V. Where V > D the decoder would fall behind by V − D with every
segment; a queue of two makes the denoiser wait instead, so lag and memory are bounded.
A pipeline raises throughput, not reaction. A key waits for the next decision, which comes once per
R = n / 40 seconds at 40 FPS; then its segment is denoised; then V₁, until the first latent is decoded:

    mean  = R/2 + D + V₁            key to picture, at a random moment                (4)
    worst = R + D + V₁              just after a decision                             (5)

That is why 2 new latents feel better than 10, though every segment pays for memory and past again:
shortest_sustained() measures the fewest that this machine still makes faster than they are shown.

N + 1 processes, three channels (engine/ranks.py; engine/actors.py is what each of them does):

    rank 0 ── orders: signed text through a store ──► ranks 1 .. N−1 "denoise",  rank N "decode"
           ── tensors: send, as an order names them ─► the ranks that read it
           ◄─ answers: frames, sent back ──────────── rank N
    and inside every block ranks 0 .. N−1 exchange heads for places (attention.py)

All denoisers hold equal memories, because all get the same calls and a segment's noise depends on (seed,
number) alone; for the same reason undo, restore, replay and N ranks give the same frames. If a rank dies,
fails or stalls, rank 0 raises one ConnectionError and all end within seconds.

On one host rank 0 starts the others, with torchrun or without. On several, torchrun starts all:
they meet at its MASTER_ADDR, and only who knows the operator's secret is obeyed (meeting.py):

    export MATRIX_GAME_SECRET=...                                         the same on all hosts
    torchrun --nnodes 3 --node-rank K --nproc-per-node 3 --master-addr HOST play.py --dit-ranks 8

What differs. The released parallel start fails as documented. Here frames leave as they are made; there is
no wall at latent 2,048; pixels are rounded, not cut; frame 0 belongs to reset; segments may be short.

Try it: python realtime.py      Tests: pytest tests/test_realtime.py tests/test_ranks.py
Bench:  python lab/bench.py
"""

import json
import secrets
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import camera
import memory
from context import Window
from engine import meeting, ranks, spawned, weights
from engine.actors import UNDO, Decoder, Denoiser, serve
from engine.meeting import Place
from engine.parts import SIZES, Options, embed, load_parts, places, resolve

WINDOW = Window()
QUEUE = 2  # segments that may wait for the decoder
SHOWN = 40  # frames per second that the paper aims at
START = (0.0, -1.6, 0.0, 0.0, 0.0)  # x, y, z, pitch, yaw: eyes 1.6 m above the ground


class Chunk(NamedTuple):
    frames: Tensor  # (n, H, W, 3) uint8
    info: dict  # segment, first_latent, policy, bank; poses, keyboard, mouse as used; memory; ms


# ---- one player ---------------------------------------------------------------------------------


class Session:
    """One player in one world; knows nothing of pages. With a store it is rank 0 of all who meet there."""

    def __init__(
        self,
        options: Options,
        place: Place | None = None,  # of rank 0, where ranks meet
        store: dist.Store | None = None,
        crew: Sequence[subprocess.Popen] = (),
    ) -> None:
        self.options = resolve(options)
        self.policy = options.policy
        self.pending: deque = deque()  # of (decoding, info), oldest first
        torch.set_num_threads(options.threads or torch.get_num_threads())
        mine = ("dit", "encoder") if store else ("dit", "encoder", "decoder")
        self.nets, meta = load_parts(self.options, *mine)
        self.choose_length(meta)

        # two threads on the same cores would halve each other's speed
        self.pool = ThreadPoolExecutor(1) if store or "cuda" in self.options.device else None
        self.team = None
        if store:
            dit = self.nets["dit"]
            self.team = ranks.Team(place, store, self.options, dit, crew)
        group = self.team.group if self.team else None
        self.denoiser = Denoiser(self.nets["dit"], meta, self.options, group)
        self.decoder = self.team or Decoder(self.nets["decoder"], self.options)

    def choose_length(self, meta: dict) -> None:
        """Segments of a length that these weights were trained for."""
        self.lengths = [int(n) for n in meta["new"].split()]
        if self.options.new not in self.lengths:
            print(
                f"these weights never saw segments of {self.options.new} new latents: "
                f"playing {self.lengths[0]} at once",
                flush=True,
            )
            self.options = replace(self.options, new=self.lengths[0])

    def everywhere(self, name: str, *args: object) -> object:
        """The same call on every denoising rank."""
        if not self.team:
            return getattr(self.denoiser, name)(*args)
        with self.team.guarded("denoiser"):
            self.team.post("denoise", name, *args)
            return getattr(self.denoiser, name)(*args)

    @property
    def frames_needed(self) -> int:
        """Rows of actions that the next step takes: the first segment is longer."""
        later = self.denoiser.now and self.denoiser.now.segment
        return Window.stride * (self.options.new if later else Window.first - 1)

    def reset(
        self,
        image: Tensor,
        prompt: str = "",
        seed: int = 42,
        pose: Sequence[float] = START,
    ) -> Chunk:
        """Start from a picture (H, W, 3) uint8. Returns it as the model sees it: frame 0."""
        image = torch.as_tensor(image)
        expected = (*SIZES[self.options.preset], 3)
        if tuple(image.shape) != expected or image.dtype != torch.uint8:
            raise ValueError(
                f"image must be {expected} uint8 for preset {self.options.preset}, "
                f"got {tuple(image.shape)} {image.dtype}"
            )

        # one frame is one latent; what was still to be decoded belongs to the old world
        self.pending.clear()
        pixels = image.permute(2, 0, 1)[None, :, None].float() / 127.5 - 1  # (1, 3, 1, H, W)
        pixels = pixels.to(**self.denoiser.place)  # now: bfloat16 cannot tell grey levels apart
        latent = self.nets["encoder"].encode(pixels).cpu()  # (1, C, 1, h, w)
        self.everywhere("reset", latent, embed(self.options, prompt), int(seed), tuple(pose))
        info = {
            "segment": -1,
            "first_latent": 0,
            "policy": self.policy,
            "bank": 1,
            "memory": [],
            "poses": [list(pose)],
            "ms": {},
        }
        self.decode(latent, info, True)
        return self.collect()

    # ---- the pipeline

    def step(self, keyboard: Tensor, mouse: Tensor) -> Chunk:
        self.submit(keyboard, mouse)
        return self.collect()

    def submit(self, keyboard: Tensor, mouse: Tensor) -> None:
        """Denoise the next segment and hand it to the decoder. Read the keys just before this."""
        keyboard, mouse = self.checked(keyboard, mouse)
        camera.choose("policy", self.policy, memory.POLICIES)
        self.idle(2 * QUEUE)
        latents, info = self.everywhere("run", keyboard, mouse, self.policy)
        self.decode(latents, info)

    def checked(self, keyboard: Tensor, mouse: Tensor) -> tuple[Tensor, Tensor]:
        """As many finite actions as the next segment takes."""
        if not self.denoiser.now:
            raise ValueError("no world yet: call reset(image) before the first step")
        keyboard = torch.as_tensor(keyboard).float()
        mouse = torch.as_tensor(mouse).float()
        n = self.frames_needed
        fits = keyboard.shape == (n, 6) and mouse.shape == (n, 2)
        if not fits or not (keyboard.isfinite().all() and mouse.isfinite().all()):
            raise ValueError(
                f"segment {self.denoiser.now.segment} takes finite keyboard ({n}, 6) "
                f"and mouse ({n}, 2), got {tuple(keyboard.shape)} and {tuple(mouse.shape)}; "
                "actions of the future belong to the next step"
            )
        return keyboard, mouse

    def decode(self, latents: Tensor, info: dict, fresh: bool = False) -> None:
        """In order, in one thread or by collect().

        At most QUEUE segments wait: a slow decoder costs time, never memory.
        """
        if self.pool and len(self.pending) > QUEUE:
            decoding, _ = self.pending[-QUEUE - 1]
            decoding.exception()  # blocks until that one is done
        work = partial(self.decoder.decode, latents, fresh)
        self.pending.append((self.pool.submit(work) if self.pool else work, info))

    def collect(self) -> Chunk:
        """The oldest submitted segment, as soon as it is decoded."""
        if not self.pending:
            raise ValueError("nothing to collect: submit() first")
        decoding, info = self.pending.popleft()
        frames, milliseconds = decoding.result() if self.pool else decoding()
        info["ms"]["decode"] = milliseconds
        return Chunk(frames, info)

    def idle(self, most: int = 0) -> None:
        """Nothing, or not too much, is being decoded."""
        if len(self.pending) > most:
            raise ValueError(
                f"{len(self.pending)} segments were submitted and not collected: "
                "collect() them first"
            )

    # ---- back, away and home again

    def undo(self) -> None:
        """Take the last segment back: latents, poses, memory, decoder.

        The same actions then give the same frames.
        """
        self.idle()
        if not self.denoiser.history:
            raise ValueError(
                f"nothing to undo: up to {UNDO} steps since the start "
                "or the last restore can be taken back"
            )
        self.everywhere("undo")
        self.decoder.undo()

    def save(self, path: str | Path) -> None:
        """The whole state in one safetensors file; after restore() the same actions give the same frames."""
        self.idle()
        state = self.denoiser.dump()
        state |= {f"decoder.{name}": x for name, x in self.decoder.dump().items()}
        about = {
            "session": self.options.preset,
            "policy": self.policy,
            "view": self.options.view,
        }
        weights.write_weights(path, state, about)

    def restore(self, path: str | Path) -> None:
        self.idle()
        state, about = weights.read_weights(path)
        preset, view = about.get("session"), about.get("view", "first")
        if (preset, view) != (self.options.preset, self.options.view):
            raise ValueError(
                f"{path} is no saved session of preset {self.options.preset} "
                f"in the {self.options.view} person; "
                f"it says: {preset or 'no session'}, {view} person"
            )
        self.policy = about["policy"]
        # one file, two owners
        decoder = {name: x for name, x in state.items() if name.startswith("decoder.")}
        walk = {name: x for name, x in state.items() if name not in decoder}
        self.everywhere("load", walk)
        self.decoder.load({name.removeprefix("decoder."): x for name, x in decoder.items()})

    def close(self) -> None:
        """End the other ranks in good order."""
        if self.team:
            self.pool.shutdown()
            self.team.close()


# ---- N + 1 ranks --------------------------------------------------------------------------------


def open_session(options: Options, dit_ranks: int = 0) -> Session:
    """One process (0), or rank 0 of dit_ranks + 1: on one host it starts the others itself.

    What else torchrun has started calls help_out() instead.
    """
    options = resolve(options)
    others = meeting.started() - 1
    count = dit_ranks or others
    if not count:
        return Session(options)

    most = places(options)
    if not 1 <= count <= most or others not in (0, count):
        raise ValueError(
            f"{count} denoising ranks cannot work here: "
            f"{options.preset} has {most} places to share, and {others + 1} processes were started. "
            f"Use 1 to {most}; torchrun --nproc_per_node needs one more"
        )
    if options.device.startswith("cuda") and not dist.is_nccl_available():
        raise ValueError(
            "this torch has no nccl, which ranks on GPUs need; "
            "use --device cpu or another build of torch"
        )
    return meet_others(options) if meeting.apart() else spawn_others(options, count)


def spawn_others(options: Options, count: int) -> Session:
    """All on this host. The others load while this process does, and all meet in Team."""
    place = Place(0, count + 1, meeting.LOOPBACK, 0, secrets.token_bytes(32))
    store = place.open()
    place = place._replace(port=store.port)
    crew = []
    for rank in range(1, count + 1):
        device = f"cuda:{rank}" if options.device.startswith("cuda") else "cpu"
        theirs = asdict(replace(options, device=device))
        crew.append(spawned.start(place._replace(rank=rank), theirs))
    return Session(options, place, store, crew)


def meet_others(options: Options) -> Session:
    """On several hosts: torchrun has started the others, and they wait for the options."""
    place = meeting.named()
    store = place.open()
    place = place.with_session_key(store)
    store.set("options", place.sign("options", json.dumps(asdict(options))))
    return Session(options, place, store)


def help_out() -> int:
    """A process of torchrun that is not rank 0: on another host a rank, here nothing to do."""
    return serve(meeting.named()) if meeting.apart() else 0


# ---- time ---------------------------------------------------------------------------------------


def walk_actions(n: int) -> tuple[Tensor, Tensor]:
    """Forward, turning right 1.5° a frame: keyboard (n, 6), mouse (n, 2)."""
    forward = torch.tensor([1.0, 0, 0, 0, 0, 0])
    right = torch.tensor([0.0, 0.1])
    return forward.repeat(n, 1), right.repeat(n, 1)


def time_segment(session: Session, rounds: int = 5, warmup: int = 2) -> dict[str, float]:
    """Of steady, pipelined segments: medians in seconds, and what they mean for whoever plays."""
    # one segment is always on its way: what is timed is the steady state, not the filling of the pipe
    session.submit(*walk_actions(session.frames_needed))
    n = Window.stride * session.options.new
    rows = []
    last = 0.0
    for _ in range(warmup + rounds):
        session.submit(*walk_actions(n))
        ms = session.collect().info["ms"]
        now = time.perf_counter()
        denoise = (ms["retrieve"] + ms["denoise"]) / 1e3
        rows.append((now - last, denoise, ms["decode"] / 1e3))
        last = now
    session.collect()
    P, D, V = torch.tensor(rows[warmup:]).median(0).values.tolist()

    serial = D + V  # (1)
    predicted = max(D, V)  # (2)
    R = n / SHOWN
    first = V / session.options.new
    return {
        "P": P,
        "D": D,
        "V": V,
        "fps": n / P,  # (3)
        "predicted": n / predicted,
        "serial": n / serial,
        "mean": R / 2 + D + first,  # (4)
        "worst": R + D + first,  # (5)
    }


def shortest_sustained(session: Session, fps: float, margin: float = 1.25) -> int:
    """The fewest new latents at once that this machine makes `margin` times faster than they are shown.

    Short segments act sooner and cost more per frame: each pays for memory and past again. Measured on
    a grey picture, a moment before play; where nothing keeps up, the longest is the smoothest.
    """
    grey = torch.full((*SIZES[session.options.preset], 3), 128, dtype=torch.uint8)
    session.reset(grey)
    session.step(*walk_actions(session.frames_needed))
    for new in sorted(session.lengths):
        session.options = replace(session.options, new=new)
        n = session.frames_needed
        session.step(*walk_actions(n))  # the first of its shape is slower
        began = time.perf_counter()
        for _ in range(2):
            session.step(*walk_actions(n))
        if 2 * n / (time.perf_counter() - began) >= margin * fps:
            break
    return session.options.new


def demo() -> None:
    """The two stages apart and side by side."""
    session = Session(Options("micro", "random", device="cpu", dtype="float32"))
    session.reset(torch.zeros(*SIZES["micro"], 3, dtype=torch.uint8))
    t = time_segment(session, 2, 1)
    print(f"denoise {t['D']:.3f} s, decode {t['V']:.3f} s for 40 frames")
    print(f"in turn {t['serial']:.0f} FPS by (1), {t['fps']:.0f} measured in this one process")
    print(f"side by side on two machines {t['predicted']:.0f} FPS by (2)")
    print(f"key to picture {t['mean']:.2f} s on average, {t['worst']:.2f} s at worst, at 40 FPS")


if __name__ == "__main__":
    if "--bench" in sys.argv:
        print("error: --bench is a program of its own: python lab/bench.py", file=sys.stderr)
        sys.exit(2)
    demo()
