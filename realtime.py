"""Denoise the next segment while the last one is being decoded.

Paper: §3.4, Table 1 (40 FPS at 720p: 8 GPUs denoise, one decodes).  Released: its parallel start fails as documented.

    FPS = n / P            n = 4·new frames per segment; D, V = seconds to denoise and to decode it
    P = D + V              one after the other, as on one CPU;  max(D, V) side by side, a queue of 2 in between (D = 1, V = 1.551 s: 25.79 FPS)
    key to photon          R/2 + D + V₁ on average, R + D + V₁ at worst; R = n/40 s, V₁ = until one latent is decoded

A Session is one player in one world: reset(image, prompt, seed) -> frame 0; step(keyboard, mouse) -> Chunk of the next frames (56, then 40).
step is submit + collect; submit(k+1) before collect(k) is the pipeline. The noise of segment k depends on (seed, k) alone: undo, restore, replay
and N ranks give the same frames. N + 1 ranks on torch.distributed: 0 .. N−1 share each segment by place (attention.py) and hold equal memories,
rank N decodes; if a rank dies, fails or stalls, rank 0 raises one RuntimeError and all end within seconds.
Departures: frames leave as they are made; no wall at latent 2,048; pixels are rounded, not cut; frame 0 belongs to reset.
Demo: python realtime.py      Tests: pytest tests/test_realtime.py      Bench: python lab/bench.py --suite ablation
"""

import contextlib
import math
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import camera
import dit
import flow
import memory
import moe
import quant
import vae
from context import LENGTHS, Context, Lens, Memory, Segment, Window, segment_cameras
from dataset.prompt import embed_prompt, encode_umt5
from engine import ranks, weights
from memory import MemoryBank

ROOT = Path(__file__).resolve().parent
SIZES = {
    "micro": (64, 64),
    "tiny": (64, 64),
    "small": (128, 128),
    "5b": (704, 1280),
    "14b": (704, 1280),
}  # H, W of a frame
DECODERS = {
    "full": (0.0, "vae.safetensors", "Wan2.2_VAE.pth"),
    "light50": (0.5, "vae50.safetensors", "MG-LightVAE.pth"),
    "light75": (0.75, "vae75.safetensors", "MG-LightVAE_v2.pth"),
}  # channels removed, our file, the released one
WINDOW = Window()
QUEUE, UNDO = 2, 4  # segments that may wait for the decoder; that can be taken back
PIECE = 4_000_000  # pixels decoded per call: one latent at 720p, a whole segment at 64x64


@dataclass(frozen=True)
class Options:
    preset: str = "tiny"  # micro, tiny, small, 5b, 14b
    weights: str = ""  # file, folder or run; "" is assets/<preset>; "random" needs none
    decoder: str = "full"  # full, light50, light75
    steps: int = 3  # network calls per segment
    method: str = "auto"  # renoise, unipc, euler; auto: what the weights were trained for
    guidance: float = 1.0  # 5 for the released base model
    policy: str = "camera"  # camera, recent, random, none; live: session.policy
    view: str = "first"  # first, third: where the camera of a player is, and which expert imagines what it sees
    new: int = 10  # new latents per later segment: 10, 5 or 2
    device: str = "auto"  # cpu, cuda, cuda:1
    dtype: str = "auto"  # float32 or bfloat16; auto measures which is faster
    quantize: str = ""  # layers for quant.quantize_; "qkvo" is the paper's list, "released:all" names the kind too
    compile: bool = False  # torch.compile of every block
    bank: int = 4096  # latents kept before the keyframe gate closes
    max_pitch: float = (
        85.0  # degrees, of the player and of the camera behind it; the game of world.py has 35
    )
    threads: int = 0  # of torch in each process; 0 leaves them
    patience: float = 20.0  # seconds after which a silent rank counts as lost; 30 times that while blocks may compile


class Walk(NamedTuple):
    """Where a walk stands. Never changed in place: an old one is a snapshot."""

    past: Tensor  # (1, C, P, h, w) the last latents
    text: Tensor  # (1, n, text_dim)
    poses: Tensor  # (F+1, 5) float64 from frame `origin` on: what the next window can still see
    keyboard: Tensor  # (F, 6) likewise
    mouse: Tensor  # (F, 2) likewise
    seed: int = 42
    segment: int = 0
    count: int = 1  # latents so far
    origin: int = 0  # frame of row 0, a multiple of 4


