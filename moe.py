"""Two networks, one per noise range, behind one door: two whole networks, not a token router.

What it does. An `Experts` answers like a DiT, but asks one of several DiTs, its experts: at noise
level σ, about a context c,

    v(x_σ, σ, c) = v_high(x_σ, σ, c)  if σ >= boundary  else  v_low(x_σ, σ, c)                 (1)

There is one high-noise expert for each view (first and third person) and one low-noise expert that
all views share.
Paper: §3.5 (28B = 2 x 14B). Neither weights nor code were released; the scheme is Wan2.2-A14B's.

Why divide by noise level. In x_σ = (1 − σ)·x0 + σ·ε the noise has power σ² in every component of
the picture, and a component of x0 with power P has (1 − σ)²·P. Their ratio is

    SNR(σ)·P,    SNR(σ) = ((1 − σ)/σ)²                                                         (2)

The best linear guess of the component is what is seen, divided by 1 − σ, times the share of the
power seen that is signal. This share also says how much of the component can be known:

    decided(σ, P) = SNR·P / (1 + SNR·P)                  0: nothing, 1: all of it              (3)

The mean power of latents is 1, but large and slow components have much more than fine ones. So on
the way from σ = 1 to 0 the layout and the motion are decided first, details last. At the boundary,
σ = 0.9, SNR is 1/81: a component with 81 times the mean power is decided by half, one with the mean
power by 1 %. Above it layout is the task, below it detail; with a network for each, all weights of
a network serve one task.

On the way down the expert changes once. So a step costs no more than with one network, and only one
has to be on the device (offload).

What differs. The paper does not say where the boundary is; 0.9 is that of Wan2.2's image-to-video
model. Here all experts have cameras and actions, the low-noise one too: 19.1 B parameters each, of
which 14.3 B are Wan2.2's.

Try it: python moe.py      Tests: pytest tests/test_moe.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit import PRESETS as DENSE
from dit import DiT, DiTConfig


@dataclass(frozen=True)
class MoEConfig:
    """What a checkpoint stores beside the weights."""

    expert: DiTConfig = DiTConfig()  # the architecture of every expert
    boundary: float = 0.9  # the lowest σ of the high-noise experts
    views: tuple[str, ...] = ("first", "third")  # one high-noise expert each


PRESETS = {
    "micro-moe": MoEConfig(DENSE["micro"]),
    "tiny-moe": MoEConfig(DENSE["tiny"]),
    "28b-moe": MoEConfig(DENSE["14b"]),
}


class Experts(nn.Module):
    """One high-noise expert per view and a low-noise expert that they share; called like a DiT."""

    def __init__(
        self,
        high: dict[str, nn.Module],  # view -> DiT
        low: nn.Module,
        boundary: float = 0.9,
        offload: bool = False,  # only the expert in use is on the input's device, others on the CPU
    ):
        super().__init__()
        self.high = nn.ModuleDict(high)
        self.low = low
        self.cfg = low.cfg
        self.boundary = boundary
        self.offload = offload
        self.view = next(iter(high))  # whose high-noise expert is in use; see look()

    @property
    def moe_config(self) -> MoEConfig:
        return MoEConfig(self.cfg, self.boundary, tuple(self.high))

    def look(self, view: str) -> "Experts":
        """Use the high-noise expert of this view from now on."""
        if view not in self.high:
            raise ValueError(f"no expert for view {view!r}; this model has {', '.join(self.high)}")
        self.view = view
        return self

    def which(self, sigma: Tensor) -> str:  # (B,) -> "low" or the name of a view
        high = sigma >= self.boundary  # (1)
        if high.any() != high.all():
            raise ValueError(f"one expert a step: {sigma} is on both sides of {self.boundary}")
        return self.view if high.all() else "low"

    def at(self, name: str, device: torch.device) -> nn.Module:
        """The expert of this name; with offload it is moved to the device, and the others away."""
        experts = {**self.high, "low": self.low}
        if self.offload:
            for other, idle in experts.items():
                if other != name:
                    idle.to("cpu")
            experts[name].to(device)
        return experts[name]

    def prepare(self, context, group=None) -> dict:
        """As DiT.prepare, but an expert prepares when it is first asked: here the inputs are kept."""
        return {"inputs": (context, group)}

    def forward(self, x_sigma, sigma, context, prepared=None, return_past=False) -> Tensor:
        """As DiT.forward, without return_features."""
        name = self.which(sigma)
        expert = self.at(name, x_sigma.device)
        if prepared is None:
            return expert(x_sigma, sigma, context, return_past=return_past)
        if name not in prepared:
            # what the other expert has prepared is large, and not needed again
            inputs = prepared["inputs"]
            prepared.clear()
            prepared.update({"inputs": inputs, name: expert.prepare(*inputs)})
        return expert(x_sigma, sigma, context, prepared=prepared[name], return_past=return_past)


def build(preset: str | DiTConfig | MoEConfig, device: str | torch.device = "cpu") -> DiT | Experts:
    """A new DiT or Experts, by the name of a preset or by config; on device "meta" it has no memory."""
    known = {**DENSE, **PRESETS}
    if isinstance(preset, str) and preset not in known:
        raise ValueError(f"unknown preset {preset!r}; use {', '.join(known)}")
    cfg = known[preset] if isinstance(preset, str) else preset
    with torch.device(device):
        if not isinstance(cfg, MoEConfig):
            return DiT(cfg)
        high = {view: DiT(cfg.expert) for view in cfg.views}
        return Experts(high, DiT(cfg.expert), cfg.boundary)


def decided(sigma: float, power: float) -> float:
    """The share of a component of this power that can be known at noise level sigma."""
    snr = ((1 - sigma) / sigma) ** 2  # (2)
    return snr * power / (1 + snr * power)  # (3)


def main() -> None:
    """How much of layout (81 times the mean power) and detail is decided, and which expert is asked."""
    experts = build("micro-moe", "meta")
    for sigma in (0.99, 0.9, 0.89, 0.5):
        layout = decided(sigma, 81)
        detail = decided(sigma, 1)
        who = experts.which(torch.tensor([sigma]))
        print(f"σ {sigma:.2f}: decided of layout {layout:3.0%}, of detail {detail:3.0%}: {who}")
    size = sum(p.numel() for p in build("28b-moe", "meta").low.parameters()) / 1e9
    print(f"28b-moe: a step runs {size:.1f} B parameters of the {2 * size:.1f} B of a view")


if __name__ == "__main__":
    main()
