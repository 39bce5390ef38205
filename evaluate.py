"""Measure every claim and write the tables and figures.

Paper: §5 and Tables 1-2. It reports speed and VAE fidelity and no metric of the world model; those
here are ours. We own the renderer, and so the truth at any pose: true frames, exact depth, what an
old frame saw, where a generated frame was taken (registration).

    PSNR  = min(50, −10 log10 mean (x − x̂)²)     of all pixels, or of those that only memory can know
    ZNCC  = a·b                                  of two frames, each less its means, of unit length
    reliance = PSNR with the right memory − PSNR with zeros in its place
    adoption = share of frames nearer to the world whose memory was given than to the true one
    gain  = Σ c·m / Σ c²                         motion m drawn per motion c commanded
    KCtrl = share of pairs of opposite keys that both act, as W and S: standing still earns nothing
    TWFD  = Fréchet distance of drawn and true thumbnails of walks, by up to 64 principal components

PSNR is computed in dataset/film.py (of pixels from 0 to 1), what only memory can know in
lab/truth.py, ZNCC (of frames that are slightly blurred first), adoption, KCtrl and TWFD in
lab/metrics.py, gain in lab/walks.py, reliance in lab/claims.py.

An arm is one way to play or to train, as with and without memory. All arms share worlds, walks and
noise, and intervals are over held-out worlds. What is claimed stands in lab/claims.py; predictions
are stored before a run begins. Every table and figure comes from results/*.json alone. To compare
arms that need training, measure each run: `ablation --weights RUN --out DIR/ARM-SEED`; then
`compare --out DIR` sets them side by side. LPIPS, FID and FVD need downloaded networks and are not
computed. A model of somebody else is scored by its frames alone, in a file of its own: --model
MODULE:CLASS, see lab/outside.py.

Try it: python evaluate.py memory --worlds 4      Tests: pytest tests/test_evaluate.py
"""

import json
import re
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import world
from engine import cli, weights
from lab import (
    claims,
    costs,
    models,
    outside,
    report,
    retrieval,
    revisits,
    rivals,
    sanity,
    stats,
    walks,
)
from lab.run import Run, as_png, origin

RESULTS = cli.beside("results")
OUTSIDE = cli.beside("runs", "outside")
SHIPPED = cli.beside("assets", "tiny")
OPENED = 32  # final worlds that had been looked at before the last tables

COMMANDS: dict[str, Callable[[Run], None]] = {
    "sanity": sanity.sanity,
    "memory": revisits.remember,
    "rivals": rivals.rivals,
    "drift": walks.drift,
    "explore": walks.explore,
    "action": walks.action,
    "distill": models.distill,
    "int8": costs.int8,
    "vae": costs.decoders,
    "retrieval": retrieval.retrieval,
    "rope": revisits.rope,
    "moe": models.experts,
    "latency": costs.latency,
    "ablation": walks.ablation,
}


# ---- where a number comes from ------------------------------------------------------------


def split_of(args: Namespace) -> str:
    if args.final:
        return "final"
    return "tune" if args.tune else "test"


def worlds_of(args: Namespace) -> list[int]:
    seeds = list(world.SPLITS[split_of(args)])
    if args.final:
        seeds = seeds[OPENED:]
    return seeds[: args.worlds or (64 if args.full else 8)]


def command_of(name: str, args: Namespace) -> str:
    """What to type for the same numbers."""
    words = [f"python evaluate.py {name}"]
    words += [f"--{flag}" for flag in ("full", "final", "tune") if getattr(args, flag)]
    if not args.full:
        words.append("--quick")
    words.append(f"--worlds {len(worlds_of(args))}")
    if args.model:
        words.append(f"--model {args.model}")
    elif Path(args.weights) != SHIPPED:
        words.append(f"--weights {args.weights}")
    return " ".join(words)


def provenance(name: str, args: Namespace) -> dict:
    """All that another person needs to measure the same again."""
    files = Path(args.weights).rglob("*.safetensors")
    return origin(command_of(name, args), split_of(args), worlds_of(args), files)


# ---- a run --------------------------------------------------------------------------------


def measure(name: str, args: Namespace) -> dict:
    """Store the predictions, run, store everything. Missing weights leave rows out and say why.

    The predictions wait in a file of their own: the last result stays until there is a new one.
    """
    out = Path(args.out)
    path = out / "final" / f"{name}.json" if args.final else out / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = path.with_name(f"{name}.pending.json")
    result = provenance(name, args)
    predicted = [claims.unmeasured(claim) for claim in claims.CLAIMS[name]]
    weights.write_text(pending, json.dumps(result | {"claims": predicted, "raw": {}}))

    began = time.perf_counter()
    run = Run(result["worlds"], args.full, args.weights, out, RESULTS)
    try:
        COMMANDS[name](run)
    except FileNotFoundError as error:
        run.notes.append(f"not measured: {error}")
        run.absent["*"] = str(error)

    # what was found is kept, even if a claim should ask for what is not there
    result["seconds"] = round(time.perf_counter() - began, 1)
    result |= {"notes": run.notes, "absent": run.absent, "claims": predicted, "raw": run.raw}
    result["pictures"] = {key: as_png(picture) for key, picture in run.pictures.items()}
    result["facts"] = run.facts
    weights.write_text(path, json.dumps(result))
    pending.unlink()
    judged = [claims.judge(claim, run.raw, run.absent) for claim in claims.CLAIMS[name]]
    result["claims"] = judged
    weights.write_text(path, json.dumps(result))
    return result


