"""Two networks, one per noise range, behind one door: two whole networks, not a token router.

Paper: §3.5 (28B = 2 x 14B). Neither weights nor code were released; the scheme is Wan2.2-A14B's.

    v(x_σ, σ, c) = v_high(x_σ, σ, c)  if σ >= boundary  else  v_low(x_σ, σ, c)                 (1)

Why the noise axis splits. In x_σ = (1 − σ)·x0 + σ·ε a component of x0 of power P stands above the
noise by

    SNR(σ)·P,    SNR(σ) = ((1 − σ)/σ)²                                                         (2)

and the best guess of it keeps that share of what is seen which is signal, not noise:

    decided(σ, P) = SNR·P / (1 + SNR·P)                                                        (3)

Pictures have their power in what is large and slow: going down from noise, layout and motion are
decided first, details last. At the boundary, σ = .9 with SNR 1/81, a component of 81 times the
mean power is half decided, one of mean power by 1 %. Above it a network plans, below it one
paints, and each gets all its weights for one task.

Going down σ the expert changes once: a step costs one 14B forward, and only one network has to be
on the device (offload). Views plan differently and paint alike: a high-noise expert for each, one
low-noise expert for both. With cameras and actions an expert has 19.1 B parameters, 14.3 B of
them as in Wan2.2.

What differs. The boundary is not disclosed; here it is Wan2.2's. All experts share one context.

Try it: python moe.py      Tests: pytest tests/test_moe.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit import PRESETS as DENSE
from dit import DiT, DiTConfig


@dataclass(frozen=True)
class MoEConfig:
    expert: DiTConfig = DiTConfig()  # the architecture of every expert
    boundary: float = 0.9  # σ from which the high-noise expert works
    views: tuple[str, ...] = ("first", "third")  # one high-noise expert each


PRESETS = {
    "micro-moe": MoEConfig(DENSE["micro"]),
    "tiny-moe": MoEConfig(DENSE["tiny"]),
    "28b-moe": MoEConfig(DENSE["14b"]),
}


class Experts(nn.Module):
    """One high-noise expert per view and a low-noise expert they share; answers like a dense DiT."""

    def __init__(
        self,
        high: dict[str, nn.Module],  # view -> DiT
        low: nn.Module,
        boundary: float = 0.9,
        offload: bool = False,  # idle experts wait on the CPU, the working one joins its input
    ):
        super().__init__()
        self.high = nn.ModuleDict(high)
        self.low = low
        self.cfg = low.cfg
        self.boundary = boundary
        self.offload = offload
        self.view = next(iter(high))  # of this session; see look()

    @property
    def config(self) -> MoEConfig:
        """What a checkpoint stores."""
        return MoEConfig(self.cfg, self.boundary, tuple(self.high))

    def look(self, view: str) -> "Experts":
        if view not in self.high:
            raise ValueError(f"no expert for view {view!r}; this model has {', '.join(self.high)}")
        self.view = view
        return self

    def which(self, sigma: Tensor) -> str:  # (B,) -> "low" or the name of a view
        high = sigma >= self.boundary
        if high.any() != high.all():
            raise ValueError(f"one expert a step: {sigma} is on both sides of {self.boundary}")
        return self.view if high.all() else "low"

    def at(self, name: str, device: torch.device) -> nn.Module:
        """The expert of this name, on the device where it is needed."""
        experts = {**self.high, "low": self.low}
        if self.offload:
            for other, idle in experts.items():
                if other != name:
                    idle.to("cpu")
            experts[name].to(device)
        return experts[name]

    def prepare(self, context, group=None) -> dict:
        """Filled by the first step of an expert, emptied when the next one takes over."""
        return {"inputs": (context, group)}

    def forward(self, x_sigma, sigma, context, prepared=None, return_past=False) -> Tensor:
        """As DiT.forward."""
        name = self.which(sigma)
        expert = self.at(name, x_sigma.device)  # (1)
        if prepared is None:
            return expert(x_sigma, sigma, context, return_past=return_past)
        if name not in prepared:
            inputs = prepared["inputs"]
            # the other expert's share is large and not needed again
            prepared.clear()
            prepared.update({"inputs": inputs, name: expert.prepare(*inputs)})
        return expert(x_sigma, sigma, context, prepared=prepared[name], return_past=return_past)


def build(preset: str | DiTConfig | MoEConfig, device: str | torch.device = "cpu") -> DiT | Experts:
    """A fresh model of either kind, by preset or config; device "meta" costs no memory."""
    known = {**DENSE, **PRESETS}
    if isinstance(preset, str) and preset not in known:
        raise ValueError(f"unknown preset {preset!r}; use {', '.join(known)}")
    cfg = known[preset] if isinstance(preset, str) else preset
    with torch.device(device):
        if not isinstance(cfg, MoEConfig):
            return DiT(cfg)
        high = {view: DiT(cfg.expert) for view in cfg.views}
        return Experts(high, DiT(cfg.expert), cfg.boundary)


def decided(sigma: float, power: float) -> float:  # 0: all is open, 1: nothing is
    snr = ((1 - sigma) / sigma) ** 2  # (2)
    return snr * power / (1 + snr * power)  # (3)


def main() -> None:
    experts = build("micro-moe", "meta")
    for sigma in (0.99, 0.9, 0.89, 0.5):
        layout, detail = decided(sigma, 81), decided(sigma, 1)
        who = experts.which(torch.tensor([sigma]))
        print(f"σ {sigma:.2f}: decided of layout {layout:3.0%}, of detail {detail:3.0%}: {who}")
    size = sum(p.numel() for p in build("28b-moe", "meta").low.parameters()) / 1e9
    print(f"28b-moe: a step runs {size:.1f} B parameters of the {2 * size:.1f} B of a view")


if __name__ == "__main__":
    main()
