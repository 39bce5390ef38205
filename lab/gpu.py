"""What only a GPU can tell: a small network compared, the released size timed and weighed.

    parity      a velocity of the micro network against the CPU: float32, bfloat16, INT8
    decoders    17 frames through every decoder
    segment     a later segment: plain, INT8, compiled, thin decoder; peak memory of each
    pipeline    one rank denoises, one decodes; with nine devices also 8 + 1

    python lab/gpu.py                                  writes results/gpu-PART.json, part by part
    python lab/gpu.py --device cpu --preset micro      the same way, to see that it can be walked;
                                                       writes results/gpu-PART-micro-cpu.json

A part that fails is reported in one line, and the next one is tried: half an hour on a rented
machine is not lost to one of them. The report fills its rows that "need a GPU" from these files,
and leaves those of a part that failed as they are.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder
import contextlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

import realtime
from engine import cli, parts
from engine.actors import moment
from lab import bench
from lab.bench import Row
from lab.costs import PANES

USUAL = {"preset": "5b", "device": "cuda"}
MICRO = "micro"  # a size that a CPU can compute, too
NOTHING = "no CUDA device here: nothing was measured (--device cpu --preset micro walks the code)"


class Found(NamedTuple):
    """Rows of a table, and the values of claims by their names."""

    rows: list[Row]
    claims: dict[str, float]


def seconds(job: Callable[[], object], device: str, rounds: int = 3) -> float:
    """Median; the first call warms up."""
    spent = []
    for _ in range(rounds + 1):
        began = moment(device)
        job()
        spent.append(moment(device) - began)
    return float(torch.tensor(spent[1:]).median())


def peak(device: str) -> float | None:
    """GB at most since the last call; a CPU has no such counter."""
    if not device.startswith("cuda"):
        return None
    most = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return most


# ---- parts --------------------------------------------------------------------------------


@torch.no_grad()
def parity(options: parts.Options) -> Found:
    """Errors of a velocity against the CPU in float32, at a size that a CPU can compute."""
    small = replace(options, preset=MICRO, device="cpu", dtype="float32")
    session = bench.first_segment(small)
    context = session.denoiser.plan(*realtime.walk_actions(40), "camera").context
    x = torch.randn(1, *session.denoiser.now.past.shape[1:2], 10, *context.past.shape[-2:])
    sigma = torch.tensor([0.5])
    right = session.nets["dit"](x, sigma, context)
    rows = []
    for name, dtype, quantize in (
        ("float32", "float32", ""),
        ("bfloat16", "bfloat16", ""),
        ("INT8", "bfloat16", "qkvo"),
    ):
        choice = replace(small, device=options.device, dtype=dtype, quantize=quantize)
        network = parts.load_parts(choice, "dit")[0]["dit"]
        place = {"device": choice.device, "dtype": getattr(torch, dtype)}
        v = network(x.to(**place), sigma.to(choice.device), context.to(**place))
        error = bench.relative_error(v.float().cpu(), right)
        rows.append(Row(f"velocity in {name}", error=error))
    flash = importlib.util.find_spec("flash_attn") is not None
    return Found([*rows, Row("flash-attn installed", measured=float(flash))], {})


@torch.no_grad()
def decoders(options: parts.Options) -> Found:
    """Seconds for 17 frames; 720p for the released size."""
    rows = []
    claims = {}
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    video = torch.zeros(1, 3, 17, *parts.SIZES[options.preset], **place)
    encoder = parts.load_parts(options, "encoder")[0]["encoder"]  # one for all of them
    z = encoder.encode(video)
    for row, name in PANES.items():
        net = parts.load_parts(replace(options, decoder=name), "decoder")[0]["decoder"]

        def decode(net: torch.nn.Module = net) -> None:
            net.decode(z)

        def both(net: torch.nn.Module = net) -> None:
            net.decode(encoder.encode(video))

        for what, job in (("decode", decode), ("encode + decode", both)):
            claim = f"{row}: {what}, 17 frames at 720p"
            claims[claim] = seconds(job, options.device)
            rows.append(Row(f"{row}: {what}, s", measured=claims[claim]))
        rows.append(Row(f"{row}: peak GB", measured=peak(options.device)))
    return Found(rows, claims)


def segment(options: parts.Options) -> Found:
    """One process, one device: frames per second and memory of every variant."""
    variants = {
        "plain": options,
        "INT8": replace(options, quantize="qkvo"),
        "compiled": replace(options, compile=options.device.startswith("cuda")),
        "thin decoder": replace(options, decoder="light75"),
    }
    rows = []
    for name, choice in variants.items():
        session = bench.first_segment(choice)
        t = realtime.time_segment(session, 3, 1)
        rows.append(Row(f"{name}: FPS", predicted=t["fps in turn"], measured=t["fps"]))
        rows.append(Row(f"{name}: s to denoise", measured=t["D"]))
        rows.append(Row(f"{name}: s to decode", measured=t["V"]))
        rows.append(Row(f"{name}: peak GB", measured=peak(options.device)))
        del session
    return Found(rows, {})


def pipeline(options: parts.Options) -> Found:
    """1 + 1 ranks, and 8 + 1 where there are nine devices."""
    cuda = options.device.startswith("cuda")
    have = torch.cuda.device_count() if cuda else 2
    if have < 2:
        raise ValueError("FPS of 1+1 needs two devices")
    light = replace(options, decoder="light75")
    fast = replace(light, quantize="qkvo")
    tried = {"1+1": (light, 1)}
    if have >= 9:
        tried |= {"5B, 8+1 GPUs, all": (fast, 8), "5B, 8+1 GPUs, no INT8": (light, 8)}
    fps = {}
    for name, (choice, count) in tried.items():
        with contextlib.closing(realtime.open_session(choice, count)) as session:
            size = (*parts.SIZES[options.preset], 3)
            session.reset(torch.zeros(size, dtype=torch.uint8))
            fps[name] = realtime.time_segment(session, 3, 1)["fps"]
    return Found([Row(f"{name}: FPS", measured=x) for name, x in fps.items()], fps)


PARTS = {"parity": parity, "decoders": decoders, "segment": segment, "pipeline": pipeline}


# ---- the program --------------------------------------------------------------------------


def differs(options: parts.Options) -> dict[str, str]:
    """What is not as a rented machine would be asked; nothing: these numbers are the ones that count."""
    device = options.device.partition(":")[0]
    asked = {"preset": options.preset, "device": device}
    return {flag: word for flag, word in asked.items() if word != USUAL[flag]}


def command_of(name: str, options: parts.Options) -> str:
    """What to type for the same numbers."""
    flags = [f" --{flag} {word}" for flag, word in differs(options).items()]
    return f"python lab/gpu.py --parts {name}{''.join(flags)}"


def measure(name: str, options: parts.Options, out: Path) -> str:
    """A part as a table and as json; what went wrong, or nothing."""
    try:
        rows, claims = PARTS[name](options)
    except (ValueError, RuntimeError, OSError) as error:
        return f"{name}: not measured ({str(error).splitlines()[0]})"
    device = torch.cuda.get_device_name() if options.device != "cpu" else "a CPU"
    size = MICRO if name == "parity" else options.preset
    about = f"{size}, random weights, on {device}, torch {torch.__version__}"
    table = bench.written(rows, command_of(name, options), about)
    print("\n".join(table), flush=True)
    stored = {"rows": rows, "table": table, "claims": {} if differs(options) else claims}
    words = [name, *differs(options).values()]
    (out / f"gpu-{'-'.join(words)}.json").write_text(json.dumps(stored, indent=1))
    return ""


def main(argv: list[str]) -> int:
    parser = cli.Parser("lab/gpu.py", __doc__.splitlines()[0])
    parser.add_argument("--preset", default=USUAL["preset"], choices=[*parts.SIZES])
    parser.add_argument("--device", default=USUAL["device"])
    parser.add_argument("--out", default=str(cli.beside("results")), help="folder of the json")
    parser.add_argument("--parts", default=" ".join(PARTS), help="some of them, with spaces")
    a = parser.parse_args(argv)
    for name in a.parts.split():
        if name not in PARTS:
            hint = cli.did_you_mean(name, PARTS)
            raise ValueError(f"--parts takes some of {' '.join(PARTS)}, got {name!r}{hint}")
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        print(NOTHING)
        return 0
    parts.check_device(a.device)
    Path(a.out).mkdir(parents=True, exist_ok=True)
    dtype = "float32" if a.device == "cpu" else "bfloat16"
    options = parts.Options(a.preset, "random", device=a.device, dtype=dtype)
    measured = 0
    for name in a.parts.split():
        problem = measure(name, options, Path(a.out))
        measured += not problem
        if problem:
            print(problem, flush=True)
    return 0 if measured else 1


if __name__ == "__main__":
    cli.run(main)