def measure_outside(names: list[str], args: Namespace) -> None:
    """A model of somebody else by frames alone; into a file of its own, where each command keeps the
    place of its last run."""
    guest = outside.load(args.model)
    out = Path(args.out)
    whose = re.sub(r"[^\w.]+", "-", args.model)
    path = out / f"outside-{whose}.json"
    lock = cli.claim(out)  # another one would write back what it read before
    stored = report.stored(path) if path.exists() else {}
    for name in names:
        if name in outside.LEFT_OUT:
            stored[name] = {"absent": {"*": outside.LEFT_OUT[name]}}
            print(f"\n## {name}: left out, it {outside.LEFT_OUT[name]}", flush=True)
            continue
        result = origin(command_of(name, args), split_of(args), worlds_of(args), [])
        run = Run(result["worlds"], args.full, "", out, RESULTS)
        outside.COMMANDS[name](run, guest)
        stored[name] = result | {"notes": run.notes, "raw": run.raw}
        weights.write_text(path, json.dumps(stored))
        print(f"\n## {name}\n", report.raw_table(stored[name]), sep="\n", flush=True)
    weights.write_text(path, json.dumps(stored))
    lock.close()
    print(f"\nstored in {path}")


def compare(out: Path, against: str) -> None:
    """Arms that were trained several times, as a table; stored beside their folder."""
    result = report.contrast(out, against)
    print("\n".join(result["table"]))
    path = out.with_name(f"compare-{out.name}.json")
    weights.write_text(path, json.dumps(result, indent=1))


def parse(argv: list[str]) -> Namespace:
    about = "Measure every claim on worlds with ground truth."
    parser = cli.Parser("evaluate.py", about)
    parser.add_argument("command", choices=[*COMMANDS, "all", "report", "compare"])
    for flag, text in {
        "full": "64 worlds, every arm, 16 segments; up to two hours",
        "quick": "the default: 8 worlds, minutes",
        "final": "the worlds kept for the last tables",
        "tune": "the worlds for choosing settings",
    }.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    parser.add_argument("--worlds", type=int, default=0, help="how many, if not those 64 or 8")
    text = "folder of the .safetensors, or a run"
    parser.add_argument("--weights", default=str(SHIPPED), help=text)
    text = "MODULE:CLASS, a model of your own with reset and step: see lab/outside.py"
    parser.add_argument("--model", default="", help=text)
    parser.add_argument("--out", help="folder of the json files: results, or runs/outside")
    text = "compare: the arm that the others are compared with"
    parser.add_argument("--against", default="none", help=text)
    args = parser.parse_args(argv)
    if args.model and (args.command in ("report", "compare") or Path(args.weights) != SHIPPED):
        raise ValueError("--model brings its own weights, and is measured: not report, not compare")
    for one, other in (("final", "tune"), ("full", "quick")):
        if getattr(args, one) and getattr(args, other):
            raise ValueError(f"--{one} and --{other} contradict each other: choose one of them")
    if args.worlds < 0:
        raise ValueError(f"--worlds must not be negative, got {args.worlds}")
    args.weights = str(cli.find(args.weights))
    if not Path(args.weights).exists():
        raise ValueError(f"--weights {args.weights} does not exist; runs lie in runs/NAME")
    args.out = args.out or str(OUTSIDE if args.model else RESULTS)
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    out = Path(args.out)
    if args.command == "report":
        if not out.is_dir():
            raise ValueError(f"no folder {out}; first: python evaluate.py all --quick --out {out}")
        ours = out.resolve() == RESULTS.resolve()  # others get pages and pictures of their own
        home = cli.beside() if ours else out
        report.report(out, home / "README.md", home / ("assets/figures" if ours else "figures"))
        return
    stats.scipy_stats()  # or a line that says what to install, before anything is measured
    if args.command == "compare":
        compare(out, args.against)
        return
    names = list(COMMANDS) if args.command == "all" else [args.command]
    if args.model:
        measure_outside(names, args)
        return
    for name in names:
        result = measure(name, args)
        print(f"\n## {name} ({result['seconds']} s)\n")
        print(report.raw_table(result), report.claim_table(result), sep="\n\n", flush=True)


if __name__ == "__main__":
    cli.run(main)