class Chunk(NamedTuple):
    frames: Tensor  # (n, H, W, 3) uint8
    info: dict  # segment, first_latent, policy, bank; poses, keyboard, mouse as used; memory [{latent, frame, score, sink}], ms


def resolve(options: Options) -> Options:
    """Fill in what 'auto' means on this machine, and refuse what cannot work before anything is allocated."""
    for name, allowed in (
        ("preset", SIZES),
        ("decoder", DECODERS),
        ("new", LENGTHS),
        ("policy", memory.POLICIES),
        ("view", ("first", "third")),
    ):
        if getattr(options, name) not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(options, name)!r}"
            )
    device = (
        ("cuda" if torch.cuda.is_available() else "cpu")
        if options.device == "auto"
        else options.device
    )
    if options.preset in ("5b", "14b") and not device.startswith("cuda"):
        raise ValueError(f"{options.preset} needs a CUDA GPU; found CPU. Try --preset tiny.")
    if not options.weights and not list((ROOT / "assets" / options.preset).glob("*.safetensors")):
        raise ValueError(
            f"No model for preset {options.preset}. Train one: python train.py --stage base --preset {options.preset}, "
            "or pass --weights PATH, or play without a model: python play.py --fake"
        )
    dtype = faster_dtype(device) if options.dtype == "auto" else options.dtype
    options = replace(
        options,
        device=device,
        dtype=dtype,
        weights=options.weights or str(ROOT / "assets" / options.preset),
    )
    if device.startswith("cuda") and estimate(options) > (
        free := torch.cuda.mem_get_info(device)[0] / 1e9
    ):
        raise ValueError(will_not_fit(options, free))
    return options


def faster_dtype(device: str) -> str:
    return str(weights.faster_dtype(device)).removeprefix("torch.")


def vae_config(
    preset: str, decoder: str = ""
) -> vae.VAEConfig:  # decoder "": the full one, with its encoder
    full = replace(vae.PRESETS.get(preset, vae.PRESETS["wan2.2"]), z_dim=dit.PRESETS[preset].in_dim)
    return vae.pruned(full, DECODERS[decoder][0]) if decoder else full


def load_parts(
    options: Options, *want: str
) -> tuple[dict[str, nn.Module], dict]:  # networks, how they were trained
    """The wanted ones of dit, encoder, decoder, on the device and in the dtype of resolved options."""
    preset, root, dtype, meta, nets = (
        options.preset,
        Path(options.weights),
        getattr(torch, options.dtype),
        {},
        {},
    )
    for part, cut in ((part, options.decoder if part == "decoder" else "") for part in want):
        if (
            options.weights == "random"
        ):  # the same on every rank; no zeros, they flatter timings and hide mistakes
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                nets[part] = (
                    moe.build(preset) if part == "dit" else vae.VAE(vae_config(preset, cut))
                )
                for p in (p for p in nets[part].parameters() if not p.any()):
                    nn.init.normal_(p, std=0.02)
        elif part == "dit":
            shipped = [
                file
                for name in ("student", "base")
                if (file := root / f"{name}.safetensors").exists()
            ]
            nets[part], meta = weights.load([*shipped, root][0], device=options.device, dtype=dtype)
        else:
            nets[part] = load_vae(root, preset, cut or "full")
        nets[part].to(options.device, dtype).eval().requires_grad_(False)
    if isinstance(nets.get("dit"), moe.Experts):
        nets["dit"].look(options.view)
    elif meta.get("stage") == "moe" and meta["expert"] != "dense":
        raise ValueError(
            "one expert alone draws nothing; join them: python train.py --export RUN ... FILE"
        )
    elif meta and meta.get("view", "first") not in (options.view, "both"):
        raise ValueError(
            f"this model has not seen the {options.view} person; use --weights of experts: python train.py --stage moe, "
            f"or --view {meta.get('view', 'first')}"
        )
    if meta.get("preset", preset) != preset:
        raise ValueError(
            f"{options.weights} holds a {meta['preset']} model; add --preset {meta['preset']}"
        )
    if "dit" in nets and options.quantize:
        quant.quantize_(nets["dit"], options.quantize)
    for block in [
        m
        for net in nets.values()
        for m in net.modules()
        if options.compile and isinstance(m, dit.Block)
    ]:
        block.compile()
    method = (
        options.method
        if options.method != "auto"
        else "renoise"
        if meta.get("stage") == "distill"
        else "unipc"
    )
    said = {
        "encoding": "anchored" if dit.PRESETS[preset].ray_channels == 60 else "released",
        "shift": 5.0,
        "sink": True,
        "p_memory_off": 0.0,
        # lengths of segments that were trained; random weights are equally bad at all
        "new": "10 5 2" if options.weights == "random" else "10",
    }
    return nets, {name: meta.get(name, default) for name, default in said.items()} | {
        "method": method
    }


