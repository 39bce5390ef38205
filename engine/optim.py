"""One step of training: shards, precision, Muon, average."""

import copy
import math
from collections.abc import Sequence
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


def unshard(x: Tensor) -> Tensor:
    """A sharded tensor gathered; anything else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def reshard_like(full: Tensor, target: Tensor) -> Tensor:
    """A whole tensor laid out as the target is."""
    full = full.to(target.device)
    return (
        distribute_tensor(full, target.device_mesh, target.placements)
        if isinstance(target, DTensor)
        else full
    )


def low_precision_copy(model: nn.Module, dtype: torch.dtype, recompute: bool = False) -> nn.Module:
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
def copy_weights_down(low: nn.Module, model: nn.Module) -> nn.Module:
    """Float32 weights into the computing copy, before a forward pass."""
    if low is not model:
        torch._foreach_copy_(list(low.parameters()), list(model.parameters()))
    return low


def copy_gradients_up(low: nn.Module, model: nn.Module) -> None:
    """Gradients of the computing copy onto the float32 weights, after a backward pass."""
    for q, p in zip(low.parameters(), model.parameters(), strict=True):
        if low is not model and q.grad is not None:
            p.grad = q.grad.float() if p.grad is None else p.grad + q.grad
            q.grad = None


class Muon(torch.optim.Optimizer):
    """Steps of equal size in every direction of a matrix (Jordan 2024).

    A gradient's momentum G = U S Vᵀ is dominated by a few directions. Muon steps along U Vᵀ, the nearest
    orthogonal matrix, found without a decomposition: the odd polynomial a·X + b·XXᵀX + c·(XXᵀ)²X drives
    every singular value towards 1, five times over.
    torch.optim.Muon computes the same, always in bfloat16: forty times slower where a processor has no
    such instructions, and then most of a training step. This one computes in the precision of the run.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero; ends between 0.7 and 1.2

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,  # of the five iterations
    ):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self.step_matrix(matrix, group["lr"], group["weight_decay"], group["momentum"])

    def step_matrix(self, w: nn.Parameter, lr: float, decay: float, momentum: float) -> None:
        mean = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w.grad))
        mean.lerp_(w.grad, 1 - momentum)
        ahead = w.grad.lerp(mean, momentum)  # Nesterov's
        rows, columns = w.shape
        w.mul_(1 - lr * decay)
        w.add_(self.orthogonal(ahead), alpha=-lr * math.sqrt(max(1, rows / columns)))

    def orthogonal(self, g: Tensor) -> Tensor:
        """Near U Vᵀ of g = U S Vᵀ."""
        a, b, c = self.COEFFICIENTS
        tall = g.shape[0] > g.shape[1]
        x = g.mT if tall else g
        x = x.to(self.dtype)
        x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
        for _ in range(5):
            square = x @ x.mT
            polynomial = torch.addmm(square, square, square, beta=b, alpha=c)
            x = torch.addmm(x, polynomial, x, beta=a)
        return x.mT if tall else x


def optimizers(
    model: nn.Module,
    lr: float,  # of AdamW
    muon: float = 0.0,  # of Muon; 0 = AdamW everywhere
    decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    dtype: torch.dtype = torch.bfloat16,  # of Muon's iterations
) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside DiT blocks and VAE coders (kernels flattened to matrices), AdamW on everything else."""
    inside = {}
    others = []
    for name, p in model.named_parameters():
        in_a_block = "blocks." in name or "coder." in name
        if muon and in_a_block and p.ndim > 1 and min(p.flatten(1).shape) > 16:
            inside[name] = p
        else:
            others.append(p)

    found = [torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=decay)]
    if inside:
        views = [nn.Parameter(p.detach().flatten(1)) for p in inside.values()]  # the same memory
        found.append(Muon(views, muon, decay, dtype=dtype))
        found[-1].viewed = list(inside.values())
    for optimizer in found:
        optimizer.param_groups[0]["top"] = optimizer.param_groups[0]["lr"]
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
    return float(unshard(norm))


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
            (n for n, p in model.named_parameters() if not torch.isfinite(unshard(p)).all()),
            "none: activations overflowed",
        )
        weights.write_weights(
            folder / "nan_dump.safetensors", {k: v.detach() for k, v in batch.items()}
        )
        raise ValueError(
            f"loss is {loss.item()}; its batch is in {folder}/nan_dump.safetensors; first bad weight: {bad}"
        )
