"""Who denoises and who decodes: the two actors of a session, in one process or as ranks.

A Denoiser holds one walk: the last latents, the memory, and where the player stands. A Decoder
holds one video. Neither knows of the other. In one process the session (realtime.py) calls both.
With N + 1 processes, called ranks, the session is rank 0, and the others run serve():

    rank 0            denoises, and tells the others what to do
    ranks 1 .. N−1    get the same calls and so have the same walk; each computes its share of the places
    rank N            decodes
"""

import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import camera
import flow
import vae
from context import Context, Lens, Memory, Segment, Window, segment_cameras
from engine import meeting, ranks
from engine.meeting import Place
from engine.parts import Options, at_once, load_parts, null_text, vae_config
from memory import MemoryBank

UNDO = 4  # segments that can be taken back
SPARE = 4  # a decoder's older state stays on its device while there is room for so many more
LOOK_BACK = 4  # latents before the past whose poses and actions are kept: windows reach back 3


def moment(device: str) -> float:
    """Seconds, after the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def segment_generator(now: "Walk", device: str) -> torch.Generator:
    """It depends on the seed and the segment's number alone, so undo and replay draw the same noise."""
    return torch.Generator(device).manual_seed(now.seed * 1_000_003 + now.segment)


class Walk(NamedTuple):
    """Where a walk stands. It is replaced, never changed, so an older one can be gone back to."""

    past: Tensor  # (1, C, P, h, w) the last latents
    text: Tensor  # (1, n, text_dim)
    poses: Tensor  # (F+1, 5) float64 from frame `origin` on: what the next window can still see
    keyboard: Tensor  # (F, 6) likewise
    mouse: Tensor  # (F, 2) likewise
    seed: int = 42
    segment: int = 0
    count: int = 1  # latents so far
    origin: int = 0  # frame of row 0, a multiple of 4


TENSORS = Walk._fields[:5]
NUMBERS = Walk._fields[5:]


class Plan(NamedTuple):
    """A segment before it is denoised."""

    context: Context
    picks: list[dict]  # what is remembered: latent, frame, score, sink
    rows: list[Tensor]  # poses, keyboard and mouse of the walk, this segment included
    times: Tensor  # (n,) of the new latents
    cameras: Tensor  # (n, 4, 4, 4) of the new latents


