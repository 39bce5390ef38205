"""One step of training: shards, precision, Muon, average."""

import copy
import math
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from engine import weights


def shard(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """FSDP2 over all ranks, one unit per block; a single process keeps the plain model."""
    if dist.is_initialized():
        kind = next(model.parameters()).device.type
        mesh = init_device_mesh("cpu" if kind == "meta" else kind, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(dtype if dtype != torch.float32 else None, torch.float32)
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def whole(x: Tensor) -> Tensor:
    """A sharded tensor gathered; anything else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(full: Tensor, target: Tensor) -> Tensor:
    """A whole tensor laid out as the target is."""
    full = full.to(target.device)
    return (
        distribute_tensor(full, target.device_mesh, target.placements)
        if isinstance(target, DTensor)
        else full
    )


def twin(model: nn.Module, dtype: torch.dtype, recompute: bool = False) -> nn.Module:
    """The model that computes: a copy in a lower precision, or the model itself (FSDP lowers it on its own).
    recompute: its blocks keep only their inputs and run again in the backward pass (activation checkpointing)."""
    low = (
        model if dist.is_initialized() or dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    )
    for block in low.blocks if recompute else ():
        block.forward = partial(
            checkpoint, partial(type(block).forward, block), use_reentrant=False
        )  # copies along with the block
    return low


@torch.no_grad()
def refresh(low: nn.Module, model: nn.Module) -> nn.Module:
    """Float32 weights into the computing copy, before a forward pass."""
    if low is not model:
        torch._foreach_copy_(list(low.parameters()), list(model.parameters()))
    return low


def collect(low: nn.Module, model: nn.Module) -> None:
    """Gradients of the computing copy onto the float32 weights, after a backward pass."""
    for q, p in zip(low.parameters(), model.parameters(), strict=True):
        if low is not model and q.grad is not None:
            p.grad = q.grad.float() if p.grad is None else p.grad + q.grad
            q.grad = None


def optimizers(
    model: nn.Module,
    lr: float,  # of AdamW
    muon: float = 0.0,  # of Muon; 0 = AdamW everywhere
    decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside DiT blocks and VAE coders (kernels flattened to matrices), AdamW on everything else."""
    inside = {
        n: p
        for n, p in model.named_parameters()
        if muon
        and ("blocks." in n or "coder." in n)
        and p.ndim > 1
        and min(p.flatten(1).shape) > 16
    }
    found = [
        torch.optim.AdamW(
            [p for n, p in model.named_parameters() if n not in inside],
            lr=lr,
            betas=betas,
            weight_decay=decay,
        )
    ]
    if inside:
        views = [
            nn.Parameter(p.detach().flatten(1)) for p in inside.values()
        ]  # share the weights' memory
        found += [torch.optim.Muon(views, lr=muon, weight_decay=decay)]
        found[-1].viewed = list(inside.values())
    for o in found:
        o.param_groups[0]["top"] = o.param_groups[0]["lr"]
    return found


def update(
    opts: list, model: nn.Module, factor: float, clip: float, ema: list[Tensor], decay: float
) -> float:
    """Clip, step, zero, average. Returns the gradient norm."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    for o in opts:
        for p, view in zip(getattr(o, "viewed", ()), o.param_groups[0]["params"], strict=False):
            view.grad = None if p.grad is None else p.grad.flatten(1)
        o.param_groups[0]["lr"] = o.param_groups[0]["top"] * factor
        o.step()
        o.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    if ema:
        torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 1 - decay)
    return float(whole(norm))


def lr_at(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to 5 %: a factor on every learning rate."""
    done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    return min(1.0, (step + 1) / max(1, warmup)) * (
        0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
    )


def average(model: nn.Module) -> list[Tensor]:
    """The start of the averaged weights."""
    return [p.detach().clone() for p in model.parameters()]


@torch.no_grad()
def averaged(model: nn.Module, ema: list[Tensor]) -> nn.Module:
    """A copy of the model that holds the averaged weights."""
    other = copy.deepcopy(model)
    torch._foreach_copy_(list(other.parameters()), ema)
    return other


def gathered(x: Tensor) -> Tensor:
    """The rows of all ranks in the order in which one process would hold them."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def check_finite(loss: Tensor, model: nn.Module, folder: Path, **batch: Tensor) -> None:
    """A loss that is not a number ends the run, with the batch on disk and the first bad weight named."""
    if (
        not gathered(loss.detach()[None]).isfinite().all()
    ):  # every rank stops, also for the loss of another
        bad = next(
            (n for n, p in model.named_parameters() if not torch.isfinite(whole(p)).all()),
            "none: activations overflowed",
        )
        weights.write_weights(
            folder / "nan_dump.safetensors", {k: v.detach() for k, v in batch.items()}
        )
        raise ValueError(
            f"loss is {loss.item()}; its batch is in {folder}/nan_dump.safetensors; first bad weight: {bad}"
        )
