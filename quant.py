"""Run the attention projections in INT8.

What it does. Replaces nn.Linear by a layer whose product is one of integers. It never meets a
model class, and is for inference only.
Paper: §3.4 and Table 1 (27.38 frames/s without INT8, about 40 with).  Released: the layer, no
weights.

Why it works. Write every row of the weights as small integers times a scale, once, and every
token too, at every call:

    s = max_k |row[k]| / 127                                                                   (1)
    row_int8 = round(row / s)                                                                  (2)

A scale per token m and one per output channel n do not depend on k, so they leave the sum over k:

    y[m,n] = Σ_k x[m,k]·w[n,k] + b[n] ≈ (Σ_k x_int8[m,k]·w_int8[n,k])·s_x[m]·s_w[n] + b[n]     (3)

What is left in it is exact: K products of 7 bits fit into 32 for every K below 130,000. So all
error is that of rounding (2), at most s/2 an entry. Multiply out (x + e_x)(w + e_w) and nothing
can be worse than

    |ŷ − y| <= s_w/2·Σ_k |x| + s_x/2·Σ_k |w| + K·s_x·s_w/4                                     (4)

Errors do not conspire, though. A rounding error is uniform in ±s/2, its variance s²/12; with c =
max/rms of a row that is c²/(12·127²) of the row's power, and the powers of independent errors
add:

    SQNR = 10·log10(12·127² / (c_x² + c_w²)) dB                                                (5)

So what hurts is a row with one large entry and many small ones. A scale per row, not per matrix,
keeps such a row from hurting others. By default only self_attn.{q,k,v,o} are converted, the
paper's list.

What differs, and is undone by kind="released": the released kernel truncates activations toward
zero (its ±0.5 is cast to int8 before it is added), its weight scales end up bf16 with the rest of
the model, and it rounds the product to bf16 before adding the bias. Here a token of zeros gives
the bias, not NaN; shapes and devices that torch._int_mm refuses take padding or an exact product
in float64.

On a CPU this shows that the numbers are right; at width 256 it is a little slower than bf16.

Try it: python quant.py      Tests: pytest tests/test_quant.py
"""

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

LAYERS = {  # name -> which nn.Linear, by its path inside the model
    "qkvo": r"(.*\.)?self_attn\.[qkvo]",  # the paper's list
    "cross": r"(.*\.)?cross_attn\.[qkvo]",  # the released pipelines convert qkvo+cross
    "ffn": r"(.*\.)?ffn\.\d+",
    "all": r"(.*\.)?blocks\..*",
}

# ---- rows as integers ----------------------------------------------------------------------------


def quantise_weight(w: Tensor) -> tuple[Tensor, Tensor]:  # (N, K) -> (N, K) int8, (N,) float32
    largest = w.float().abs().amax(dim=1)
    scales = (largest / 127).clamp(min=1e-12)  # (1)
    rounded = (w.float() / scales[:, None]).round()  # (2)
    return rounded.clamp(-128, 127).to(torch.int8), scales


def quantise_rows(x: Tensor, released: bool = False) -> tuple[Tensor, Tensor]:
    """(M, K) -> (M, K) int8, (M,) scales. One division a row, not one an entry."""
    largest = x.float().abs().amax(dim=1).clamp(min=1e-12)
    inverse = 127 / largest  # (1), upside down
    scaled = x.float() * inverse[:, None]
    rounded = scaled.trunc() if released else scaled.round()  # (2)
    return rounded.to(torch.int8), 1 / inverse


def error_bound(x: Tensor, w: Tensor) -> Tensor:  # (M, K), (N, K) -> (M, N)
    """No output of the layer is further off than this."""
    s_x = quantise_rows(x)[1][:, None]
    s_w = quantise_weight(w)[1]
    sum_x = x.abs().sum(1)[:, None]
    sum_w = w.abs().sum(1)
    return s_w / 2 * sum_x + s_x / 2 * sum_w + x.shape[1] * s_x * s_w / 4  # (4)


def expected_sqnr(x: Tensor, w: Tensor) -> float:  # dB
    """How far the error lies below the signal, for rows like these."""
    powers = [rows.abs().amax(1).square() / rows.square().mean(1) for rows in (x, w)]  # c²
    noise = sum(power.mean().item() for power in powers)
    return 10 * math.log10(12 * 127**2 / noise)  # (5)