class Denoiser:
    """The network, a walk and its memory.

    `camera` turns poses (n, 5) float64 into cameras (n, 4, 4). Whoever replaces it must do so on
    all ranks: they agree because the same calls lead to the same state.
    """

    def __init__(
        self, model: nn.Module, meta: dict, options: Options, group: dist.ProcessGroup | None = None
    ) -> None:
        self.model = model
        self.meta = meta
        self.options = options
        self.group = group
        self.device_and_dtype = {"device": options.device, "dtype": getattr(torch, options.dtype)}
        self.null_text = null_text(options)
        self.now: Walk | None = None
        self.history: deque = deque(maxlen=UNDO)
        self.camera = camera.pose_to_c2w
        if options.view == "third":
            self.camera = partial(camera.over_the_shoulder, max_pitch=options.max_pitch)

    # ---- where it stands

    def start(self, now: Walk) -> None:
        """Go on from this walk, with an empty bank."""
        self.now = now._replace(
            past=now.past.to(**self.device_and_dtype), text=now.text.to(**self.device_and_dtype)
        )
        rule = "released" if self.meta["encoding"] == "released" else "uniform"
        self.bank = MemoryBank(rule, free=self.options.bank)
        self.history.clear()

    def reset(self, latent: Tensor, text: Tensor, seed: int, pose: Sequence[float]) -> None:
        """A new walk from one latent (1, C, 1, h, w)."""
        poses = torch.tensor([list(pose)], dtype=torch.float64)
        self.start(Walk(latent, text[None], poses, torch.zeros(0, 6), torch.zeros(0, 2), seed))
        cameras = segment_cameras(self.camera(poses)[None], 0, 1)[0].float()
        self.bank.append(self.now.past[0], cameras, torch.tensor([0]))

    def undo(self) -> None:
        """One segment back. The bank only appends, so its old size is all that it needs."""
        self.now, self.bank.size = self.history.pop()

    def dump(self) -> dict[str, Tensor]:
        """Everything but the weights."""
        state = {f"bank.{name}": x for name, x in self.bank.state_dict().items()}
        state |= {name: getattr(self.now, name) for name in TENSORS}
        numbers = [getattr(self.now, name) for name in NUMBERS]
        return state | {"numbers": torch.tensor(numbers)}

    def load(self, state: dict[str, Tensor]) -> None:
        tensors = [state[name] for name in TENSORS]
        self.start(Walk(*tensors, *state["numbers"].tolist()))
        bank = {}
        for name, x in state.items():
            if name.startswith("bank."):
                key = name.removeprefix("bank.")
                bank[key] = x if key == "times" else x.to(self.options.device)
        self.bank.load_state_dict(bank)

    # ---- the next segment

    def run(self, keyboard: Tensor, mouse: Tensor, policy: str) -> tuple[Tensor, dict]:
        """(4n, 6), (4n, 2) -> n latents (1, C, n, h, w), and the facts of realtime.Chunk.info."""
        now = self.now
        device = self.options.device
        if self.meta.get("p_memory_off", 0) >= 1:  # never trained with a memory
            policy = "none"

        began = moment(device)
        plan = self.plan(keyboard, mouse, policy)
        recalled = moment(device)
        x0 = self.imagine(plan)
        self.remember(x0, plan)
        milliseconds = {
            "retrieve": 1e3 * (recalled - began),
            "denoise": 1e3 * (moment(device) - recalled),
        }

        poses, keys, turns = (rows[-len(keyboard) :].tolist() for rows in plan.rows)
        return x0, {
            "segment": now.segment,
            "first_latent": now.count,
            "policy": policy,
            "memory": plan.picks,
            "bank": len(self.bank),
            "poses": poses,
            "keyboard": keys,
            "mouse": turns,
            "ms": milliseconds,
        }

    def plan(self, keyboard: Tensor, mouse: Tensor, policy: str) -> Plan:
        """What the network is told of a segment under these actions."""
        now = self.now
        n = len(keyboard) // Window.stride
        P = now.past.shape[2]
        here = now.poses[-1].tolist()
        ahead = camera.integrate(here, keyboard, mouse, self.options.max_pitch)[1:]
        poses = torch.cat([now.poses, ahead])
        keys = torch.cat([now.keyboard, keyboard])
        turns = torch.cat([now.mouse, mouse])

        # the rows that are kept begin at this latent: it is 0 for Segment.cut, but not in time
        first_kept = now.origin // Window.stride
        walk = SimpleNamespace(
            c2w=self.camera(poses)[None],
            keyboard=keys[None],
            mouse=turns[None],
        )
        first = now.count - P - first_kept
        segment = Segment.cut(walk, first, P + n, self.meta["encoding"])
        segment = replace(segment, times=segment.times + first_kept)

        # there is nothing to remember in segment 0: its past is all that there was
        found = None
        picks = []
        if now.segment and policy != "none":
            found, picks = self.recall(segment.asking(n)[0].float(), now.count - P, policy)
        lens = Lens(self.meta["encoding"], vae_config(self.options.preset).stride[1])
        context = segment.context(now.past, now.text, found, lens)
        if self.null_text is not None:
            context = replace(context, null_text=self.null_text)
        context = context.to(**self.device_and_dtype)
        new_cameras = segment.cameras[0, P:].float()
        return Plan(context, picks, [poses, keys, turns], segment.times[0, P:], new_cameras)

    def recall(self, asking: Tensor, before: int, policy: str) -> tuple[Memory, list[dict]]:
        """The latents that answer the queries (5, 4, 4), the newest first; and what a page shows of them."""
        sink = self.meta.get("sink", True)
        generator = segment_generator(self.now, "cpu")
        slots, scores = self.bank.retrieve(asking, before, policy, sink, generator)
        found = self.bank.read(slots)
        picks = [
            {
                "latent": latent,
                "frame": Window.stride * latent,
                "score": round(score, 3),
                "sink": sink and policy == "camera" and latent <= 1,
            }
            for latent, score in zip(found.times[0].tolist(), scores.tolist(), strict=True)
        ]
        return found, picks

    def imagine(self, plan: Plan) -> Tensor:
        """(1, C, n, h, w): from noise to the latents of the segment."""
        now = self.now
        options = self.options
        generator = segment_generator(now, options.device)
        shape = (1, now.past.shape[1], len(plan.times), *now.past.shape[-2:])
        noise = torch.randn(shape, generator=generator, device=options.device)
        x0 = flow.sample(
            self.model,
            plan.context,
            flow.sigma_grid(options.steps, self.meta["shift"]),
            noise,
            self.meta["method"],
            options.guidance,
            generator,
            self.group,
        ).to(**self.device_and_dtype)
        if not x0.isfinite().all():
            raise ValueError(
                f"segment {now.segment} is not finite: broken weights, "
                f"or {options.dtype} is too narrow; try --dtype float32"
            )
        return x0

    def remember(self, x0: Tensor, plan: Plan) -> None:
        """Add the new latents to the bank and the past; the walk then stands behind them."""
        now = self.now
        self.history.append((now, self.bank.size))
        self.bank.append(x0[0], plan.cameras, plan.times)

        # poses and actions that no later window reaches are dropped
        count = now.count + len(plan.times)
        oldest = Window.stride * (count - Window.past - LOOK_BACK)
        drop = max(0, oldest - now.origin)
        poses, keyboard, mouse = (rows[drop:] for rows in plan.rows)
        self.now = now._replace(
            past=torch.cat([now.past, x0], 2)[:, :, -Window.past :],
            poses=poses,
            keyboard=keyboard,
            mouse=mouse,
            segment=now.segment + 1,
            count=count,
            origin=now.origin + drop,
        )


