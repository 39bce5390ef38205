"""What attention.py promises."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import plain_attention, plain_rope, relative_error
from torch import Tensor

import attention as attention_file
from attention import attention


def gradients(y: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    loss = y.float().sin().sum()
    return torch.autograd.grad(loss, inputs)


def test_a_rotation_keeps_lengths_and_turns_pairs():
    x = torch.randn(2, 5, 3, 8)
    angles = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    rope = attention_file.cos_sin(angles)
    y = attention_file.rotate(x, rope)
    assert torch.allclose(y, plain_rope(x, angles), atol=1e-6)
    before = x.norm(dim=-1)
    after = y.norm(dim=-1)
    assert torch.allclose(after, before, rtol=1e-5)

    no_turn = torch.tensor([1.0, 0.0]).expand(rope.shape)
    assert torch.equal(attention_file.rotate(x, no_turn), x)


def test_a_clock_per_head_leaves_near_times_alike_and_breaks_the_ghosts_far_away():
    one = attention_file.Clocks(256, 4, 0.0)
    per_head = attention_file.Clocks(256, 4, 0.8)
    near = torch.tensor([0, 10])
    alike_one = attention_file.likeness(near, one)
    alike_per_head = attention_file.likeness(near, per_head)
    assert torch.allclose(alike_one, alike_per_head, atol=0.01)

    far = torch.arange(200, 2000)
    ghost = attention_file.likeness(far, one).max()
    assert attention_file.likeness(far, per_head).max() < 0.7 * ghost


@pytest.mark.parametrize("kernel", ["torch", "flash"])
def test_attention_is_softmax_of_products(kernel: str, monkeypatch: pytest.MonkeyPatch):
    # the real kernel needs a GPU; a stand-in with its axes shows that ours reach it in its order
    if kernel == "flash":
        monkeypatch.setattr(attention_file, "pick_flash", lambda q: plain_attention)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 7, 4, 8, generator=g)
    k = torch.randn(3, 9, 4, 8, generator=g)
    v = torch.randn(3, 9, 4, 8, generator=g)
    inputs = (q, k, v)
    for x in inputs:
        x.requires_grad_()

    ours = attention(q, k, v)
    naive = plain_attention(q, k, v)
    assert torch.allclose(ours, naive, atol=1e-6)

    our_gradients = gradients(ours, inputs)
    naive_gradients = gradients(naive, inputs)
    for a, b in zip(our_gradients, naive_gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_training_in_bfloat16_on_a_cpu_attends_by_the_formula(monkeypatch):
    monkeypatch.delattr(attention_file.F, "scaled_dot_product_attention")
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 7, 4, 8, generator=g)
    k = torch.randn(3, 9, 4, 8, generator=g)
    v = torch.randn(3, 9, 4, 8, generator=g)
    low = tuple(x.bfloat16().requires_grad_() for x in (q, k, v))
    y = attention(*low)
    assert y.dtype == torch.bfloat16

    exact = tuple(x.detach().float().requires_grad_() for x in low)
    naive = plain_attention(*exact)
    assert relative_error(y.float(), naive) < 0.01
    for ours, true in zip(gradients(y.float(), low), gradients(naive, exact), strict=True):
        assert relative_error(ours.float(), true) < 0.02


def test_a_cpu_and_float32_never_ask_for_flash_attn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_file, "flash_kernel", lambda: "flash")
    on_cpu = SimpleNamespace(is_cuda=False, element_size=lambda: 2)
    in_float32 = SimpleNamespace(is_cuda=True, element_size=lambda: 4)
    in_bf16_on_a_gpu = SimpleNamespace(is_cuda=True, element_size=lambda: 2)
    assert attention_file.pick_flash(on_cpu) is None
    assert attention_file.pick_flash(in_float32) is None
    assert attention_file.pick_flash(in_bf16_on_a_gpu) == "flash"


def test_flash_attn_is_named_once_when_absent_and_when_broken(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert attention_file.load_flash.__wrapped__() is None
    absent = "attention: SDPA (flash-attn not installed; same result, slower on long clips)"
    assert absent in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "flash_attn")
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    assert attention_file.load_flash.__wrapped__() is None
    assert (
        "flash-attn is installed but does not load (undefined symbol: _ZN3c10): built for another torch. "
        "Using SDPA."
    ) in capsys.readouterr().err


@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        (torch.float32, 1e-6),
        (torch.bfloat16, 1e-2),
    ],
)
def test_our_rms_norm_equals_torchs(dtype: torch.dtype, tolerance: float):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 32, generator=g).to(dtype)
    x.requires_grad_()
    weight = torch.randn(32, generator=g).to(dtype)
    ours = attention_file.rms(x, weight)
    torchs = F.rms_norm(x, (32,), weight, 1e-6)
    assert relative_error(ours, torchs) < tolerance

    (our_gradient,) = gradients(ours, (x,))
    (torchs_gradient,) = gradients(torchs, (x,))
    assert relative_error(our_gradient, torchs_gradient) < 2 * tolerance


def test_more_ranks_than_places_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 5)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    with pytest.raises(ValueError, match="5 ranks cannot share 4 places; use at most 4 ranks"):
        attention_file.shares(4, SimpleNamespace())
    sizes, here = attention_file.shares(16, SimpleNamespace())
    assert sizes == [4, 3, 3, 3, 3]
    assert here == slice(0, 4)
