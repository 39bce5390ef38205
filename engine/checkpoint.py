"""A run that can be killed: save, restore, export.

    runs/NAME/latest                     the name of the newest complete checkpoint
    runs/NAME/ckpt/000500/model...       one weight file for each network of the run
                         ema             the first network, averaged: what is played and evaluated
                         train_state.pt  optimisers, error buffer, random generators, step
                         config.json     what the run is, in words

A checkpoint is written beside its place and then moved there, so one that can be seen is
complete, and a run killed at any moment goes on from the last one, bit for bit.  Tests:
tests/test_checkpoint.py
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from engine import optim
from engine.configs import Refusal, reading
from engine.weights import (
    join,
    newest_checkpoint,
    read_weights,
    size_in_words,
    write_text,
    write_weights,
)


def save(
    folder: Path,
    about: dict,  # what the run is; goes into every file
    models: dict[str, nn.Module],  # the first is the one that is averaged
    ema: list[Tensor],
    opts: list[torch.optim.Optimizer],
    keep: int = 2,  # checkpoints; older ones are removed
    **state: object,  # whatever else the run needs to go on
) -> None:
    # gathering shards takes all ranks, writing only one
    first = next(iter(models))
    weights = {name: unsharded(model.state_dict()) for name, model in models.items()}
    names = [name for name, _ in models[first].named_parameters()]
    weights["ema"] = weights[first] | unsharded(dict(zip(names, ema, strict=True)))
    state |= {"step": about["step"], "optimizers": [optimizer_state(o) for o in opts]}

    if writes():
        about = about | {"config": asdict(models[first].cfg)}
        final = folder / "ckpt" / f"{about['step']:06d}"
        write(final, about, weights, state)
        write_text(folder / "latest", final.name)
        for old in [*others_than(final), final][:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()


def others_than(newest: Path) -> list[Path]:
    """In the order they were written: after a return to an earlier step a greater number is older."""
    others = [path for path in newest.parent.glob("[0-9]*[0-9]") if path != newest]
    return sorted(others, key=lambda path: path.stat().st_mtime_ns)


def writes() -> bool:
    """Whether this rank writes: one does, all others help it to gather."""
    return not dist.is_initialized() or dist.get_rank() == 0


def unsharded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gathered one by one, and kept by the rank that writes, beside its device."""
    kept = {}
    for name, t in tensors.items():
        whole = optim.unshard(t).detach()
        if writes():
            kept[name] = whole.cpu()
    return kept


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[dict]:
    """Its moments, a dict for each parameter, in the order of the parameters."""
    params = optimizer.param_groups[0]["params"]
    return [unsharded(optimizer.state.get(p, {})) for p in params]


def write(final: Path, about: dict, weights: dict[str, dict[str, Tensor]], state: dict) -> None:
    tmp = final.with_name(final.name + ".tmp")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.unlink(missing_ok=True)  # nobody's file stands in the way
        tmp.mkdir(parents=True)
        for name, tensors in weights.items():
            write_weights(tmp / f"{name}.safetensors", tensors, about)
        write_text(tmp / "config.json", json.dumps(about, indent=1))
        torch.save(state, tmp / "train_state.pt")
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise ValueError(
            f"cannot save {final}: {error}. Older checkpoints are intact: make room, then the same "
            "command resumes"
        ) from error
    shutil.rmtree(final, ignore_errors=True)
    os.replace(tmp, final)


@torch.no_grad()
def restore(
    folder: Path,
    models: dict[str, nn.Module],
    ema: list[Tensor],
    opts: list[torch.optim.Optimizer],
) -> dict:
    """Continue from the newest checkpoint, if there is one.

    Returns what save() was given as state, and the step.
    """
    if not (folder / "latest").exists():
        return {}
    checkpoint = newest_checkpoint(folder)
    if not checkpoint.is_dir():
        raise Refusal(
            f"{folder / 'latest'} is damaged: {checkpoint} is not there. Write the name of another "
            "checkpoint into it, or start over with --fresh"
        )
    with naming_another(checkpoint):
        for name, model in models.items():
            fill(checkpoint / f"{name}.safetensors", model.state_dict())
        first = next(iter(models.values()))
        names = [name for name, _ in first.named_parameters()]
        fill(checkpoint / "ema.safetensors", dict(zip(names, ema, strict=True)))

        file = checkpoint / "train_state.pt"
        with reading(file):
            state = torch.load(file, weights_only=True, map_location="cpu")
            if type(state["step"]) is not int:
                raise ValueError(f"its step is {state['step']!r}")
            for optimizer, saved in zip(opts, state.pop("optimizers"), strict=True):
                params = optimizer.param_groups[0]["params"]
                for p, entries in zip(params, saved, strict=True):
                    optimizer.state[p] = {key: placed(value, p) for key, value in entries.items()}
    return state


@contextmanager
def naming_another(checkpoint: Path) -> Iterator[None]:
    """If this checkpoint is damaged: how to go on from the one that was written before it."""
    try:
        yield
    except Refusal as error:
        others = others_than(checkpoint)
        if not others:
            raise
        latest = checkpoint.parents[1] / "latest"
        raise Refusal(
            f"{error}. To go on from another checkpoint: echo {others[-1].name} > {latest}"
        ) from error


def fill(file: Path, targets: dict[str, Tensor]) -> None:
    """Each target gets its tensor of the file, laid out as the target is."""
    tensors, _ = read_weights(file)
    with reading(file):
        for name, target in targets.items():
            target.copy_(optim.reshard_like(tensors[name], target))


def placed(value: Tensor, p: Tensor) -> Tensor:
    """A moment lies as its parameter does; a counter of steps stays whole."""
    return optim.reshard_like(value, p) if value.shape == p.shape else value


def export(*runs: str, file: str) -> None:
    """The averaged weights of a run as one bfloat16 file: what assets/ holds.

    Of several runs, each an expert of --stage moe, the joined model.
    """
    if Path(file).suffix != ".safetensors":
        raise ValueError(f"--export writes a .safetensors file, got {file}")
    found = [read_weights(run) for run in runs]
    for run, (_, about) in zip(runs, found, strict=True):
        if not {"stage", "step"} <= set(about):
            raise ValueError(f"--export takes runs of train.py, and {run} does not say its step")
        if about["stage"] in ("vae", "lightvae"):
            raise ValueError(f"the VAE of {run} is a file already: vae.safetensors in that folder")
    tensors, about = found[0]
    if len(runs) > 1:
        names = [words.get("expert", "none").removeprefix("high-") for _, words in found]
        common = ("stage", "boundary", "encoding", "shift", "sink", "new", "p_memory_off")
        apart = [key for key in common if len({words.get(key) for _, words in found}) > 1]
        if len(set(names)) < len(runs) or apart:
            raise ValueError(
                "joined runs must be different experts of one --stage moe, trained alike; got "
                + ", ".join(names)
                + (f", which differ in {', '.join(apart)}" if apart else "")
            )
        model = join(dict(zip(names, runs, strict=True)), about["boundary"])
        tensors = model.state_dict()
        about = about | {"config": asdict(model.moe_config), "view": "both"}
    write_weights(file, {name: t.bfloat16() for name, t in tensors.items()}, about)
    size = size_in_words(Path(file).stat().st_size)
    print(f"wrote {file}: {len(tensors)} tensors, step {about['step']}, {size}")