class Decoder:
    """Latents to uint8 frames, one continuous video."""

    def __init__(self, network: vae.VAE, options: Options) -> None:
        self.network = network
        self.options = options
        self.state: dict | None = None
        self.history: deque = deque(maxlen=UNDO)
        self.device_and_dtype = {"device": options.device, "dtype": getattr(torch, options.dtype)}
        self.stream = contextlib.nullcontext()
        if "cuda" in options.device:
            self.stream = torch.cuda.stream(torch.cuda.Stream(options.device))

    @torch.inference_mode()  # this holds for one thread, so a caller could not set it for another
    def decode(self, z: Tensor, begins: bool = False) -> tuple[Tensor, float]:
        """(1, C, n, h, w) -> (4n, H, W, 3) frames, and milliseconds; `begins` begins a new video."""
        began = time.perf_counter()
        self.history.append(parked(self.state, self.options.device))
        state = None if begins else self.state

        # large pictures are decoded a few latents at a time, or the layers would need too much memory
        pieces = z.to(**self.device_and_dtype).split(at_once(self.options), 2)
        frames = []
        with self.stream:
            for piece in pieces:
                video, state = self.network.decode_stream(piece, state, clamp=True)
                if not video.isfinite().all():
                    raise ValueError(
                        "the decoder draws what is not finite: broken weights, "
                        f"or {self.options.dtype} is too narrow; try --dtype float32"
                    )
                frames.append(to_bytes(video[0]).cpu())
        self.state = state
        return torch.cat(frames), 1e3 * (time.perf_counter() - began)

    def dump(self) -> dict[str, Tensor]:
        return {str(slot): x.cpu() for slot, x in (self.state or {}).items()}

    def load(self, state: dict[str, Tensor]) -> None:
        layout = torch.channels_last_3d
        loaded = {
            int(slot): x.to(**self.device_and_dtype, memory_format=layout)
            for slot, x in state.items()
        }
        self.state = loaded or None
        self.history.clear()

    def undo(self) -> None:
        state = self.history.pop()
        self.state = state and {slot: x.to(self.options.device) for slot, x in state.items()}


def parked(state: dict | None, device: str) -> dict | None:
    """A state that only an undo will need: moved to the CPU if its device has little memory left."""
    if state is None or not device.startswith("cuda"):
        return state
    size = sum(x.numel() * x.element_size() for x in state.values())
    free = torch.cuda.mem_get_info(device)[0]
    return state if free > SPARE * size else {slot: x.cpu() for slot, x in state.items()}


def to_bytes(video: Tensor) -> Tensor:
    """(3, F, H, W) in [-1, 1] -> (F, H, W, 3) uint8, rounded."""
    grey = video.float().add(1).mul(127.5).round()
    return grey.byte().permute(1, 2, 3, 0)


# ---- as ranks ----------------------------------------------------------------------------------------------


ORDERS = {  # what rank 0 may ask of whom
    "denoise": ("reset", "run", "load", "undo", "close"),
    "decode": ("decode", "dump", "load", "undo", "close"),
}


def serve(place: Place, options: Options | None = None) -> int:
    """What every rank but 0 runs: load its network, then do what rank 0 says until that closes.

    A rank that rank 0 has started is given its options; on another host they are read from the
    store.
    """
    store = place.join()
    rank = place.rank
    box = "decode" if rank == place.world - 1 else "denoise"
    done = threading.Event()
    try:
        if place.apart:
            done = meeting.keep_beating(place)
            place = place.with_session_key(store)
            options = read_options(place, store)
        torch.set_num_threads(options.threads or torch.get_num_threads())
        nets, meta = load_parts(options, "decoder" if box == "decode" else "dit")
        group = ranks.Team(place, store).meet(options, nets.get("dit"))
        if box == "decode":
            actor = Decoder(nets["decoder"], options)
        else:
            actor = Denoiser(nets["dit"], meta, options, group)
        obey(actor, ranks.Inbox(store, box, place, ORDERS[box]), answers=box == "decode")
        done.set()
        dist.barrier()  # rank 0 waits until all have read its last order
        dist.destroy_process_group()
    except Exception as error:
        # rank 0 is told the reason, unless it is only that another rank is gone
        if not meeting.says_rank_is_gone(error):
            reason = f"rank {rank} ({box}) failed: {type(error).__name__}: {error}"
            with contextlib.suppress(RuntimeError):  # rank 0 may be gone, too
                store.set("failed", reason)
        os._exit(1)
    return 0


def read_options(place: Place, store: dist.Store) -> Options:
    """The options of rank 0, with the device that torchrun gives to this process."""
    options = Options(**json.loads(place.checked("options", store.get("options"))))
    if options.device.startswith("cuda"):
        options = replace(options, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return options


def obey(actor: Denoiser | Decoder, inbox: ranks.Inbox, answers: bool) -> None:
    """Order after order, until one says close."""
    while True:
        name, arguments = inbox.next()
        if name == "close":
            return
        result = getattr(actor, name)(*arguments)
        if answers:
            ranks.answer(result)
