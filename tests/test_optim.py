"""The optimiser's step: Muon is torch's, in the precision of the run."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dit
from engine.optim import Muon, low_precision_copy, optimizers, shard

SHAPES = [(32, 32), (64, 24), (24, 64)]


def matrices() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]


def walk(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 3) -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()


def test_in_bfloat16_muon_is_torchs_to_the_bit() -> None:
    ours = matrices()
    theirs = matrices()
    walk(Muon(ours, 0.01, 0.1), ours)
    walk(torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1), theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_in_float32_it_takes_the_same_way_a_little_more_precisely() -> None:
    rough = matrices()
    exact = matrices()
    walk(Muon(rough, 0.01), rough)
    walk(Muon(exact, 0.01, dtype=torch.float32), exact)
    for a, b, start in zip(rough, exact, matrices(), strict=True):
        assert (a - b).norm() < 0.05 * (b - start).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_direction_gets_a_step_of_about_the_same_size(shape: tuple[int, int]) -> None:
    rows, columns = shape
    n = min(shape)
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(rows, n)).Q
    V = torch.linalg.qr(torch.randn(columns, n)).Q
    g = U @ torch.diag(torch.logspace(0, -1.5, n)) @ V.mT  # thirty times more along one direction
    step = Muon([nn.Parameter(g)], 0.01, dtype=torch.float32).orthogonal(g)
    sizes = torch.linalg.svdvals(step)
    assert 0.3 < sizes.min() and sizes.max() < 1.3
    # the same directions as the nearest orthogonal matrix
    nearest = U @ V.mT
    cosine = (step * nearest).sum() / (step.norm() * nearest.norm())
    assert cosine > 0.95


def test_matrices_inside_blocks_go_to_muon_and_share_their_memory() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(32, 32)])
    model.head = nn.Linear(32, 32)
    adam, muon = optimizers(model, 1e-3, 1e-2, dtype=torch.float32)
    (matrix,) = muon.param_groups[0]["params"]
    assert matrix.data_ptr() == model.blocks[0].weight.data_ptr()
    assert len(adam.param_groups[0]["params"]) == 3
    assert muon.dtype == torch.float32
    assert len(optimizers(model, 1e-3)) == 1


def test_a_kernel_is_stepped_as_the_matrix_that_it_is() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(32, 4, 2, 3))
    flat = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn(kernel.shape)
    flat.grad = kernel.grad.flatten(1).clone()
    for p in (kernel, flat):
        Muon([p], 0.01, dtype=torch.float32).step()
    assert torch.equal(kernel.flatten(1), flat)


@pytest.fixture
def one_rank() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def answer(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    context = dit.random_context(model.cfg, memory=2, past=2, new=3, size=4)
    x = torch.randn(1, model.cfg.in_dim, 3, 4, 4)
    with torch.no_grad():
        return model(x, torch.tensor([0.98765]), context)


def loud() -> nn.Module:
    torch.manual_seed(0)
    model = dit.DiT(dit.PRESETS["micro"])
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def test_a_sharded_model_in_bfloat16_is_the_low_precision_copy_to_the_bit(request) -> None:
    exact = answer(loud())
    alone = answer(low_precision_copy(loud(), torch.bfloat16))
    request.getfixturevalue("one_rank")
    sharded = answer(shard(loud(), torch.bfloat16))
    assert not torch.equal(alone, exact)  # it did compute in bfloat16
    assert torch.equal(sharded, alone)
