"""A run that can be killed: save, restore, export."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from engine import optim
from engine.weights import join, read_weights, size_in_words, write_text, write_weights


def save(
    folder: Path,
    said: dict,
    models: dict[str, nn.Module],
    ema: list[Tensor],
    opts: list,
    keep: int = 2,
    **state: object,
) -> None:
    """folder/ckpt/000500, visible only when complete: every model as a weight file (the first is the one that is averaged),
    ema.safetensors, and train_state.pt with the optimisers and `state`. Sharded tensors are gathered; rank 0 writes."""
    first, chief = next(iter(models)), not dist.is_initialized() or dist.get_rank() == 0
    weights = {
        name: {n: optim.unshard(t).detach().cpu() for n, t in m.state_dict().items()}
        for name, m in models.items()
    }
    names = [n for n, _ in models[first].named_parameters()]
    weights["ema"] = weights[first] | {
        n: optim.unshard(e).cpu() for n, e in zip(names, ema, strict=True)
    }
    state |= {
        "step": said["step"],
        "optimizers": [
            [
                {k: optim.unshard(v) for k, v in o.state.get(p, {}).items()}
                for p in o.param_groups[0]["params"]
            ]
            for o in opts
        ],
    }
    if chief:
        final = folder / "ckpt" / f"{said['step']:06d}"
        tmp = final.with_name(final.name + ".tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        said = said | {"config": asdict(models[first].cfg)}
        try:
            tmp.mkdir(parents=True)
            for name, tensors in weights.items():
                write_weights(tmp / f"{name}.safetensors", tensors, said)
            write_text(tmp / "config.json", json.dumps(said, indent=1))
            torch.save(state, tmp / "train_state.pt")
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(tmp, ignore_errors=True)
            raise ValueError(
                f"cannot save {final}: {error}. Older checkpoints are intact: make room, then the same command resumes"
            ) from error
        shutil.rmtree(final, ignore_errors=True)
        os.replace(tmp, final)
        write_text(folder / "latest", final.name)
        for old in sorted((folder / "ckpt").glob("[0-9]*[0-9]"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()


def export(*runs: str, file: str) -> None:
    """The averaged weights of a run, or of the runs of experts joined, as one bfloat16 file: what assets/ holds."""
    found = [read_weights(run) for run in runs]
    (tensors, said), names = (
        found[0],
        [s.get("expert", "none").removeprefix("high-") for _, s in found],
    )
    if len(runs) > 1:
        if (
            len({*names}) < len(runs)
            or len(
                {
                    tuple(s.get(k) for k in ("stage", "boundary", "encoding", "shift", "sink"))
                    for _, s in found
                }
            )
            > 1
        ):
            raise ValueError(
                f"joined runs must be different experts of one --stage moe with one boundary, got {', '.join(names)}"
            )
        tensors = (
            model := join(dict(zip(names, runs, strict=True)), said["boundary"])
        ).state_dict()
        said = said | {"config": asdict(model.config), "view": "both"}
    write_weights(file, {name: t.bfloat16() for name, t in tensors.items()}, said)
    print(
        f"wrote {file}: {len(tensors)} tensors, step {said['step']}, {size_in_words(Path(file).stat().st_size)}"
    )


@torch.no_grad()
def restore(folder: Path, models: dict[str, nn.Module], ema: list[Tensor], opts: list) -> dict:
    """Continue from folder's newest checkpoint, if there is one. Returns the state that save() was given, and the step."""
    if not (folder / "latest").exists():
        return {}
    folder = folder / "ckpt" / (folder / "latest").read_text().strip()
    state = torch.load(folder / "train_state.pt", weights_only=True, map_location="cpu")
    for name, model in models.items():
        tensors = read_weights(folder / f"{name}.safetensors")[0]
        for n, t in model.state_dict().items():
            t.copy_(optim.reshard_like(tensors[n], t))
    tensors = read_weights(folder / "ema.safetensors")[0]
    for (n, _), e in zip(next(iter(models.values())).named_parameters(), ema, strict=True):
        e.copy_(optim.reshard_like(tensors[n], e))
    for o, saved in zip(opts, state["optimizers"], strict=True):
        for p, entries in zip(o.param_groups[0]["params"], saved, strict=True):
            o.state[p] = {
                k: optim.reshard_like(v, p) if v.shape == p.shape else v for k, v in entries.items()
            }
    return state
