"""One step of training: shards, precision, Muon, average.

    low = low_precision_copy(model)       the network that computes; a step then reads
    copy_weights_down(low, model)         float32 weights -> it
    loss(low).backward()
    copy_gradients_up(low, model)         its gradients -> the float32 weights
    update(opts, model, ...)              clip, step, zero, average

Weights are kept in float32, because a step changes one by less than bfloat16 can write down. On
several ranks FSDP2 does all of that itself, and one process gives the same numbers.  Tests:
test_optim.py
"""

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
    if not dist.is_initialized():
        return model
    kind = next(model.parameters()).device.type
    mesh = init_device_mesh("cpu" if kind == "meta" else kind, (dist.get_world_size(),))

    # weights are lowered, inputs are not: 987.65 would become timestep 988.28, and the modulation,
    # the residual stream and the rotary angles would follow
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def unshard(x: Tensor) -> Tensor:
    """A sharded tensor gathered; anything else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def reshard_like(full: Tensor, target: Tensor) -> Tensor:
    """A whole tensor laid out as the target is."""
    full = full.to(target.device)
    if isinstance(target, DTensor):
        return distribute_tensor(full, target.device_mesh, target.placements)
    return full


def low_precision_copy(model: nn.Module, dtype: torch.dtype, recompute: bool = False) -> nn.Module:
    """The model that computes: a copy in a lower precision, or the model itself.

    recompute: its blocks keep only their inputs, and run again in the backward pass.
    """
    low = model
    if dtype != torch.float32 and not dist.is_initialized():  # FSDP lowers it on its own
        low = copy.deepcopy(model).to(dtype)
    if recompute:
        for block in low.blocks:
            run = partial(type(block).forward, block)  # copies along with the block
            block.forward = partial(checkpoint, run, use_reentrant=False)
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

    A gradient's momentum G = U S Vᵀ is dominated by a few directions. Muon steps along U Vᵀ, the
    nearest orthogonal matrix, found without a decomposition: the odd polynomial a·X + b·XXᵀX +
    c·(XXᵀ)²X drives every singular value towards 1, five times over. torch.optim.Muon computes the
    same, always in bfloat16: forty times slower where a processor has no such instructions, and
    then most of a training step. This one computes in the precision of the run.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero; ends between 0.7 and 1.2

    def __init__(
        self,
        weights: Sequence[nn.Parameter],  # kernels too: they are flattened to matrices
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,  # of the five iterations
    ):
        self.weights = list(weights)
        # matrices in the same memory
        matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.weights]
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for p, matrix in zip(self.weights, self.param_groups[0]["params"], strict=True):
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
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
    """Muon on the matrices inside DiT blocks and VAE coders, AdamW on everything else."""
    inside = []
    others = []
    for name, p in model.named_parameters():
        in_a_block = "blocks." in name or "coder." in name
        is_matrix = p.ndim > 1 and min(p.flatten(1).shape) > 16
        chosen = inside if muon and in_a_block and is_matrix else others
        chosen.append(p)

    found = [torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=decay)]
    if inside:
        found.append(Muon(inside, muon, decay, dtype=dtype))
    for optimizer in found:
        group = optimizer.param_groups[0]
        group["initial_lr"] = group["lr"]  # of which update() takes a share
    return found


def update(
    opts: list[torch.optim.Optimizer],
    model: nn.Module,
    factor: float,  # on every learning rate
    clip: float,  # of the gradient norm
    ema: list[Tensor],  # empty: no average
    decay: float,  # of the average
) -> float:
    """Clip, step, zero, average. Returns the gradient norm."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in opts:
        group = optimizer.param_groups[0]
        group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    if ema:
        torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 1 - decay)
    return float(unshard(norm))


def lr_at(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to 5 %: a factor on every learning rate."""
    done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
    return min(1.0, (step + 1) / max(1, warmup)) * cosine


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
    """A loss that is no number ends the run: its batch on disk, the first bad weight named."""
    losses = gathered(loss.detach()[None])  # every rank stops, also for the loss of another
    if losses.isfinite().all():
        return
    bad = [name for name, p in model.named_parameters() if not unshard(p).isfinite().all()]
    first = bad[0] if bad else "none: activations overflowed"
    dump = folder / "nan_dump.safetensors"
    weights.write_weights(dump, {name: t.detach() for name, t in batch.items()})
    raise ValueError(f"loss is {loss.item()}; its batch is in {dump}; first bad weight: {first}")
