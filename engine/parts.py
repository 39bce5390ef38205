"""The networks of a session: which ones, out of which files, and what they cost on a device.

    Options ─resolve─► Options without 'auto' ─load_parts─► dit, encoder, decoder + their training

resolve() refuses what cannot work before anything is allocated. load_parts() is the only place
where options become networks: random or from a file, in which precision, with INT8 or not, compiled
or not. How a model was trained decides how it must be played. Its file says so: its encoding of
cameras, its shift of noise levels, its lengths of segments, and whether it is a few-step student.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import attention
import dit
import memory
import moe
import quant
import vae
from context import LENGTHS, Window
from dataset.prompt import embed_prompt, encode_umt5
from engine import walked, weights

ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # H, W of a frame
    "micro": (64, 64),
    "tiny": (64, 64),
    "small": (128, 128),
    "5b": (704, 1280),
    "14b": (704, 1280),
}
DECODERS = {  # channels removed, our file, the released one
    "full": (0.0, "vae.safetensors", "Wan2.2_VAE.pth"),
    "light50": (0.5, "vae50.safetensors", "MG-LightVAE.pth"),
    "light75": (0.75, "vae75.safetensors", "MG-LightVAE_v2.pth"),
}
RELEASED = ROOT / "weights" / "matrix-game-3"  # where README puts the release
PIECE = 4_000_000  # pixels decoded per call: one latent at 720p, a whole segment at 64x64
VIEWS = ("first", "third")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Options:
    preset: str = "tiny"  # micro, tiny, small, 5b, 14b
    weights: str = ""  # file, folder or run; "" is assets/<preset>; "random" needs none
    decoder: str = "full"  # full, light50, light75
    steps: int = 3  # network calls per segment
    method: str = "auto"  # renoise, unipc, euler; auto: what the weights were trained for
    guidance: float = 1.0  # 5 for the released base model
    policy: str = "camera"  # camera, recent, random, none; live: session.policy
    view: str = "first"  # first, third: where the camera of a player is, and which expert draws
    new: int = 10  # new latents per later segment: 10, 5 or 2
    device: str = "auto"  # cpu, cuda, cuda:1
    dtype: str = "auto"  # float32 or bfloat16; auto measures which is faster
    quantize: str = ""  # layers for quant.quantize_: "qkvo" as in the paper, "released:all"
    compile: bool = False  # torch.compile of every block
    bank: int = 4096  # latents kept before the keyframe gate closes
    max_pitch: float = 85.0  # degrees, of player and camera; the game of world.py has 35
    threads: int = 0  # of torch in each process; 0 leaves them
    patience: float = 20.0  # s until a silent rank counts as lost; 30 times that with compile


# ---- what 'auto' means here --------------------------------------------------------------------------------


def resolve(options: Options) -> Options:
    """Options without 'auto', for this machine. What cannot work is refused before anything is allocated."""
    check_choices(options)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.preset in ("5b", "14b") and not device.startswith("cuda"):
        raise ValueError(f"{options.preset} needs a CUDA GPU; found CPU. Try --preset tiny.")

    shipped = ROOT / "assets" / options.preset
    if not options.weights and not list(shipped.glob("*.safetensors")):
        raise ValueError(
            f"No model for preset {options.preset}. Train one: "
            f"python train.py --stage base --preset {options.preset}, "
            "or pass --weights PATH, or play without a model: python play.py --fake"
        )

    options = replace(
        options,
        device=device,
        dtype=weights.faster_dtype(device) if options.dtype == "auto" else options.dtype,
        weights=options.weights or str(shipped),
    )
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0] / 1e9
        if estimate(options) > free:
            raise ValueError(will_not_fit(options, free))
    return options


def check_choices(options: Options) -> None:
    """Every option with a list of possible values has one of them."""
    choices = {
        "preset": SIZES,
        "decoder": DECODERS,
        "new": LENGTHS,
        "policy": memory.POLICIES,
        "view": VIEWS,
        "dtype": DTYPES,
    }
    for name, allowed in choices.items():
        given = getattr(options, name)
        if given not in allowed:
            listed = ", ".join(map(str, allowed))
            raise ValueError(f"{name} must be one of {listed}, got {given!r}")
    if options.steps < 1:
        raise ValueError(f"steps must be at least 1, got {options.steps}")
    if options.device != "auto":
        check_device(options.device)


def check_device(device: str) -> None:
    """A device that torch can name, and that this machine has."""
    kind, _, index = device.partition(":")
    present = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdecimal()):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {device!r}")
    if int(index or 0) >= present:
        raise ValueError(
            f"no device {device}: this machine has {present} of them; try --device cpu"
        )


# ---- networks ----------------------------------------------------------------------------------------------


def vae_config(preset: str, decoder: str = "") -> vae.VAEConfig:
    """Of the full VAE with its encoder, or with the decoder of that name."""
    family = vae.PRESETS.get(preset, vae.PRESETS["wan2.2"])
    full = replace(family, z_dim=dit.PRESETS[preset].in_dim)
    return vae.pruned(full, DECODERS[decoder][0]) if decoder else full


def load_parts(options: Options, *want: str) -> tuple[dict[str, nn.Module], dict]:
    """Those of dit, encoder and decoder that are wanted, and how the dit was trained."""
    nets: dict[str, nn.Module] = {}
    meta: dict = {}
    for part in want:
        if options.weights == "random":
            nets[part] = random_part(part, options)
        elif part == "dit":
            nets[part], meta = load_dit(options)
        else:
            name = options.decoder if part == "decoder" else "full"
            nets[part] = weights.load_vae(vae_of(Path(options.weights), options.preset, name))
        if part == "encoder":
            nets[part].decoder = None  # one that decodes is loaded as such, and may be thinner
        dtype = getattr(torch, options.dtype)
        nets[part].to(options.device, dtype).eval().requires_grad_(False)

    # before it is changed, check that it is a model for what these options ask
    if "dit" in nets:
        check_trained_for(options, nets["dit"], meta)
        if options.quantize:
            quant.quantize_(nets["dit"], options.quantize)
        if options.compile:
            compile_blocks(nets["dit"])
    return nets, how_trained(options, meta)


def random_part(part: str, options: Options) -> nn.Module:
    """Random weights, the same on every rank. What starts at zero is drawn, too: zeros hide mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if part == "dit":
            network = moe.build(options.preset)
        else:
            decoder = options.decoder if part == "decoder" else ""
            network = vae.VAE(vae_config(options.preset, decoder))
        for p in network.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.02)
    return network


