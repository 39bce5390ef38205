"""Denoise the next segment while the last one is being decoded.

What it does. A Session is one player in one world. reset(image, prompt, seed) gives frame 0, each
step(keyboard, mouse) the frames of one more segment: 56 of the first, then 40 (or 20, or 8). A step
is submit, which denoises, and collect, which hands over the decoded frames. Among several processes
(open_session: N + 1) whoever submits segment k + 1 before collecting k lets both go on at once; by
step, which is all that play.py calls, and alone on a CPU, (1) holds.
Paper: §3.4, Table 1: 40 FPS at 720p, eight GPUs denoise and one decodes.

Why it works. A segment of n frames takes D seconds to denoise and V to decode. Segment k + 1 needs
the latents of segment k, not its pixels, so it can be denoised while k is being decoded:

    in turn     | D k | V k     | D k+1 | V k+1   |            a segment every D + V
    side by side| D k | D k+1 | D k+2 | D k+3 |                a segment every max(D, V)
                      | V k     | V k+1   | V k+2   |
    shown                       | k           | k+1         |

    P_serial = D + V                                                                  (1)

Side by side, let s_k be when the latents of segment k are ready and e_k when its frames are: s_k =
s_(k−1) + D. Decoding begins when these latents are there and the segment before is decoded: e_k =
max(s_k, e_(k−1)) + V. If V <= D, the decoder waits for latents, e_k = s_k + V, and frames come
every D seconds. If V > D, latents soon wait for the decoder, e_k = e_(k−1) + V. In both cases

    P = max(D, V)                   seconds between two segments                      (2)
    FPS = n / P                                                                       (3)

The gain is at most twofold, at D = V. Where V > D, ever more segments would wait to be decoded;
only two may (QUEUE), then the denoiser waits as well.

A key does not act sooner for it. Keys are read when a segment is submitted, at 40 FPS once in R = n
/ 40 seconds. A key waits for that, R/2 on average; then its segment is denoised, then decoded, and
its frames are handed over together. In all (2·max(D, V) for D + V if one more was submitted ahead)

    mean  = R/2 + D + V             pressed at a random moment                        (4)
    worst = R + D + V               pressed just after the keys were read             (5)

So 2 new latents act sooner than 10, but cost more per frame: each segment pays for memory and past.
shortest_sustained() measures how few a machine can make faster than they are shown.

N + 1 processes, three channels (engine/ranks.py; what each process does is in engine/actors.py):

    rank 0 ── orders: signed text through a store ──► ranks 1 .. N−1 "denoise",  rank N "decode"
           ── tensors: send, as an order names them ─► the ranks that read it
           ◄─ answers: frames, sent back ──────────── rank N
    and inside every block ranks 0 .. N−1 exchange heads for places (attention.py)

All denoisers hold the same memory, as they get the same calls and the noise of a segment depends on
the seed and its number alone. For the same reason undo, restore and replay give the same frames
again. If a rank dies, fails or stalls, rank 0 raises one ConnectionError, and all processes end.

On one host rank 0 starts the others. On several, torchrun starts all (engine/meeting.py):

    export MATRIX_GAME_SECRET=...                                         the same on all hosts
    torchrun --nnodes 3 --node-rank K --nproc-per-node 3 --master-addr HOST play.py --dit-ranks 8

What differs. The release's command for many GPUs fails if typed as its README says. Here pixels are
rounded, not cut, time may pass latent 2,048, frame 0 belongs to reset, and segments may be short.

Try it: python realtime.py      Tests: pytest tests/test_realtime.py tests/test_ranks.py
"""

import contextlib
import json
import secrets
import subprocess
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

import memory
from camera import choose
from context import Window
from engine import meeting, ranks, spawned, weights
from engine.actors import UNDO, Decoder, Denoiser, serve
from engine.meeting import Place
from engine.parts import SIZES, Options, embed, load_parts, resolve, tokens_per_latent

WINDOW = Window()
QUEUE = 2  # segments that may wait for the decoder
UNCOLLECTED = 2 * QUEUE  # submit() refuses while more segments than these are uncollected
SHOWN = 40  # frames per second that the paper aims at
START = (0.0, -1.6, 0.0, 0.0, 0.0)  # x, y, z, pitch, yaw: eyes 1.6 m above the ground


class Chunk(NamedTuple):
    frames: Tensor  # (n, H, W, 3) uint8
    # segment, first_latent, policy, how many latents are in the bank; poses, keyboard and mouse as
    # used; which latents were remembered; milliseconds of each part
    info: dict


# ---- one player ---------------------------------------------------------------------------------


