"""What a segment costs: counted, then timed.

Counted: FLOPs of every part by formula, and what they would take on eight H200s. Timed: variants of
a segment in turns, so that a busy moment of the machine hits all alike. Every quantity is of one
suite:

    model      FLOPs of every part, frames per second on n GPUs by arithmetic
    ladder     from the released order of work to ours, and fewer latents at once
    ablation   the paper's Table 1 and 2: INT8, thinner decoders, retrieval
    pipeline   two processes, one denoises while the other decodes
    plain      the network beside its plain form (lab/plain.py), here and at 40 M parameters

    python lab/bench.py --suite model --preset 5b --decoder light75
    python lab/bench.py --suite ablation --weights assets/tiny
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder
import argparse
import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

import dit
import realtime
from dit import DiT
from engine import actors, cli, parts, weights
from lab import plain
from lab.run import origin
from vae import VAEConfig

# FLOP/s that others reached: FastWan2.2's DiT, the published decoders
H200 = {"denoise": 587e12, "full": 377e12, "light50": 239e12, "light75": 139e12}
EXCHANGE = 0.022  # seconds among ranks, per segment
CLEAN = 9  # memory and past latents of a later segment
RETRIEVAL = 5 * 441 * 0.0019  # seconds: five queries, 441 frames, 1.9 ms for a pair of meshes
SUITES = ("model", "ablation", "ladder", "pipeline", "plain")
HEAD = "| what | paper | predicted | measured | error |"


class Row(NamedTuple):
    what: str
    paper: float | None = None
    predicted: float | None = None  # before the run
    measured: float | None = None
    error: float | None = None  # of the latents, relative


class Cost(NamedTuple):
    """FLOPs, 2 per multiply-add."""

    once: float  # ours: before the first step of a segment
    step: float  # ours: of every step
    released: float  # of every step, where everything is computed anew for every token


# ---- counted ------------------------------------------------------------------------------


def dit_flops(
    c: dit.DiTConfig,
    S: int,  # places per latent
    clean: int = CLEAN,
    new: int = 10,
) -> dict[str, Cost]:
    """A segment by part. A test counts the modules themselves."""
    T = clean + new
    D = c.dim
    L = S * T
    w = c.action_width
    patch = math.prod(c.patch)
    layers = c.layers

    # queries of all blocks: the last one asks for new tokens only, unless it has actions
    last = L if layers - 1 in c.action_blocks else S * new
    Q = (layers - 1) * L + last

    # linear maps are 2·in·out per token; a product with keys and one with values 4·D per pair
    camera = layers * 8 * L * D * D
    rays = 2 * L * (c.ray_channels * patch * D + 2 * D * D)
    text = c.text_len
    words = 2 * text * (c.text_dim * D + D * D) + layers * 4 * text * D * D
    asking = 4 * D * D + 4 * text * D

    # actions: a window of keys per latent, then attention over time at every place
    A = len(c.action_blocks)
    keys = A * T * 2 * c.action_window * c.action_hidden * (6 + c.action_hidden + 2 * w)
    per_token = (4 * D + 2 * c.action_window + 4 * w) * w + 4 * T * w
    actions = A * 2 * L * per_token

    time_row = 2 * (c.freq_dim * D + 7 * D * D)
    ends = 2 * S * patch * c.in_dim * D
    qkvo = 4 * D * D * (Q + layers * L)
    return {
        "self-attention qkvo": Cost(0, qkvo, layers * 8 * L * D * D),
        "self-attention": Cost(0, 4 * Q * L * D, layers * 4 * L * L * D),
        "text attention": Cost(words, Q * asking, words + layers * L * asking),
        "feed-forward": Cost(0, 4 * Q * D * c.ffn, layers * 4 * L * D * c.ffn),
        "camera": Cost(camera, 0, camera),
        "rays": Cost(rays, 0, rays),
        "actions": Cost(keys, actions, keys + actions),
        "time": Cost(0, 2 * time_row, L * time_row),
        "patches, head": Cost(ends * clean, 2 * ends * new, 2 * ends * T),
    }


def total(parts_of_segment: dict[str, Cost]) -> Cost:
    return Cost(*map(sum, zip(*parts_of_segment.values(), strict=True)))


def vae_flops(
    c: VAEConfig,
    h: int,  # cells of a latent
    w: int,
) -> float:
    """To decode one later latent."""
    widths = [c.dec_dim * m for m in (c.dim_mult[-1], *c.dim_mult[::-1])]
    places = h * w
    frames = 1

    def block(a: int, b: int) -> int:
        """Two 27-tap convolutions, and a shortcut if the widths differ."""
        shortcut = a * b if a != b else 0
        return 2 * frames * places * (27 * a * b + 27 * b * b + shortcut)

    # the way in: two convolutions, attention among the places, two blocks
    first = widths[0]
    count = 2 * places * (c.z_dim**2 + 27 * c.z_dim * first)
    count += 2 * places * (4 * first**2 + 2 * places * first)
    count += 2 * block(first, first)
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        count += block(a, b) + c.res_blocks * block(b, b)
        if i == len(c.temporal):
            continue
        # time doubles first, then space
        if c.temporal[::-1][i]:
            count += 12 * frames * places * b * b
            frames *= 2
        places *= 4
        count += 2 * frames * places * 9 * b * b
    return count + 2 * frames * places * 27 * widths[-1] * 3 * c.patch**2


def exact_reuse(cost: Cost, steps: int) -> float:
    """How many times faster than the release a segment must be if only multiply-adds count."""
    return steps * cost.released / (cost.once + steps * cost.step)


def costs_of(options: parts.Options) -> dict[str, Cost]:
    """Of a later segment."""
    config = dit.PRESETS[options.preset]
    return dit_flops(config, parts.tokens_per_latent(options), CLEAN, options.new)


def segment_flops(options: parts.Options) -> tuple[float, float, float]:
    """Of a later segment: (denoise as here, denoise as released, decode)."""
    config = parts.vae_config(options.preset, options.decoder)
    H, W = parts.SIZES[options.preset]
    latent = vae_flops(config, H // config.stride[1], W // config.stride[2])
    cost = total(costs_of(options))
    ours = cost.once + options.steps * cost.step
    return ours, options.steps * cost.released, options.new * latent


def model(options: parts.Options) -> list[Row]:
    """TFLOP of a segment by part, and frames per second on n H200 of which the last decodes."""
    ours, released, decode = segment_flops(options)
    rows = [Row("as released", None, released / 1e12), Row("GB", None, parts.estimate(options))]
    for part, cost in costs_of(options).items():
        count = cost.once + options.steps * cost.step
        rows.append(Row(f"TF of {part}", None, count / 1e12))
    rows.append(Row("TF to denoise", None, ours / 1e12))
    rows.append(Row("TF to decode", None, decode / 1e12))

    frames = realtime.WINDOW.stride * options.new
    for n in range(1, 10):
        denoise_s = ours / H200["denoise"] / max(1, n - 1)
        if n > 2:
            denoise_s += EXCHANGE
        decode_s = decode / H200[options.decoder]
        segment_s = max(denoise_s, decode_s) if n > 1 else denoise_s + decode_s
        rows.append(Row(f"FPS on {n} H200, projected", None, frames / segment_s))
    return rows


# ---- timed --------------------------------------------------------------------------------


class Timed(NamedTuple):
    quartiles: dict[str, list[float]]  # seconds
    errors: dict[str, float | None]  # of the latents, against the release; None: other latents

    def median(self, name: str) -> float:
        return self.quartiles[name][1]


def plain_and_fast(options: parts.Options) -> tuple[parts.Options, parts.Options]:
    """As the release computes, and as this device is fastest."""
    cpu = options.device == "cpu"
    plain = replace(options, dtype="float32" if cpu else "bfloat16")
    return plain, replace(options, dtype="bfloat16", compile=not cpu)


def denoiser_of(session: realtime.Session, options: parts.Options) -> actors.Denoiser:
    """One that stands where the session stands."""
    network = parts.load_parts(options, "dit")[0]["dit"]
    denoiser = actors.Denoiser(network, session.denoiser.meta, options)
    denoiser.load(session.denoiser.dump())
    return denoiser


def keep_nothing(network: DiT) -> None:
    """As released: nothing is kept from one step to the next."""

    def prepare(context: object, group: object = None) -> None:
        return None

    network.prepare = prepare


def first_segment(options: parts.Options) -> realtime.Session:
    """A session after its first segment, from noise as a start picture."""
    session = realtime.Session(options)
    g = torch.Generator().manual_seed(0)
    size = (*parts.SIZES[options.preset], 3)
    session.reset(torch.randint(0, 256, size, dtype=torch.uint8, generator=g))
    session.step(*realtime.walk_actions(session.frames_needed))
    return session


def compete(
    options: parts.Options,  # of the release, which all are compared with
    variants: dict[str, parts.Options],
    decoders: Sequence[str],
    rounds: int,
) -> Timed:
    """One segment in every variant, A B C … A B C …; the first round is a warm-up."""
    session = first_segment(options)
    runs: dict = {"as released": denoiser_of(session, options)}
    keep_nothing(runs["as released"].model)
    for name, choice in variants.items():
        runs[name] = denoiser_of(session, choice)
    fast = plain_and_fast(options)[1]
    for name in decoders:
        choice = replace(fast, decoder=name)
        runs[name] = actors.Decoder(parts.load_parts(choice, "decoder")[0]["decoder"], choice)

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    errors: dict[str, float | None] = {}
    right = torch.zeros(0)
    for name, actor in [*runs.items()] * (rounds + 1):
        if isinstance(actor, actors.Decoder):
            seconds[name].append(actor.decode(right)[1] / 1e3)
            continue
        frames = realtime.WINDOW.stride * actor.options.new
        x0, info = actor.run(*realtime.walk_actions(frames), options.policy)
        actor.undo()
        seconds[name].append(info["ms"]["denoise"] / 1e3)
        right = x0.float() if name == "as released" else right
        errors[name] = relative_error(x0.float(), right)
    quarters = torch.tensor([0.25, 0.5, 0.75])
    quartiles = {
        name: torch.tensor(x[1:]).quantile(quarters).tolist() for name, x in seconds.items()
    }
    return Timed(quartiles, errors)


def relative_error(x: torch.Tensor, right: torch.Tensor) -> float | None:
    """Of latents; none where a segment has others."""
    if x.shape != right.shape:
        return None
    return float((x - right).norm() / right.norm())


def ladder(options: parts.Options, rounds: int) -> list[Row]:
    """Times faster than the release, step by step."""
    plain, fast = plain_and_fast(options)
    variants = {
        "exact reuse": plain,
        "fast": fast,
        "5 new": replace(fast, new=5),
        "2 new": replace(fast, new=2),
    }
    timed = compete(plain, variants, (), rounds)
    rows = []
    for name, (low, middle, high) in timed.quartiles.items():
        what = (
            f"{name}: {1e3 * middle:.1f} ms, IQR {1e3 * (high - low):.1f}; times faster per frame"
        )
        wish = None
        if name == "exact reuse":
            wish = exact_reuse(total(costs_of(options)), options.steps)
        made = 1.0 if name not in variants else variants[name].new / plain.new  # of the frames
        faster = made * timed.median("as released") / middle
        rows.append(Row(what, None, wish, faster, timed.errors[name]))
    return rows


def ablation(options: parts.Options, rounds: int) -> list[Row]:
    """How much slower without one part."""
    plain, fast = plain_and_fast(options)
    variants = {"exact": plain, "int8": replace(plain, quantize="qkvo"), "fast": fast}
    for which in ("qkvo", "all"):
        variants[f"fast {which}"] = replace(fast, quantize=which)
    timed = compete(plain, variants, tuple(parts.DECODERS), rounds)
    # ratios of medians: without a part over with it
    exact = timed.median("exact")
    D = timed.median("fast")
    V = timed.median("full")
    half = timed.median("light50")
    light = timed.median("light75")
    slow = exact / timed.median("int8")
    qkvo = D / timed.median("fast qkvo")
    every = D / timed.median("fast all")
    mesh = "− fast retrieval, by formula: 5 x 441 pairs of trimesh at 1.9 ms"
    return [
        Row("− INT8, slow projections", 1.461, 0.6, slow, timed.errors["int8"]),
        Row("− INT8, bfloat16", None, 0.5, qkvo, timed.errors["fast qkvo"]),
        Row("− INT8, all layers", None, 0.4, every, timed.errors["fast all"]),
        Row("− light VAE, async", 1.551, 3, max(D, V) / max(D, light)),
        Row("− light VAE, serial", None, 2, (D + V) / (D + light)),
        Row("50 % VAE", 2.53, 2.5, V / half),
        Row("75 % VAE", 5.85, 5, V / light),
        Row(mesh, 6.06, None, 1 + RETRIEVAL / D),
    ]


def pipeline(options: parts.Options, rounds: int) -> list[Row]:
    """Two processes with one thread each, beside one after the other."""
    opened = realtime.open_session(replace(options, threads=1), 1)
    with contextlib.closing(opened) as session:
        session.reset(torch.zeros(*parts.SIZES[options.preset], 3, dtype=torch.uint8))
        t = realtime.time_segment(session, rounds)
    gain = t["fps side by side"] / t["fps in turn"]
    return [
        Row("FPS of 1+1 processes", None, t["fps side by side"], t["fps"]),
        Row("key to photon, mean s", None, None, t["mean"]),
        Row("side by side over serial", None, gain, t["fps"] / t["fps in turn"]),
    ]


def wider(options: parts.Options) -> list[tuple[str, dit.DiTConfig, int]]:
    """Name, network and side of a latent: of this preset, and of tiny at 40 M parameters, 1,900 tokens."""
    H = parts.SIZES[options.preset][0]
    side = H // parts.vae_config(options.preset).stride[1]
    small = dit.PRESETS[options.preset]
    large = replace(dit.PRESETS["tiny"], dim=576, heads=9, ffn=1440)
    return [(options.preset, small, side), ("40 M", large, 20)]


@torch.no_grad()
def beside_plain(config: dit.DiTConfig, side: int, steps: int, rounds: int) -> tuple[float, float]:
    """How many times faster than its plain form a segment is denoised, and how far they are apart.

    In seconds of the processor, in turns: what else this machine does counts for neither.
    """
    torch.manual_seed(0)
    network = dit.DiT(config).eval()
    for p in network.parameters():  # nothing silent
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    context = dit.random_context(config, size=side)
    noisy = torch.randn(1, config.in_dim, 10, side, side)
    levels = torch.linspace(1, 0.3, steps)[:, None]

    def ours() -> list[torch.Tensor]:
        prepared = network.prepare(context)
        return [network(noisy, sigma, context, prepared) for sigma in levels]

    def plainly() -> list[torch.Tensor]:
        return [plain.velocity(network, noisy, sigma, context) for sigma in levels]

    # the first round warms up, and says how far they are apart
    apart = relative_error(torch.cat(ours()), torch.cat(plainly()))
    ratios = []
    for _ in range(rounds):
        seconds = []
        for run in (plainly, ours):
            began = time.process_time()
            run()
            seconds.append(time.process_time() - began)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios), apart


def against_plain(options: parts.Options, rounds: int) -> list[Row]:
    """Times faster than the plain form: by multiply-adds, and measured."""
    rows = []
    for name, config, side in wider(options):
        cost = total(dit_flops(config, side**2 // 4))
        saved = exact_reuse(cost, options.steps)
        faster, apart = beside_plain(config, side, options.steps, rounds)
        rows.append(Row(f"{name} over its plain form", None, saved, faster, apart))
    return rows


# ---- the program --------------------------------------------------------------------------


def bench(options: parts.Options, suite: str, rounds: int) -> list[Row]:
    """The rows of a suite; the counted one needs neither the device nor the weights."""
    if suite == "model":
        return model(options)
    timed = {
        "ladder": ladder,
        "ablation": ablation,
        "pipeline": pipeline,
        "plain": against_plain,
    }
    return timed[suite](parts.resolve(options), rounds)


def written(rows: list[Row], command: str, about: str) -> list[str]:
    """As a table, with what to type for it and where it ran."""
    lines = [HEAD, "|---" * 5 + "|"]
    for what, *numbers in rows:
        cells = ["" if x is None else f"{x:.3g}" for x in numbers]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return [*lines, "", f"`{command}` · {about}"]


def weight_files(weights: Path) -> list[Path]:
    """All that a folder holds, the one that was named, or none where they are random."""
    if weights.is_dir():
        return sorted(weights.glob("*.safetensors"))
    return [weights] if weights.exists() else []


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.Parser("lab/bench.py", __doc__.splitlines()[0])
    parser.add_argument("--suite", default="model", choices=SUITES)
    parser.add_argument("--preset", default="tiny", choices=[*parts.SIZES])
    parser.add_argument("--weights", default="random", help="folder or file")
    parser.add_argument("--decoder", default="full", choices=[*parts.DECODERS])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="of every variant, after one more")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves them")
    parser.add_argument("--out", default=str(cli.beside("results")), help="folder of the json")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, got {args.rounds}")
    if args.threads < 0:
        raise ValueError(f"--threads must be 0 or more, got {args.threads}")
    args.weights = str(cli.find(args.weights))
    return args


def main(argv: Sequence[str]) -> None:
    """One suite as a table and as json."""
    a = parse(argv)
    torch.set_num_threads(a.threads or torch.get_num_threads())
    options = parts.Options(
        a.preset,
        a.weights,
        a.decoder,
        device=a.device,
        dtype="bfloat16",
    )
    Path(a.out).mkdir(parents=True, exist_ok=True)
    rows = bench(options, a.suite, a.rounds)
    threads = f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    about = f"{a.preset} on {a.device}, torch {torch.__version__}, {threads}"
    command = f"python lab/bench.py {' '.join(argv)}"
    table = written(rows, command, about)
    print("\n".join(table))
    made = origin(command, "none", [], weight_files(Path(a.weights)))
    stored = json.dumps({**made, "rows": rows, "table": table}, indent=1)
    weights.write_text(Path(a.out) / f"bench-{a.preset}-{a.suite}.json", stored)


if __name__ == "__main__":
    cli.run(main)