def load_dit(options: Options) -> tuple[nn.Module, dict]:
    path = model_of(Path(options.weights))
    return weights.load(path, device=options.device, dtype=getattr(torch, options.dtype))


def model_of(root: Path) -> Path:
    """The student of a folder, ours or the released one, else its base; or the one model that it is."""
    named = [root / name for name in ("student.safetensors", "base.safetensors")]
    return next(filter(Path.exists, [*named, root / "base_distilled_model"]), root)


def vae_of(root: Path, preset: str, name: str) -> Path:
    """The full, light50 or light75 VAE: beside the weights, one folder up, or the shipped one."""
    folders = (root, root.parent, ROOT / "assets" / preset)
    names = DECODERS[name][1:]
    for folder in folders:
        for file in names:
            if (folder / file).is_file():
                return folder / file
    stage = "vae" if name == "full" else "lightvae"
    raise ValueError(
        f"no {name} decoder: looked for {' or '.join(names)} in {', '.join(map(str, folders))}; "
        f"make one with: python train.py --stage {stage} --preset {preset}"
    )


def check_trained_for(options: Options, network: nn.Module, meta: dict) -> None:
    """A model that was made for something else is refused with the flag that it needs."""
    seen = meta.get("view", "first")
    if isinstance(network, moe.Experts):
        network.look(options.view)
    elif meta.get("stage") == "moe" and meta["expert"] != "dense":
        raise ValueError(
            "one expert alone draws nothing; join them: python train.py --export RUN ... FILE"
        )
    elif meta and seen not in (options.view, "both"):
        raise ValueError(
            f"this model has not seen the {options.view} person; use --weights of experts: "
            f"python train.py --stage moe, or --view {seen}"
        )

    preset = meta.get("preset", options.preset)
    if preset != options.preset:
        raise ValueError(f"{options.weights} holds a {preset} model; add --preset {preset}")


def compile_blocks(network: nn.Module) -> None:
    """All blocks are alike: one graph is compiled, and used by every one of them.

    A training meets a window of each length, with and without memory, with and without a gradient:
    more kinds than torch compiles before it gives up.
    """
    torch._dynamo.config.recompile_limit = 32
    for asked in (attention.flash_kernel, attention.is_hopper):
        # its answer goes into the graph as a constant; its own code must not become part of it
        torch.compiler.assume_constant_result(asked)
    for module in network.modules():
        if isinstance(module, dit.Block):
            module.compile()


def how_trained(options: Options, meta: dict) -> dict:
    """What a denoiser must know of its model's training; what older files do not say has a default."""
    anchored = dit.PRESETS[options.preset].ray_channels == 60
    distilled = meta.get("stage") == "distill"
    defaults = {
        "encoding": "anchored" if anchored else "released",
        "shift": 5.0,
        "sink": True,
        "p_memory_off": 0.0,
        # lengths of segments that were trained; random weights are equally bad at all
        "new": "10 5 2" if options.weights == "random" else "10",
    }
    known = {name: meta.get(name, default) for name, default in defaults.items()}
    known["method"] = options.method
    if options.method == "auto":
        known["method"] = "renoise" if distilled else "unipc"
    return known