def load_vae(root: Path, preset: str, name: str) -> vae.VAE:
    """The full, light50 or light75 VAE: beside the weights, one folder up, or the shipped one."""
    places, files = (root, root.parent, ROOT / "assets" / preset), DECODERS[name][1:]
    for path in (folder / file for folder in places for file in files if (folder / file).is_file()):
        return weights.vae_from_weights(*weights.read_weights(path))
    raise ValueError(
        f"no {name} decoder: looked for {' or '.join(files)} in {', '.join(map(str, places))}; make one with: "
        f"python train.py --stage {'vae' if name == 'full' else 'lightvae'} --preset {preset}"
    )


def embed(
    options: Options, prompt: str
) -> Tensor:  # word hashes; for released weights umT5, cached beside them
    c, root = dit.PRESETS[options.preset], Path(options.weights)
    root = root if (root / "google").is_dir() else root.parent
    if c.text_dim < 4096 or options.weights == "random":
        return embed_prompt(prompt, c.text_dim, c.text_len)
    return encode_umt5(
        prompt,
        root / "google/umt5-xxl",
        lambda: weights.read_weights(root / "models_t5_umt5-xxl-enc-bf16.pth")[0],
        root,
    )


# ---- what it costs ---------------------------------------------------------------------------------------------------


def places(options: Options) -> int:  # tokens per latent
    return (
        math.prod(SIZES[options.preset])
        // vae_config(options.preset).stride[1] ** 2
        // math.prod(dit.PRESETS[options.preset].patch)
    )


def estimate(options: Options) -> float:
    """GB on one device, from shapes alone: weights + what prepare() keeps + activations + the decoder's maps."""
    c, full, light = (
        dit.PRESETS[options.preset],
        vae_config(options.preset),
        vae_config(options.preset, options.decoder),
    )
    L, width = (
        places(options) * (WINDOW.memory + WINDOW.past + WINDOW.new),
        4 if options.dtype == "float32" else 2,
    )
    with torch.device("meta"):
        weights = sum(
            p.numel()
            for net in (moe.build(options.preset, "meta"), vae.VAE(full), vae.VAE(light))
            for p in net.parameters()
        )
    kept = (
        L * ((2 * c.layers + 10) * c.dim + 2 * c.ffn)
        + 2 * min(PIECE, 40 * math.prod(SIZES[options.preset])) * light.dec_dim
    )
    return (
        (weights + kept) * width
        - (c.layers * 4 * c.dim**2 * (width - 1) if options.quantize else 0)
    ) / 1e9


def will_not_fit(options: Options, free: float) -> str:  # free in GB
    need, (H, W), ways = (
        estimate(options),
        SIZES[options.preset],
        {"--vae light75": ("decoder", "light75"), "--int8": ("quantize", "qkvo")},
    )
    return (
        f"{options.preset} {options.dtype} at {W}×{H} needs ~{need:.0f} GB, {options.device} has {free:.1f} GB free. Options, cheapest "
        "first:\n  "
        + " · ".join(
            f"{flag} (−{need - estimate(replace(options, **dict([way]))):.1f})"
            for flag, way in ways.items()
        )
    )


def clock(device: str) -> float:
    return (
        torch.cuda.synchronize(device) if device.startswith("cuda") else None
    ) or time.perf_counter()


