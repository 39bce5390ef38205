"""Run the attention projections in INT8.

What it does. Replaces chosen nn.Linear layers, found by their names in any model, by layers that
multiply integers of 8 bits. For inference only.
Paper: §3.4 and Table 1: 27.38 frames/s without INT8, about 40 with. (Without it the release seems
to run these layers in float32; over bfloat16 a gain of 1.23 is the most, as they are 19 % of the
work.)
Released: the layer, no weights.

Why it works. A GPU multiplies small integers faster than floats. So each row of numbers is written
as integers from −127 to 127 times one scale s. A row of weights (those of one output) is converted
once, a row of inputs (a token) at every call:

    s = max_k |row[k]| / 127                                                                   (1)
    row_int8 = round(row / s)                                                                  (2)

The scale s_x[m] of token m and the scale s_w[n] of output n do not depend on k, so they can be
taken out of the sum over the K inputs:

    y[m,n] = Σ_k x[m,k]·w[n,k] ≈ (Σ_k x_int8[m,k]·w_int8[n,k])·s_x[m]·s_w[n]                   (3)

A bias is added as it is.

The sum of integers is exact: it stays below 2³¹ for every K below 133,000. So all error comes from
(2): an entry is off by e_x or e_w, at most s/2. Multiply out (x + e_x)·(w + e_w), take absolute
values, and the error of the output ŷ cannot be larger than

    |ŷ − y| <= s_w/2·Σ_k |x| + s_x/2·Σ_k |w| + K·s_x·s_w/4                                     (4)

Usually it is much smaller, because errors of both signs cancel. Take e as evenly distributed in
±s/2: its variance is s²/12. With c, the largest entry of a row divided by the root of its mean
square, (1) makes this a share c²/(12·127²) of the row's mean square. For independent errors the
shares of x and w add up, and the power of the signal over that of the error, in decibels, is

    SQNR = 10·log10(12·127² / (c_x² + c_w²)) dB                                                (5)

So a row with one large entry and many small ones (a large c) is hurt most, and since every row has
its own scale, no other row is. By default only self_attn.{q,k,v,o} are converted, as in the paper.

What differs, and is as released with kind="released": the released kernel truncates activations
toward zero (it casts its ±0.5 to int8 before adding it, which makes it 0), its weight scales end up
in bf16 with the rest of the model, and the product is rounded to bf16 before the bias is added.
Here a token of zeros gives the bias, not NaN. What torch._int_mm does not take (few rows, odd
widths, other devices) is padded, or computed in float64, which is exact too.

A CPU has no use for it but to show that the numbers are right: bfloat16 is faster there.

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
    """(M, K) -> (M, K) int8, (M,) scales. As in the release, x is multiplied by 1/s, not divided by s."""
    largest = x.float().abs().amax(dim=1).clamp(min=1e-12)
    inverse = 127 / largest  # 1/s of (1)
    scaled = x.float() * inverse[:, None]
    rounded = scaled.trunc() if released else scaled.round()  # (2)
    return rounded.to(torch.int8), 1 / inverse


def error_bound(x: Tensor, w: Tensor) -> Tensor:  # (M, K), (N, K) -> (M, N)
    """No output of the layer is further off than this."""
    _, s_x = quantise_rows(x)
    _, s_w = quantise_weight(w)
    s_x = s_x[:, None]
    sum_x = x.abs().sum(1)[:, None]
    sum_w = w.abs().sum(1)
    return s_w / 2 * sum_x + s_x / 2 * sum_w + x.shape[1] * s_x * s_w / 4  # (4)


def expected_sqnr(x: Tensor, w: Tensor) -> float:  # dB
    """How far the error lies below the signal, if rows have the mean c² of these."""

    def mean_c_squared(rows: Tensor) -> float:
        largest = rows.abs().amax(1).square()
        return (largest / rows.square().mean(1)).mean().item()

    noise = mean_c_squared(x) + mean_c_squared(w)
    return 10 * math.log10(12 * 127**2 / noise)  # (5)


def sqnr(y_hat: Tensor, y: Tensor) -> float:  # dB, measured
    return 20 * math.log10(y.norm() / (y_hat - y).norm())


# ---- the integer product -------------------------------------------------------------------------


def int_mm(a: Tensor, b: Tensor) -> Tensor:  # (M, K), (N, K) int8 -> (M, N) int32, exact
    M, K = a.shape
    N = b.shape[0]
    if a.is_cpu:
        return torch._int_mm(a, b.t())
    if a.is_cuda and K % 8 == 0 and N % 8 == 0:
        if M <= 16:  # it takes no fewer than 17 rows
            a = nn.functional.pad(a, (0, 0, 0, 32 - M))
        return torch._int_mm(a, b.t())[:M]
    return int_mm_plain(a, b)


def int_mm_plain(a: Tensor, b: Tensor) -> Tensor:
    """The same in float64, in which whole numbers below 2⁵³ are exact; tests compare with it."""
    return (a.double() @ b.double().t()).to(torch.int32)


# ---- the layer -----------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """An nn.Linear with a scale for each output's weights and, at every call, one for each token."""

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
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Int8Linear":
        # model.to(bfloat16) comes here and would round the scales (as happens in the release), and
        # with a scale all weights of its row change: keep them as they were
        exact = self.weight_scales
        super()._apply(fn, recurse)
        if self.weight_scales.dtype != exact.dtype:
            self.weight_scales = exact.to(self.weight_scales.device)
        return self


# ---- whole models --------------------------------------------------------------------------------


def chosen(model: nn.Module, which: str = "qkvo") -> list[str]:
    """Names of the linear layers that `which` means: one of LAYERS, or several as in "qkvo+ffn"."""
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
    """Replace the chosen layers in place, and return their names.

    which="released:all" is short for which="all", kind="released".
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
    """Error as (5) expects it and within (4); what one huge entry does; bytes saved."""
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