def reads_umt5(preset: str) -> bool:
    return dit.PRESETS[preset].text_dim >= 4096


def text_encoder(preset: str, path: str) -> Callable[[str], Tensor]:  # prompt -> (n, text_dim)
    """Word hashes; for networks of the released size umT5, whose answers are cached beside it.

    A player and a training ask here, so that a model hears in play what it heard in training.
    """
    config = dit.PRESETS[preset]
    if not reads_umt5(preset) or path == "random":
        return lambda prompt: embed_prompt(prompt, config.text_dim, config.text_len)

    # the released folder has it beside its models, one folder up from each
    root = Path(path)
    folders = (root, root.parent, RELEASED)
    home = next((folder for folder in folders if (folder / "google").is_dir()), root.parent)

    @functools.cache
    def encoder() -> dict[str, Tensor]:
        return weights.read_weights(home / "models_t5_umt5-xxl-enc-bf16.pth")[0]

    return lambda prompt: encode_umt5(prompt, home / "google/umt5-xxl", encoder, home)


def embed(options: Options, prompt: str) -> Tensor:
    """(n, text_dim)"""
    return text_encoder(options.preset, options.weights)(prompt)


def null_text(options: Options) -> Tensor | None:
    """(1, n, text_dim): the negative prompt of this preset, where guidance asks for it."""
    words = dit.NEGATIVE_PROMPTS.get(options.preset)
    if options.guidance == 1 or words is None:
        return None
    return embed(options, words)[None]


# ---- what it costs -----------------------------------------------------------------------------------------


def tokens_per_latent(options: Options) -> int:
    """Tokens per latent."""
    pixels = math.prod(SIZES[options.preset])
    cells = pixels // vae_config(options.preset).stride[1] ** 2
    return cells // math.prod(dit.PRESETS[options.preset].patch)


def at_once(options: Options) -> int:
    """Latents that are decoded in one call: of a large picture few, so that its maps fit."""
    pixels = Window.stride * math.prod(SIZES[options.preset])
    return max(1, PIECE // pixels)


@functools.cache
def estimate(options: Options) -> float:
    """GB on one device: weights, a full memory, and what a segment needs (walked: engine/walked.py)."""
    preset = options.preset
    dtype = getattr(torch, options.dtype)
    # the networks of a session, without numbers; the encoder is another VAE than the decoder
    with torch.device("meta"):
        network = moe.build(preset, "meta")
        decoder = vae.VAE(vae_config(preset, options.decoder))
        encoder = vae.VAE(vae_config(preset))
    encoder.decoder = None
    networks = [net.to(dtype) for net in (network, decoder, encoder)]
    if options.quantize:
        quant.quantize_(network, options.quantize)
    weight_bytes = sum(x.nbytes for net in networks for x in (*net.parameters(), *net.buffers()))

    # what is remembered grows until the bank is full, so it is counted full
    stride = vae_config(preset).stride[1]
    cells = tuple(side // stride for side in SIZES[preset])
    latent = network.cfg.in_dim * math.prod(cells) * dtype.itemsize

    # the first segment remembers nothing, and may still be the longer one
    kinds = (0, 1, Window.first - 1), (Window.memory, Window.past, options.new)
    longest = max(kinds, key=sum)
    device = options.device
    denoising = walked.denoising(network, longest, cells, options.guidance, device)

    # how much is decoded at once: a whole first segment, where pictures are small
    most = min(at_once(options), Window.first - 1)
    decoding, kept = walked.decoding(decoder, most, cells, device)

    # on a GPU the decoder works at the same time
    together = denoising + decoding if "cuda" in device else max(denoising + kept, decoding)
    return (weight_bytes + options.bank * latent + together) / 1e9


def will_not_fit(options: Options, free: float) -> str:
    """The message for a device with so many GB free: what would make it fit, and by how much."""
    H, W = SIZES[options.preset]
    need = estimate(options)
    savings = {
        "--vae light75": need - estimate(replace(options, decoder="light75")),
        "--int8": need - estimate(replace(options, quantize="qkvo")),
    }
    ways = " · ".join(f"{flag} (−{saved:.1f})" for flag, saved in savings.items())
    return (
        f"{options.preset} {options.dtype} at {W}×{H} needs ~{need:.0f} GB, "
        f"{options.device} has {free:.1f} GB free. Options, cheapest first:\n  {ways}"
    )