class Denoiser:
    """The model, a walk and everything remembered of it. Same calls, same state: that is how N ranks agree; who replaces `camera`,
    poses (n, 5) float64 -> (n, 4, 4), does so on all of them."""

    def __init__(
        self, model: nn.Module, meta: dict, options: Options, group: dist.ProcessGroup | None = None
    ):
        self.model, self.meta = model, meta
        self.options, self.group = options, group
        self.place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
        self.now, self.history = None, deque(maxlen=UNDO)
        self.camera = (
            partial(camera.behind, max_pitch=options.max_pitch)
            if options.view == "third"
            else camera.pose_to_c2w
        )

    def start(self, now: Walk) -> None:  # with an empty bank
        self.now = now._replace(past=now.past.to(**self.place), text=now.text.to(**self.place))
        self.bank = MemoryBank(
            "released" if self.meta["encoding"] == "released" else "uniform", free=self.options.bank
        )
        self.history.clear()

    def reset(
        self, latent: Tensor, text: Tensor, seed: int, pose: Sequence[float]
    ) -> None:  # (1, C, 1, h, w)
        poses = torch.tensor([list(pose)], dtype=torch.float64)
        self.start(Walk(latent, text[None], poses, torch.zeros(0, 6), torch.zeros(0, 2), seed))
        self.bank.append(
            self.now.past[0],
            segment_cameras(self.camera(poses)[None], 0, 1)[0].float(),
            torch.tensor([0]),
        )

    def bind(
        self, keyboard: Tensor, mouse: Tensor, policy: str
    ) -> tuple[Context, list[dict], list[Tensor], Tensor, Tensor]:
        """A segment under these actions: its context, what is recalled, the walk with it, times and cameras of its new latents."""
        now, n = self.now, len(keyboard) // WINDOW.stride
        P = now.past.shape[2]
        ahead = camera.integrate(now.poses[-1].tolist(), keyboard, mouse, self.options.max_pitch)[
            1:
        ]
        walked = [
            torch.cat(pair)
            for pair in ((now.poses, ahead), (now.keyboard, keyboard), (now.mouse, mouse))
        ]

        # the kept rows begin at latent origin/4; the clock goes on from there
        kept = now.origin // WINDOW.stride
        walk = SimpleNamespace(
            c2w=self.camera(walked[0])[None], keyboard=walked[1][None], mouse=walked[2][None]
        )
        segment = Segment.cut(walk, now.count - P - kept, P + n, self.meta["encoding"])
        segment = replace(segment, times=segment.times + kept)

        found, picks = None, []
        if now.segment and policy != "none":
            found, picks = self.recall(segment.asking(n)[0].float(), now.count - P, policy)
        lens = Lens(self.meta["encoding"], vae_config(self.options.preset).stride[1])
        context = segment.context(now.past, now.text, found, lens).to(**self.place)
        return context, picks, walked, segment.times[0, P:], segment.cameras[0, P:].float()

    def run(self, keyboard: Tensor, mouse: Tensor, policy: str) -> tuple[Tensor, dict]:
        """(4n, 6), (4n, 2) -> n latents (1, C, n, h, w) and what happened: info has the actions and poses that were used."""
        now, o = self.now, self.options
        if self.meta.get("p_memory_off", 0) >= 1:  # never trained with a memory
            policy = "none"
        began = clock(o.device)
        context, picks, walked, times, cameras = self.bind(keyboard, mouse, policy)
        recalled = clock(o.device)

        # the noise of a segment depends on the seed and its number alone
        generator = torch.Generator(o.device).manual_seed(now.seed * 1_000_003 + now.segment)
        shape = (1, now.past.shape[1], len(times), *now.past.shape[-2:])
        noise = torch.randn(shape, generator=generator, device=o.device)
        sigmas, method = flow.sigma_grid(o.steps, self.meta["shift"]), self.meta["method"]
        x0 = flow.sample(
            self.model, context, sigmas, noise, method, o.guidance, generator, self.group
        ).to(**self.place)
        if not x0.isfinite().all():
            raise ValueError(
                f"segment {now.segment} is not finite: broken weights, or {o.dtype} is too narrow; try --dtype float32"
            )

        self.remember(x0, cameras, times, walked)
        names = ("poses", "keyboard", "mouse")
        used = {
            name: rows[-len(keyboard) :].tolist() for name, rows in zip(names, walked, strict=True)
        }
        return x0, {
            "segment": now.segment,
            "first_latent": now.count,
            "policy": policy,
            "memory": picks,
            "bank": len(self.bank),
            **used,
            "ms": {
                "retrieve": 1e3 * (recalled - began),
                "denoise": 1e3 * (clock(o.device) - recalled),
            },
        }

    def remember(self, x0: Tensor, cameras: Tensor, times: Tensor, walked: list[Tensor]) -> None:
        """New latents join the bank and the past; the walk goes on behind them, and can be undone."""
        now, n = self.now, len(times)
        self.history.append((now, self.bank.size))
        self.bank.append(x0[0], cameras, times)
        # no window looks further back than this many frames
        drop = max(0, WINDOW.stride * (now.count + n - WINDOW.past - 4) - now.origin)
        self.now = Walk(
            torch.cat([now.past, x0], 2)[:, :, -WINDOW.past :],
            now.text,
            *(rows[drop:] for rows in walked),
            now.seed,
            now.segment + 1,
            now.count + n,
            now.origin + drop,
        )

    def recall(
        self, poses: Tensor, before: int, policy: str
    ) -> tuple[Memory, list[dict]]:  # (5, 4, 4) of the new latents that ask
        """The memory of a segment, newest query first, and its description for whoever watches."""
        generator = torch.Generator().manual_seed(self.now.seed * 1_000_003 + self.now.segment)
        slots, scores = self.bank.retrieve(
            poses, before, policy, sink := self.meta.get("sink", True), generator
        )
        found = self.bank.read(slots)
        return found, [
            {
                "latent": t,
                "frame": WINDOW.stride * t,
                "score": round(s, 3),
                "sink": sink and policy == "camera" and t <= 1,
            }
            for t, s in zip(found.times[0].tolist(), scores.tolist(), strict=True)
        ]

    def dump(self) -> dict[str, Tensor]:  # everything but the weights
        bank = {f"bank.{name}": x for name, x in self.bank.state_dict().items()}
        return (
            bank
            | dict(zip(Walk._fields[:5], self.now, strict=False))
            | {"numbers": torch.tensor(self.now[5:])}
        )

    def load(self, state: dict[str, Tensor]) -> None:
        self.start(Walk(*(state[name] for name in Walk._fields[:5]), *state["numbers"].tolist()))
        bank = {
            name.removeprefix("bank."): x for name, x in state.items() if name.startswith("bank.")
        }
        self.bank.load_state_dict(
            {name: x if name == "times" else x.to(self.options.device) for name, x in bank.items()}
        )

    def undo(self) -> None:
        self.now, self.bank.size = (
            self.history.pop()
        )  # the bank only grows at its end: shorter is older


