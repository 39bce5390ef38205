"""What a segment costs: counted, then timed.

Counted: FLOPs of every part by formula, and what they would take on eight H200s. Timed: one suite of variants, as a table and as json.
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
from collections.abc import Sequence
from dataclasses import replace

import torch

import dit
import realtime
from dit import DiT


def dit_flops(
    c,  # dit.DiTConfig
    S: int,  # places per latent
    clean: int = 9,  # memory and past latents
    new: int = 10,
) -> dict[str, tuple[float, float, float]]:
    """FLOPs (2 per multiply-add) of a segment by part: ours once, ours per step, and as released, where everything
    is computed at every step for every token. A test counts the modules themselves."""
    T, D, patch, w, A = clean + new, c.dim, math.prod(c.patch), c.action_width, len(c.action_blocks)
    L, layers, text = S * T, c.layers, c.text_len
    # queries of all blocks: the last one asks for new tokens only, unless it has actions
    Q = (layers - 1) * L + (S * new if layers - 1 not in c.action_blocks else L)
    camera, rays = layers * 8 * L * D * D, 2 * L * (c.ray_channels * patch * D + 2 * D * D)
    words = 2 * text * (c.text_dim * D + D * D) + layers * 4 * text * D * D
    actions = A * 2 * L * ((4 * D + 2 * c.action_window + 4 * w) * w + 4 * T * w)
    keys = A * T * 2 * c.action_window * c.action_hidden * (6 + c.action_hidden + 2 * w)
    time_row, ends = 2 * (c.freq_dim * D + 7 * D * D), 2 * S * patch * c.in_dim * D
    return {
        "self-attention qkvo": (0, 4 * D * D * (Q + layers * L), layers * 8 * L * D * D),
        "self-attention": (0, 4 * Q * L * D, layers * 4 * L * L * D),
        "text attention": (
            words,
            4 * Q * (D * D + text * D),
            words + layers * 4 * L * (D * D + text * D),
        ),
        "feed-forward": (0, 4 * Q * D * c.ffn, layers * 4 * L * D * c.ffn),
        "camera": (camera, 0, camera),
        "rays": (rays, 0, rays),
        "actions": (keys, actions, keys + actions),
        "time": (0, 2 * time_row, L * time_row),
        "patches, head": (ends * clean, 2 * ends * new, 2 * ends * T),
    }


def vae_flops(
    c, h: int, w: int
) -> float:  # vae.VAEConfig: to decode one later latent of h x w cells
    dims, p, t = [c.dec_dim * m for m in (c.dim_mult[-1], *c.dim_mult[::-1])], h * w, 1

    def block(a: int, b: int) -> int:  # two 27-tap convolutions, a shortcut if the widths differ
        return 2 * t * p * (27 * a * b + 27 * b * b + (a * b if a != b else 0))

    total = 2 * p * (
        c.z_dim**2 + 27 * c.z_dim * dims[0] + 4 * dims[0] ** 2 + 2 * p * dims[0]
    ) + 2 * block(dims[0], dims[0])
    for i, (a, b) in enumerate(zip(dims, dims[1:], strict=False)):
        total += block(a, b) + c.res_blocks * block(b, b)
        if i < len(c.temporal):  # time doubles first, then space
            total, t = (total + 12 * t * p * b * b, 2 * t) if c.temporal[::-1][i] else (total, t)
            p *= 4
            total += 2 * t * p * 9 * b * b
    return total + 2 * t * p * 27 * dims[-1] * 3 * c.patch**2


def predicted(c, S: int, clean: int, new: int, steps: int) -> dict[str, float]:
    """How many times faster than the release a segment must be if only multiply-adds count."""
    once, step, released = map(sum, zip(*dit_flops(c, S, clean, new).values(), strict=True))
    return {"exact reuse": steps * released / (once + steps * step)}


H200 = {
    "denoise": 587e12,
    "full": 377e12,
    "light50": 239e12,
    "light75": 139e12,
}  # FLOP/s: FastWan2.2's DiT, the published decoders


def projection(
    parts: dict[str, tuple[float, float, float]],  # of dit_flops
    steps: int,
    frames: int,  # of a segment
    decode: float,  # FLOPs to decode it
    decoder: str,
) -> list[tuple[str, float]]:
    """TFLOP of a segment by part, and frames per second on n H200 of which the last decodes."""
    ours = sum(once + steps * step for once, step, _ in parts.values())
    rows = [
        (f"TF of {part}", (once + steps * step) / 1e12) for part, (once, step, _) in parts.items()
    ]
    rows += [("TF to denoise", ours / 1e12), ("TF to decode", decode / 1e12)]
    for n in range(1, 10):
        D, V = (
            ours / H200["denoise"] / max(1, n - 1) + 0.022 * (n > 2),
            decode / H200[decoder],
        )  # 22 ms: exchange among ranks
        rows.append((f"FPS on {n} H200, projected", frames / (max(D, V) if n > 1 else D + V)))
    return rows


def segment_flops(options: realtime.Options) -> tuple[float, float, float]:
    """Of a later segment: (denoise as here, denoise as released, decode)."""
    v, (H, W) = realtime.vae_config(options.preset, options.decoder), realtime.SIZES[options.preset]
    once, step, released = map(
        sum,
        zip(
            *dit_flops(
                dit.PRESETS[options.preset], realtime.places(options), 9, options.new
            ).values(),
            strict=True,
        ),
    )
    return (
        once + options.steps * step,
        options.steps * released,
        options.new * vae_flops(v, H // v.stride[1], W // v.stride[2]),
    )


def compete(
    options: realtime.Options, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """One segment in every variant, A B C … A B C … after a warm-up: quartiles of its seconds, relative errors of its latents."""
    cpu, seconds, errors, right = options.device == "cpu", {}, {}, torch.zeros(0)
    slow, fast = (
        replace(options, dtype="float32" if cpu else "bfloat16"),
        replace(options, dtype="bfloat16", compile=not cpu),
    )
    variants = {
        "as released": slow,
        "exact reuse": slow,
        "int8": replace(slow, quantize="qkvo"),
        "fast": fast,
        "5 new": replace(fast, new=5),
        "2 new": replace(fast, new=2),
    } | {f"fast {which}": replace(fast, quantize=which) for which in ("qkvo", "all")}
    session = realtime.Session(slow)
    session.reset(
        torch.randint(
            0,
            256,
            (*realtime.SIZES[options.preset], 3),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(0),
        )
    )
    session.step(*realtime.walk_actions(session.frames_needed))
    runs = {
        name: realtime.Denoiser(realtime.load_parts(o, "dit")[0]["dit"], session.denoiser.meta, o)
        for name, o in variants.items()
    }
    for denoiser in runs.values():
        denoiser.load(session.denoiser.dump())
    every = runs["as released"].model  # nothing is kept from one step to the next
    every.prepare = lambda context, group=None, blocks=True: (
        None if blocks else DiT.prepare(every, context, group, False)
    )
    runs |= {
        name: realtime.Decoder(
            realtime.load_parts(o := replace(fast, decoder=name), "decoder")[0]["decoder"], o
        )
        for name in realtime.DECODERS
    }
    for name, actor in [*runs.items()] * (rounds + 1):
        if isinstance(actor, realtime.Decoder):
            seconds.setdefault(name, []).append(actor.decode(right)[1] / 1e3)
            continue
        x0, info = actor.run(
            *realtime.walk_actions(realtime.WINDOW.stride * actor.options.new), options.policy
        )
        right = actor.undo() or (x0.float() if name == "as released" else right)
        seconds.setdefault(name, []).append(info["ms"]["denoise"] / 1e3)
        errors[name] = (
            float((x0.float() - right).norm() / right.norm()) if x0.shape == right.shape else None
        )
    return {
        name: torch.tensor(times[1:]).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        for name, times in seconds.items()
    }, errors


def bench(options: realtime.Options, suite: str, rounds: int) -> list[tuple]:
    """Rows of one suite: (what, the paper's value, predicted before the run, measured, relative error of the latents)."""
    c, S, (_, released, decode) = (
        dit.PRESETS[options.preset],
        realtime.places(options),
        segment_flops(options),
    )
    if suite == "model":
        return [
            (what, None, value, None, None)
            for what, value in [
                ("as released", released / 1e12),
                ("GB", realtime.estimate(options)),
                *projection(
                    dit_flops(c, S, 9, options.new),
                    options.steps,
                    realtime.WINDOW.stride * options.new,
                    decode,
                    options.decoder,
                ),
            ]
        ]
    if suite == "pipeline":
        with contextlib.closing(realtime.open_session(replace(options, threads=1), 1)) as session:
            session.reset(torch.zeros(*realtime.SIZES[options.preset], 3, dtype=torch.uint8))
            t = realtime.time_segment(session, rounds)
        return [
            ("FPS of 1+1 processes", None, t["predicted"], t["fps"], None),
            ("key to photon, mean s", None, None, t["mean"], None),
            (
                "side by side over serial",
                None,
                t["predicted"] / t["serial"],
                t["fps"] / t["serial"],
                None,
            ),
        ]
    quartiles, errors = compete(options, rounds)
    t = {name: q[1] for name, q in quartiles.items()}
    if suite == "ladder":
        return [
            (
                f"{name}: {1e3 * q[1]:.1f} ms, IQR {1e3 * (q[2] - q[0]):.1f}; times faster",
                None,
                predicted(c, S, 9, options.new, options.steps).get(name),
                t["as released"] / q[1],
                errors[name],
            )
            for name, q in quartiles.items()
            if name in errors
        ]
    D, V, light = t["fast"], t["full"], t["light75"]
    rows = [
        ("− INT8, slow projections", 1.461, 0.6, t["exact reuse"] / t["int8"], "int8"),
        ("− INT8, bfloat16", None, 0.5, D / t["fast qkvo"], "fast qkvo"),
        ("− INT8, all layers", None, 0.4, D / t["fast all"], "fast all"),
        ("− light VAE, async", 1.551, 3, max(D, V) / max(D, light), ""),
        ("− light VAE, serial", None, 2, (D + V) / (D + light), ""),
        ("50 % VAE", 2.53, 2.5, V / t["light50"], ""),
        ("75 % VAE", 5.85, 5, V / light, ""),
        ("− async", None, 2, (D + V) / max(D, V), ""),
        (
            "− fast retrieval, by formula: 5 x 441 pairs of trimesh at 1.9 ms",
            6.06,
            None,
            1 + 5 * 441 * 0.0019 / D,
            "",
        ),
        ("time per frame, 5 new", None, 1.3, 2 * t["5 new"] / D, ""),
        ("time per frame, 2 new", None, 2.4, 5 * t["2 new"] / D, ""),
    ]
    return [(*row, errors.get(name)) for *row, name in rows]


def main(argv: Sequence[str]) -> None:
    """One suite as a table and as json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--suite", default="model", choices=("model", "ablation", "ladder", "pipeline")
    )
    for flag, default in dict(
        preset="tiny",
        weights="random",
        decoder="full",
        device="cpu",
        rounds=7,
        threads=0,
        out="results",
    ).items():
        parser.add_argument(f"--{flag}", default=default, type=type(default))
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads or torch.get_num_threads())
    options = realtime.Options(a.preset, a.weights, a.decoder, device=a.device, dtype="bfloat16")
    rows = bench(options if a.suite == "model" else realtime.resolve(options), a.suite, a.rounds)
    about = f"{a.preset} on {a.device}, torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    cells = [
        f"| {what} | {' | '.join('' if x is None else f'{x:.3g}' for x in numbers)} |"
        for what, *numbers in rows
    ]
    table = [
        "| what | paper | predicted | measured | error |",
        "|---" * 5 + "|",
        *cells,
        "",
        f"`python lab/bench.py {' '.join(argv)}` · {about}",
    ]
    print("\n".join(table))
    Path(a.out).mkdir(exist_ok=True)
    (Path(a.out) / f"bench-{a.preset}-{a.suite}.json").write_text(
        json.dumps({"rows": rows, "table": table}, indent=1)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
