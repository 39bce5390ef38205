"""What attention.py promises."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import attention as attention_file
from attention import attention


def rel(ours: Tensor, golden: Tensor) -> float:
    return float((ours - golden).detach().norm() / golden.detach().norm())


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, L, heads, head_dim)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def plain_rope(x: Tensor, angles: Tensor) -> Tensor:  # (B, L, heads, d), (..., heads, d/2)
    turn = torch.polar(torch.ones_like(angles), angles)  # complex128
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn
    return torch.view_as_real(turned).flatten(-2).to(x)


def naive_ragged(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return torch.cat(
        [plain_attention(q[[i]], k[[i], :n], v[[i], :n]) for i, n in enumerate(lengths)]
    )


def test_a_rotation_keeps_lengths_and_turns_pairs():
    x, angles = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    rope = torch.stack([angles.cos(), angles.sin()], -1).float()
    y = attention_file.rotate(x, rope)
    assert torch.allclose(y, plain_rope(x, angles), atol=1e-6)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.equal(attention_file.rotate(x, torch.tensor([1.0, 0.0]).expand(rope.shape)), x)


@pytest.mark.parametrize("backend", ["softmax", "sdpa", "flash", ""])
def test_ragged_attention_equals_naive_attention(backend: str, monkeypatch: pytest.MonkeyPatch):
    # the real kernel needs a GPU; a stand-in with its axes shows that ours reach it in its order
    monkeypatch.setattr(attention_file, "flash_attn", lambda: plain_attention)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 4, 8, generator=g, requires_grad=True) for n in (7, 9, 9))
    for lengths in (torch.tensor([9, 4, 1]), None):
        real = torch.full((3,), 9) if lengths is None else lengths
        ours, naive = attention(q, k, v, lengths, backend), naive_ragged(q, k, v, real)
        assert torch.allclose(ours, naive, atol=1e-6)
        for a, b in zip(
            torch.autograd.grad(ours.sin().sum(), (q, k, v)),
            torch.autograd.grad(naive.sin().sum(), (q, k, v)),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=1e-6)


def test_attention_picks_sdpa_when_the_scores_would_be_large(monkeypatch: pytest.MonkeyPatch):
    q = torch.empty(1, 17600, 24, 1)
    assert attention_file.pick_backend(q, q, False) == "sdpa"
    assert attention_file.pick_backend(q[:, :304, :4], q[:, :304, :4], False) == "softmax"


def test_flash_attn_is_named_once_when_absent_and_when_broken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention_file, "say", print)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert attention_file.load_flash.__wrapped__() is None
    absent = "attention: SDPA (flash-attn not installed; same result, slower on long clips)"
    assert absent in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "flash_attn")
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    assert attention_file.load_flash.__wrapped__() is None
    assert (
        "flash-attn is installed but does not load (undefined symbol: _ZN3c10): built for another torch. "
        "Using SDPA."
    ) in capsys.readouterr().out


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_our_rms_norm_equals_torchs(dtype: torch.dtype, tolerance: float):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 6, 32, generator=g).to(dtype), torch.randn(32, generator=g).to(dtype)
    x.requires_grad_()
    ours, torchs = attention_file.rms(x, weight), F.rms_norm(x, (32,), weight, 1e-6)
    assert rel(ours, torchs) < tolerance
    assert (
        rel(*(torch.autograd.grad(y.float().sin().sum(), x)[0] for y in (ours, torchs)))
        < 2 * tolerance
    )


def test_more_ranks_than_places_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 5)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    with pytest.raises(ValueError, match="5 ranks cannot share 4 places; use at most 4 ranks"):
        attention_file.shares(4, SimpleNamespace())
    assert attention_file.shares(16, SimpleNamespace()) == ([4, 3, 3, 3, 3], slice(0, 4))