class Decoder:
    """Latents to uint8 frames, one continuous video."""

    def __init__(self, network: vae.VAE, options: Options):
        self.network, self.options, self.state, self.history = (
            network,
            options,
            None,
            deque(maxlen=UNDO),
        )
        self.place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
        self.stream = (
            torch.cuda.stream(torch.cuda.Stream(options.device))
            if "cuda" in options.device
            else contextlib.nullcontext()
        )

    def decode(
        self, z: Tensor, fresh: bool = False
    ) -> tuple[Tensor, float]:  # (1, C, n, h, w) -> (4n, H, W, 3), ms
        start, frames, state = time.perf_counter(), [], None if fresh else self.state
        self.history.append(self.state)
        with self.stream:
            for part in z.to(**self.place).split(
                max(1, PIECE // (WINDOW.stride * math.prod(SIZES[self.options.preset]))), 2
            ):
                video, state = self.network.decode_stream(part, state, clamp=True)
                frames.append(
                    video[0].float().add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).cpu()
                )
        self.state = state
        return torch.cat(frames), 1e3 * (time.perf_counter() - start)

    def dump(self) -> dict[str, Tensor]:
        return {str(slot): x.cpu() for slot, x in (self.state or {}).items()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.state = {
            int(slot): x.to(**self.place, memory_format=torch.channels_last_3d)
            for slot, x in state.items()
        } or None
        self.history.clear()

    def undo(self) -> None:
        self.state = self.history.pop()


# ---- N + 1 ranks -----------------------------------------------------------------------------------------------------


ORDERS = {  # what rank 0 may ask of whom
    "denoise": ("reset", "run", "load", "undo", "close"),
    "decode": ("decode", "dump", "load", "undo", "close"),
}


def serve(rank: int, world: int, port: int, key: bytes, options: Options) -> None:
    """The life of every rank but 0: build the part it plays, then do what rank 0 says until it closes."""
    ranks.end_with_parent()
    store = ranks.join_store(port)
    box = "decode" if rank == world - 1 else "denoise"
    try:
        torch.set_num_threads(options.threads or torch.get_num_threads())
        nets, meta = load_parts(options, "decoder" if box == "decode" else "dit")
        team = ranks.Team(rank, world, store, options, nets.get("dit"), key)
        if box == "decode":
            actor = Decoder(nets["decoder"], options)
        else:
            actor = Denoiser(nets["dit"], meta, options, team.group)
        inbox = ranks.Inbox(store, box, key, ORDERS[box])
        while True:
            name, args = inbox.next()
            if name == "close":
                break
            result = getattr(actor, name)(*args)
            if box == "decode":
                ranks.answer(result)
        dist.destroy_process_group()
    except Exception as error:  # whatever it is, rank 0 must hear of it, if it lives
        with contextlib.suppress(RuntimeError):
            if not (
                isinstance(error, RuntimeError)
                and any(word in str(error) for word in ("onnection", "gloo", "died"))
            ):
                store.set("failed", f"rank {rank} ({box}) failed: {type(error).__name__}: {error}")
        os._exit(1)


def open_session(options: Options, dit_ranks: int = 0) -> "Session | None":
    """One process (0), or rank 0 of dit_ranks + 1, the others spawned here. Under torchrun its rank 0 does so; the rest get None."""
    options, started, rank, crew = (
        resolve(options),
        int(os.environ.get("WORLD_SIZE", 1)),
        int(os.environ.get("RANK", 0)),
        [],
    )
    if rank or not (count := dit_ranks or started - 1):
        return None if rank else Session(options)
    if not 1 <= count <= (most := places(options)) or started not in (1, count + 1):
        raise ValueError(
            f"{count} denoising ranks cannot work here: {options.preset} has {most} places to share, and {started} processes were "
            f"started. Use 1 to {most}; torchrun --nproc_per_node needs one more"
        )
    if (cuda := options.device.startswith("cuda")) and not dist.is_nccl_available():
        raise ValueError(
            "this torch has no nccl, which ranks on GPUs need; use --device cpu or another build of torch"
        )
    store, key = ranks.open_store(), ranks.new_key()
    for r in range(1, count + 1):
        place = replace(options, device=f"cuda:{r}" if cuda else "cpu")
        crew.append(
            multiprocessing.get_context("spawn").Process(
                target=serve, args=(r, count + 1, store.port, key, place), daemon=True
            )
        )
        crew[-1].start()
    return Session(options, store, crew, key)


class Session:
    """One player in one world; knows nothing of pages. With a store (see open_session) it is rank 0 of all who meet there."""

    def __init__(
        self,
        options: Options = Options(),
        store: dist.Store | None = None,
        crew: Sequence[multiprocessing.Process] = (),
        key: bytes = b"",  # what the orders of rank 0 are signed with
    ):
        self.options, self.policy, self.pending = resolve(options), options.policy, deque()
        self.pool = (
            ThreadPoolExecutor(1) if store or "cuda" in self.options.device else None
        )  # two threads on the same cores: half the speed
        torch.set_num_threads(options.threads or torch.get_num_threads())
        self.nets, meta = load_parts(
            self.options, "dit", "encoder", *(() if store else ("decoder",))
        )
        self.lengths = [int(n) for n in meta["new"].split()]
        if self.options.new not in self.lengths:
            print(
                f"these weights never saw segments of {self.options.new} new latents: "
                f"playing {self.lengths[0]} at once",
                flush=True,
            )
            self.options = replace(self.options, new=self.lengths[0])
        self.team = (
            ranks.Team(0, len(crew) + 1, store, self.options, self.nets["dit"], key, crew)
            if store
            else None
        )
        self.denoiser = Denoiser(
            self.nets["dit"], meta, self.options, self.team.group if store else None
        )
        self.decoder = self.team or Decoder(self.nets["decoder"], self.options)

    def everywhere(
        self, name: str, *args: object
    ) -> object:  # the same call on every denoising rank
        with self.team.guarded("denoiser") if self.team else contextlib.nullcontext():
            if self.team:
                self.team.post("denoise", name, *args)
            return getattr(self.denoiser, name)(*args)

    @property
    def frames_needed(self) -> int:  # rows of actions that the next step takes
        return WINDOW.stride * (
            self.options.new
            if self.denoiser.now and self.denoiser.now.segment
            else WINDOW.first - 1
        )

    def reset(
        self,
        image: Tensor,
        prompt: str = "",
        seed: int = 42,
        pose: Sequence[float] = (0.0, -1.6, 0.0, 0.0, 0.0),
    ) -> Chunk:
        """Start from a picture (H, W, 3) uint8. Returns it as the model sees it: frame 0."""
        image, shape, encoder = (
            torch.as_tensor(image),
            (*SIZES[self.options.preset], 3),
            self.nets["encoder"],
        )
        if tuple(image.shape) != shape or image.dtype != torch.uint8:
            raise ValueError(
                f"image must be {shape} uint8 for preset {self.options.preset}, got {tuple(image.shape)} {image.dtype}"
            )
        self.pending.clear()
        latent = encoder.encode(
            image.permute(2, 0, 1)[None, :, None].to(**self.denoiser.place) / 127.5 - 1
        ).cpu()
        self.everywhere("reset", latent, embed(self.options, prompt), int(seed), tuple(pose))
        self.decode(
            latent,
            {
                "segment": -1,
                "first_latent": 0,
                "policy": self.policy,
                "bank": 1,
                "memory": [],
                "poses": [list(pose)],
                "ms": {},
            },
            True,
        )
        return self.collect()

    def submit(self, keyboard: Tensor, mouse: Tensor) -> None:
        """Denoise the next segment and hand it to the decoder. Read the keys as late as possible before this."""
        keyboard, mouse = self.checked(keyboard, mouse)
        camera.choose("policy", self.policy, memory.POLICIES)
        self.idle(2 * QUEUE)
        self.decode(*self.everywhere("run", keyboard, mouse, self.policy))

    def checked(self, keyboard: Tensor, mouse: Tensor) -> tuple[Tensor, Tensor]:
        keyboard, mouse, n = (
            torch.as_tensor(keyboard).float(),
            torch.as_tensor(mouse).float(),
            self.frames_needed,
        )
        if not self.denoiser.now:
            raise ValueError("no world yet: call reset(image) before the first step")
        if (keyboard.shape, mouse.shape) != ((n, 6), (n, 2)) or not (
            keyboard.isfinite().all() and mouse.isfinite().all()
        ):
            raise ValueError(
                f"segment {self.denoiser.now.segment} takes finite keyboard ({n}, 6) and mouse ({n}, 2), got {tuple(keyboard.shape)} "
                f"and {tuple(mouse.shape)}; actions of the future belong to the next step"
            )
        return keyboard, mouse

    def decode(self, latents: Tensor, info: dict, fresh: bool = False) -> None:
        """In order, in one thread or by collect(). At most QUEUE segments wait: a slow decoder costs time, never memory."""
        if self.pool and len(self.pending) > QUEUE:
            self.pending[-QUEUE - 1][0].exception()  # blocks until that one is done
        work = partial(self.decoder.decode, latents, fresh)
        self.pending.append((self.pool.submit(work) if self.pool else work, info))

    def collect(self) -> Chunk:
        """The oldest submitted segment, as soon as it is decoded."""
        if not self.pending:
            raise ValueError("nothing to collect: submit() first")
        work, info = self.pending.popleft()
        frames, info["ms"]["decode"] = work.result() if self.pool else work()
        return Chunk(frames, info)

    def step(self, keyboard: Tensor, mouse: Tensor) -> Chunk:
        return self.submit(keyboard, mouse) or self.collect()

    def undo(self) -> None:
        """Take the last segment back: latents, poses, memory, decoder. The same actions then give the same frames."""
        self.idle()
        if not self.denoiser.history:
            raise ValueError(
                f"nothing to undo: up to {UNDO} steps since the start or the last restore can be taken back"
            )
        self.everywhere("undo")
        self.decoder.undo()

    def idle(self, most: int = 0) -> None:  # nothing, or not too much, is being decoded
        if len(self.pending) > most:
            raise ValueError(
                f"{len(self.pending)} segments were submitted and not collected: collect() them first"
            )

    def save(self, path: str | Path) -> None:
        """The whole state in one safetensors file; after restore() the same actions give the same frames."""
        self.idle()
        state = self.denoiser.dump() | {
            f"decoder.{name}": x for name, x in self.decoder.dump().items()
        }
        weights.write_weights(
            path,
            state,
            {"session": self.options.preset, "policy": self.policy, "view": self.options.view},
        )

    def restore(self, path: str | Path) -> None:
        self.idle()
        state, said = weights.read_weights(path)
        if (said.get("session"), said.get("view", "first")) != (
            self.options.preset,
            self.options.view,
        ):
            raise ValueError(
                f"{path} is no saved session of preset {self.options.preset} in the {self.options.view} person; "
                f"it says: {said.get('session', 'no session')}, {said.get('view', 'first')} person"
            )
        self.policy = said["policy"]
        self.everywhere(
            "load", {name: x for name, x in state.items() if not name.startswith("decoder.")}
        )
        self.decoder.load(
            {
                name.removeprefix("decoder."): x
                for name, x in state.items()
                if name.startswith("decoder.")
            }
        )

    def close(self) -> None:
        """End the other ranks in good order."""
        if self.team:
            self.pool.shutdown()
            self.team.post("denoise", "close")
            self.team.post("decode", "close")
            dist.destroy_process_group()


# ---- benchmark -------------------------------------------------------------------------------------------------------


def walk_actions(n: int) -> tuple[Tensor, Tensor]:  # forward, turning right 1.5° a frame
    return torch.tensor([1.0, 0, 0, 0, 0, 0]).repeat(n, 1), torch.tensor([0.0, 0.1]).repeat(n, 1)


def time_segment(session: Session, rounds: int = 5, warmup: int = 2) -> dict[str, float]:
    """Of steady, pipelined segments: medians of period P, denoise D, decode V in seconds, frames/s, key to photon at 40 FPS."""
    session.submit(*walk_actions(session.frames_needed))
    rows, n, last = [], WINDOW.stride * session.options.new, 0.0
    for _ in range(warmup + rounds):
        session.submit(*walk_actions(n))
        ms, now = session.collect().info["ms"], time.perf_counter()
        rows, last = (
            [*rows, (now - last, (ms["retrieve"] + ms["denoise"]) / 1e3, ms["decode"] / 1e3)],
            now,
        )
    session.collect()
    P, D, V = torch.tensor(rows[warmup:]).median(0).values.tolist()
    wait = {
        "mean": n / 80 + D + V / session.options.new,
        "worst": n / 40 + D + V / session.options.new,
    }  # R/2 | R + D + V₁
    return {
        "P": P,
        "D": D,
        "V": V,
        "fps": n / P,
        "predicted": n / max(D, V),
        "serial": n / (D + V),
    } | wait


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
    print(
        f"denoise {t['D']:.3f} s, decode {t['V']:.3f} s: {t['serial']:.0f} FPS in turn, {t['predicted']:.0f} side by side on two machines, "
        f"{t['fps']:.0f} in this one; key to photon {t['mean']:.2f} s on average at 40 FPS"
    )


if __name__ == "__main__":
    if "--bench" in sys.argv:
        print(
            "error: --bench is a program of its own: python lab/bench.py --suite model",
            file=sys.stderr,
        )
        sys.exit(2)
    demo()