class Session:
    """One player in one world. With a store it is rank 0 of the processes that meet there."""

    def __init__(
        self,
        options: Options,
        place: Place | None = None,  # of rank 0, where ranks meet
        store: dist.Store | None = None,
        crew: Sequence[subprocess.Popen] = (),
    ) -> None:
        self.options = resolve(options)
        self.policy = options.policy
        self.pending: deque = deque()  # of (decoding, info), oldest first: submitted, not collected
        torch.set_num_threads(options.threads or torch.get_num_threads())
        here = ("dit", "encoder") if store else ("dit", "encoder", "decoder")
        self.team = ranks.Team(place, store, crew) if store else None
        with self.team.loading() if self.team else contextlib.nullcontext():
            self.nets, meta = load_parts(self.options, *here)
        self.choose_length(meta)

        # a thread that decodes, or waits for the rank that does. Not on one CPU: two threads that
        # compute on the same cores would halve each other's speed
        self.pool = ThreadPoolExecutor(1) if store or "cuda" in self.options.device else None
        group = self.team.meet(self.options, self.nets["dit"]) if self.team else None
        self.denoiser = Denoiser(self.nets["dit"], meta, self.options, group)
        # a Team has the methods of a Decoder: it asks the last rank
        self.decoder = self.team or Decoder(self.nets["decoder"], self.options)

    def choose_length(self, meta: dict) -> None:
        """Play in segments of a length that the weights were trained for."""
        self.lengths = [int(n) for n in meta["new"].split()]
        if self.options.new not in self.lengths:
            print(
                f"these weights never saw segments of {self.options.new} new latents: "
                f"playing {self.lengths[0]} at once",
                flush=True,
            )
            self.options = replace(self.options, new=self.lengths[0])

    def everywhere(self, name: str, *args: object) -> object:
        """Call this method of the denoiser here and on every other denoising rank."""
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

        self.pending.clear()  # what was still to be decoded belongs to the old world

        # one frame is one latent. In bfloat16 this arithmetic would move half of the grey levels
        pixels = image.permute(2, 0, 1)[None, :, None].float() / 127.5 - 1  # (1, 3, 1, H, W)
        pixels = pixels.to(**self.denoiser.device_and_dtype)
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
        self.hand_over(latent, info, True)
        return self.collect()

    # ---- the pipeline

    def step(self, keyboard: Tensor, mouse: Tensor) -> Chunk:
        self.submit(keyboard, mouse)
        return self.collect()

    def submit(self, keyboard: Tensor, mouse: Tensor) -> None:
        """Denoise the next segment and hand it to the decoder. The keys should be read just before."""
        keyboard, mouse = self.checked(keyboard, mouse)
        choose("policy", self.policy, memory.POLICIES)
        self.refuse_uncollected(UNCOLLECTED)
        latents, info = self.everywhere("run", keyboard, mouse, self.policy)
        self.hand_over(latents, info)

    def checked(self, keyboard: Tensor, mouse: Tensor) -> tuple[Tensor, Tensor]:
        """The actions as float tensors, if they are finite and as many as the next segment takes."""
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

    def hand_over(self, latents: Tensor, info: dict, begins: bool = False) -> None:
        """Give latents to the decoder's thread; without one they are decoded in collect().

        At most QUEUE segments wait for that thread. If it is slow, this waits.
        """
        decoding = partial(self.decoder.decode, latents, begins)
        if self.pool:
            if len(self.pending) > QUEUE:
                earlier, _ = self.pending[-QUEUE - 1]
                earlier.exception()  # returns when that one is done
            decoding = self.pool.submit(decoding)
        self.pending.append((decoding, info))

    def collect(self) -> Chunk:
        """The oldest segment that was submitted, as soon as it is decoded."""
        if not self.pending:
            raise ValueError("nothing to collect: submit() first")
        decoding, info = self.pending.popleft()
        frames, milliseconds = decoding.result() if self.pool else decoding()
        info["ms"]["decode"] = milliseconds
        return Chunk(frames, info)

    def refuse_uncollected(self, most: int = 0) -> None:
        """Refuse to go on while more than so many segments are submitted and not collected."""
        if len(self.pending) > most:
            raise ValueError(
                f"{len(self.pending)} segments were submitted and not collected: "
                "collect() them first"
            )

    # ---- undo, save and restore

    def undo(self) -> None:
        """Take the last segment back: latents, poses, memory, decoder.

        The same actions then give the same frames.
        """
        self.refuse_uncollected()
        if not self.denoiser.history:
            raise ValueError(
                f"nothing to undo: up to {UNDO} steps since the start "
                "or the last restore can be taken back"
            )
        self.everywhere("undo")
        self.decoder.undo()

    def save(self, path: str | Path) -> None:
        """The whole state, in one safetensors file."""
        self.refuse_uncollected()
        state = self.denoiser.dump()
        state |= {f"decoder.{name}": x for name, x in self.decoder.dump().items()}
        about = {
            "session": self.options.preset,
            "policy": self.policy,
            "view": self.options.view,
        }
        weights.write_weights(path, state, about)

    def restore(self, path: str | Path) -> None:
        """Go on from a saved state: the same actions then give the same frames."""
        self.refuse_uncollected()
        state, about = weights.read_weights(path)
        preset = about.get("session")
        view = about.get("view", "first")
        if (preset, view) != (self.options.preset, self.options.view):
            raise ValueError(
                f"{path} is no saved session of preset {self.options.preset} "
                f"in the {self.options.view} person; "
                f"it says: {preset or 'no session'}, {view} person"
            )
        self.policy = about["policy"]
        of_decoder = {}
        of_denoiser = {}
        for name, x in state.items():
            if name.startswith("decoder."):
                of_decoder[name.removeprefix("decoder.")] = x
            else:
                of_denoiser[name] = x
        self.everywhere("load", of_denoiser)
        self.decoder.load(of_decoder)

    def close(self) -> None:
        """End the other ranks."""
        if self.team:
            self.pool.shutdown()
            self.team.close()


