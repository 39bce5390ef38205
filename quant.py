"""Run the attention projections in INT8.

Paper: section 3.4 and Table 1 (27.38 frames/s without INT8, about 40 with). Released: the layer, no weights.

    s_w = max_k |w[n,k]| / 127     w_int8 = round(w / s_w)      once, per output channel n
    s_x = max_k |x[m,k]| / 127     x_int8 = round(x / s_x)      at every call, per token m
    y   = (x_int8 · w_int8ᵀ)·s_x·s_w + b                        the integer product is exact

By default only self_attn.{q,k,v,o}, the paper's list. "qkvo+cross" is what the released pipelines convert
(240 layers of the 5B), "ffn" the feed-forward layers, "all" every linear layer of the blocks; join with +.
This file never meets a model class: it replaces nn.Linear in any nn.Module. For inference only.
lab/bench.py says where the multiply-adds of a segment are: what a precision can save at all.

Departures, undone by kind="released": the released kernel truncates activations toward zero (its ±0.5 is
cast to int8 before it is added), its weight scales end up bf16 with the rest of the model, and it rounds the
product to bf16 before adding the bias. An all-zero token gives the bias, not NaN. Shapes and devices that
torch._int_mm refuses take padding or an exact product in float64, never another number.

Speed: on a CPU this is a correctness path (at width 256 a little slower than bf16, see README). On CUDA it pays for
passes over the int32 product.

Demo: python quant.py      Tests: pytest tests/test_quant.py
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LAYERS = {  # name -> which nn.Linear, by its path inside the model
    "qkvo": r"(.*\.)?self_attn\.[qkvo]",
    "cross": r"(.*\.)?cross_attn\.[qkvo]",
    "ffn": r"(.*\.)?ffn\.\d+",
    "all": r"(.*\.)?blocks\..*",
}

# ---- pure maths ------------------------------------------------------------------------------------------


def quantise_weight(w: Tensor) -> tuple[Tensor, Tensor]:  # (N, K) -> (N, K) int8, (N,) float32
    # s_w = max|w| / 127 ;  w_int8 = round(w / s_w), ties to even
    scales = (w.float().abs().amax(dim=1) / 127).clamp(min=1e-12)
    return (w.float() / scales[:, None]).round().clamp(-128, 127).to(torch.int8), scales


def quantise_rows(
    x: Tensor, released: bool = False
) -> tuple[Tensor, Tensor]:  # (M, K) -> (M, K) int8, (M,)
    # s_x = max|x| / 127 ;  x_int8 = round(x / s_x)
    inverse = 127 / x.float().abs().amax(dim=1).clamp(min=1e-12)
    scaled = x.float() * inverse[:, None]
    return (scaled.trunc() if released else scaled.round()).to(torch.int8), 1 / inverse


def int_mm(a: Tensor, b: Tensor) -> Tensor:  # (M, K), (N, K) int8 -> (M, N) int32, exact
    M, K = a.shape
    if a.device.type == "cuda" and K % 8 == 0 and b.shape[0] % 8 == 0:
        rows = (
            a if M > 16 else nn.functional.pad(a, (0, 0, 0, 32 - M))
        )  # it wants more than 16 rows
        return torch._int_mm(rows, b.t())[:M]
    if a.device.type == "cpu":
        return torch._int_mm(a, b.t())
    return int_mm_plain(a, b)


def int_mm_plain(a: Tensor, b: Tensor) -> Tensor:  # the oracle: |sum| < 2⁵³ is exact in float64
    return (a.double() @ b.double().t()).to(torch.int32)


# ---- layers ----------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """W8A8: weights per output channel, activations per token."""

    def __init__(self, linear: nn.Linear, released: bool = False):
        super().__init__()
        weight_int8, scales = quantise_weight(linear.weight.detach())
        self.in_features, self.out_features, self.released = (
            linear.in_features,
            linear.out_features,
            released,
        )
        self.register_buffer("weight_int8", weight_int8)  # (N, K)
        self.register_buffer(
            "weight_scales", scales.bfloat16().float() if released else scales
        )  # (N,)
        self.bias = _frozen(linear.bias)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        _no_grad_here(x)
        x_int8, x_scales = quantise_rows(x.reshape(-1, self.in_features), self.released)
        # y = (x_int8 · w_int8ᵀ)·s_x·s_w + b
        y = int_mm(x_int8, self.weight_int8).float() * x_scales[:, None] * self.weight_scales
        y = y.bfloat16() if self.released else y
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Int8Linear":
        return _keep_scales(self, super()._apply, fn, recurse)


def _keep_scales(layer: nn.Module, apply: Callable, fn: Callable, recurse: bool) -> nn.Module:
    """model.to(bfloat16) moves the scales but leaves them float32; the released code rounds them here."""
    scales = layer.weight_scales
    apply(fn, recurse)
    if layer.weight_scales.dtype != scales.dtype:
        layer.weight_scales = scales.to(layer.weight_scales.device)
    return layer


def _frozen(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)


def _no_grad_here(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "a quantised layer passes no gradient: run it under torch.no_grad(), "
            "or train the float model and quantise it afterwards"
        )


def quantised(linear: nn.Linear, kind: str = "int8") -> nn.Module:
    if kind not in ("int8", "released"):
        raise ValueError(f"unknown kind {kind!r}; use int8 or released (its rounding)")
    return Int8Linear(linear, released=kind == "released")


# ---- whole models ----------------------------------------------------------------------------------------


def chosen(model: nn.Module, which: str = "qkvo") -> list[str]:
    """Names of the linear layers that `which` means, e.g. "qkvo", "qkvo+ffn", "all"."""
    unknown = [w for w in which.split("+") if w not in LAYERS]
    if unknown:
        raise ValueError(
            f"unknown layers {unknown[0]!r}; use {', '.join(LAYERS)}, or several joined by +"
        )
    patterns = [LAYERS[w] for w in which.split("+")]
    names = [
        n
        for n, m in model.named_modules()
        if type(m) is nn.Linear and any(re.fullmatch(p, n) for p in patterns)
    ]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer of {which!r} left to convert")
    return names


def quantize_(model: nn.Module, which: str = "qkvo", kind: str = "int8") -> list[str]:
    """Replace the chosen layers in place; returns their names. "released:all" is the kind and the layers in one word."""
    kind, which = which.split(":", 1) if ":" in which else (kind, which)
    names = chosen(model, which)
    for name in names:
        model.set_submodule(name, quantised(model.get_submodule(name), kind))
    return names


def nbytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@dataclass
class LayerError:
    """What quantising one layer does to its output, on the inputs the model really gives it."""

    name: str
    signal: float = 0.0  # Σ y²
    noise: float = 0.0  # Σ (ŷ − y)²
    dot: float = 0.0  # Σ y·ŷ
    energy: float = 0.0  # Σ ŷ²
    max_error: float = 0.0  # max |ŷ − y|

    def add(self, y: Tensor, y_hat: Tensor) -> None:
        y, y_hat = y.detach().double(), y_hat.double()
        self.signal += y.square().sum().item()
        self.noise += (y_hat - y).square().sum().item()
        self.dot += (y * y_hat).sum().item()
        self.energy += y_hat.square().sum().item()
        self.max_error = max(self.max_error, (y_hat - y).abs().max().item())

    @property
    def sqnr(self) -> float:  # dB
        # SQNR = 10·log10( Σ y² / Σ (ŷ − y)² )
        return 10 * torch.tensor(self.signal / max(self.noise, 1e-300)).log10().item()

    @property
    def cosine(self) -> float:
        return self.dot / max((self.signal * self.energy) ** 0.5, 1e-300)

    @property
    def verdict(self) -> str:  # the released verification mode's words
        return (
            "EXCELLENT" if self.cosine > 0.999 else "GOOD" if self.cosine > 0.99 else "INVESTIGATE"
        )


def report(
    model: nn.Module,  # in float; left as it was
    run: Callable[[], object],  # calls the model on real inputs, once or often
    which: str = "qkvo",
    kind: str = "int8",
) -> list[LayerError]:  # one per layer, over all its calls
    """Set each chosen layer beside its quantised twin, on the inputs it meets inside the float model."""
    rows, hooks = [], []
    for name in chosen(model, which):
        layer, row = model.get_submodule(name), LayerError(name)
        twin = quantised(layer, kind)

        def compare(layer, inputs, y, twin=twin, row=row):
            row.add(y, twin(inputs[0].detach()))

        hooks.append(layer.register_forward_hook(compare))
        rows.append(row)
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    block = nn.ModuleDict(
        {
            "self_attn": nn.ModuleDict({n: nn.Linear(256, 256) for n in "qkvo"}),
            "ffn": nn.Sequential(nn.Linear(256, 640), nn.GELU(), nn.Linear(640, 256)),
        }
    )
    x = torch.randn(304, 256)
    exact = torch.cat([block["self_attn"][n](x) for n in "qkvo"]).detach()
    for kind, what in {"int8": "true rounding", "released": "truncation"}.items():
        rows = report(block, lambda: [block["self_attn"][n](x) for n in "qkvo"], kind=kind)
        print(
            f"{kind:9s}({what:13s}) "
            + "  ".join(f"{r.name[-1]} {r.sqnr:.1f} dB" for r in rows)
            + f"   cosine {min(r.cosine for r in rows):.5f} {rows[0].verdict}"
        )
    before = nbytes(block["self_attn"])
    print(f"converted {quantize_(block)}: {before:,} -> {nbytes(block['self_attn']):,} bytes")
    with torch.no_grad():
        error = torch.cat([block["self_attn"][n](x) for n in "qkvo"]) - exact
        one = block["self_attn"]["q"](x[:1])
    print(
        f"relative error {error.norm() / exact.norm():.4f}; "
        f"of a single row {(one - exact[:1]).norm() / exact[:1].norm():.4f}"
    )