def sqnr(y_hat: Tensor, y: Tensor) -> float:  # dB, measured
    return 20 * math.log10(y.norm() / (y_hat - y).norm())


# ---- the integer product -------------------------------------------------------------------------


def int_mm(a: Tensor, b: Tensor) -> Tensor:  # (M, K), (N, K) int8 -> (M, N) int32, exact
    M, K = a.shape
    N = b.shape[0]
    if a.device.type == "cpu":
        return torch._int_mm(a, b.t())
    if a.device.type == "cuda" and K % 8 == 0 and N % 8 == 0:
        few = nn.functional.pad(a, (0, 0, 0, 32 - M)) if M <= 16 else a  # it wants more than 16
        return torch._int_mm(few, b.t())[:M]
    return int_mm_plain(a, b)


def int_mm_plain(a: Tensor, b: Tensor) -> Tensor:
    """The oracle: sums below 2⁵³ are exact in float64."""
    return (a.double() @ b.double().t()).to(torch.int32)


# ---- the layer -----------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """Weights per output channel, activations per token."""

    def __init__(self, linear: nn.Linear, released: bool = False):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.released = released
        weight_int8, scales = quantise_weight(linear.weight.detach())
        if released:
            scales = scales.bfloat16().float()
        self.register_buffer("weight_int8", weight_int8)  # (N, K)
        self.register_buffer("weight_scales", scales)  # (N,)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "a quantised layer passes no gradient: run it under torch.no_grad(), "
                "or train the float model and quantise it afterwards"
            )
        tokens = x.reshape(-1, self.in_features)
        x_int8, x_scales = quantise_rows(tokens, self.released)
        product = int_mm(x_int8, self.weight_int8).float()
        y = product * x_scales[:, None] * self.weight_scales  # (3)
        if self.released:
            y = y.bfloat16()
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)  # (3)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Int8Linear":
        # model.to(bfloat16) would round the scales, and with them every weight, as the release does
        exact = self.weight_scales
        super()._apply(fn, recurse)
        if self.weight_scales.dtype != exact.dtype:
            self.weight_scales = exact.to(self.weight_scales.device)
        return self


# ---- whole models --------------------------------------------------------------------------------


def chosen(model: nn.Module, which: str = "qkvo") -> list[str]:
    """Names of the linear layers that `which` means, e.g. "qkvo", "qkvo+ffn", "all"."""
    words = which.split("+")
    unknown = [word for word in words if word not in LAYERS]
    if unknown:
        raise ValueError(
            f"unknown layers {unknown[0]!r}; use {', '.join(LAYERS)}, or several joined by +"
        )
    pattern = "|".join(LAYERS[word] for word in words)
    linear = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    names = [name for name in linear if re.fullmatch(pattern, name)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer of {which!r} left to convert")
    return names


def quantize_(model: nn.Module, which: str = "qkvo", kind: str = "int8") -> list[str]:
    """Replace the chosen layers in place; returns their names.

    "released:all" names the kind and the layers in one word.
    """
    if ":" in which:
        kind, which = which.split(":", 1)
    if kind not in ("int8", "released"):
        raise ValueError(f"unknown kind {kind!r}; use int8 or released (its rounding)")
    names = chosen(model, which)
    for name in names:
        layer = Int8Linear(model.get_submodule(name), released=kind == "released")
        model.set_submodule(name, layer)
    return names


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 256)
    x = torch.randn(304, 256)
    y = linear(x)

    ours = Int8Linear(linear)
    released = Int8Linear(linear, released=True)
    expected = expected_sqnr(x, linear.weight)
    print(f"error below the signal: {sqnr(ours(x), y):.1f} dB, expected {expected:.1f} dB")
    print(f"with the released truncation: {sqnr(released(x), y):.1f} dB")

    error = (ours(x) - y).abs()
    share = (error / error_bound(x, linear.weight)).max()
    print(f"the worst of {y.numel():,} outputs uses {share:.0%} of the bound (4); allowed: 100%")

    x[0, 0] = 1000.0
    spoilt = sqnr(ours(x)[:1], linear(x)[:1])
    others = sqnr(ours(x)[1:], y[1:])
    print(
        f"a token with one huge entry falls to {spoilt:.1f} dB, its neighbours stay at {others:.1f}"
    )
    print(f"weights: {linear.weight.nbytes:,} bytes -> {ours.weight_int8.nbytes:,}")


if __name__ == "__main__":
    main()