# ---- N + 1 ranks --------------------------------------------------------------------------------


def open_session(options: Options, dit_ranks: int = 0) -> Session:
    """A session in this process alone (0), or shared with dit_ranks − 1 others and one that decodes.

    Called by rank 0 only. The other processes that torchrun has started call help_out().
    """
    options = resolve(options)
    others = meeting.started() - 1
    count = dit_ranks or others
    if not count:
        return Session(options)

    most = tokens_per_latent(options)
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
    """All on this host. They load their networks while this process does, and meet it in ranks.Team."""
    meeting.to_come()  # or a line that says what is wrong with it, before anybody waits for others
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
    """What a process that torchrun has started does, if it is not rank 0.

    On several hosts it is a rank; on one host it has nothing to do, as rank 0 starts its own.
    """
    return serve(meeting.named()) if meeting.apart() else 0


# ---- time ---------------------------------------------------------------------------------------


def walk_actions(n: int) -> tuple[Tensor, Tensor]:
    """Forward, turning right 1.5° a frame: keyboard (n, 6), mouse (n, 2)."""
    forward = torch.tensor([1.0, 0, 0, 0, 0, 0])
    right = torch.tensor([0.0, 0.1])
    return forward.repeat(n, 1), right.repeat(n, 1)


def time_segment(session: Session, rounds: int = 5, warmup: int = 2) -> dict[str, float]:
    """Medians of P, D and V in seconds, and what follows from D and V by the formulas above."""
    # one segment is submitted beforehand, so that there is always one to decode
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

    in_turn = D + V  # (1)
    side_by_side = max(D, V)  # (2)
    R = n / SHOWN
    return {
        "P": P,
        "D": D,
        "V": V,
        "fps": n / P,  # (3)
        "fps side by side": n / side_by_side,
        "fps in turn": n / in_turn,
        "mean": R / 2 + D + V,  # (4)
        "worst": R + D + V,  # (5)
    }


def shortest_sustained(session: Session, fps: float, margin: float = 1.25) -> int:
    """The fewest new latents that this machine makes `margin` times faster than they are shown.

    Measured on a grey picture, just before play: whatever was walked before is gone, and segments have
    this length from here on. If none else is fast enough, the longest is taken, without being timed: it
    costs least per frame.
    """
    grey = torch.full((*SIZES[session.options.preset], 3), 128, dtype=torch.uint8)
    session.reset(grey)
    session.step(*walk_actions(session.frames_needed))
    *shorter, longest = sorted(session.lengths)
    for new in shorter:
        session.options = replace(session.options, new=new)
        n = session.frames_needed
        session.step(*walk_actions(n))  # not timed: the first of a length is slower
        began = time.perf_counter()
        for _ in range(2):
            session.step(*walk_actions(n))
        if 2 * n / (time.perf_counter() - began) >= margin * fps:
            return new
    session.options = replace(session.options, new=longest)
    return longest


def demo() -> None:
    """D and V of a very small model on this machine, and what follows by the formulas above."""
    session = Session(Options("micro", "random", device="cpu", dtype="float32"))
    session.reset(torch.zeros(*SIZES["micro"], 3, dtype=torch.uint8))
    t = time_segment(session, 2, 1)
    print(f"denoise {t['D']:.3f} s, decode {t['V']:.3f} s for 40 frames")
    print(
        f"in turn {t['fps in turn']:.0f} FPS by (1) and (3), {t['fps']:.0f} measured in this one process"
    )
    print(f"side by side on two machines {t['fps side by side']:.0f} FPS by (2) and (3)")
    print(f"key to picture {t['mean']:.2f} s on average, {t['worst']:.2f} s at worst, at 40 FPS")


if __name__ == "__main__":
    demo()
