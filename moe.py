"""Two networks, one per noise range, behind one door: two whole networks, not a token router.

Paper: section 3.5 (28B = 2 x 14B). No weights or code of it were released; the scheme is Wan2.2-A14B's.

    v(x_σ, σ, c) = v_high(x_σ, σ, c)    σ ≥ boundary     layout, motion, obedience to actions; one per view
                 = v_low(x_σ, σ, c)     σ < boundary     detail; shared, also trained without action labels
    SNR(σ) = ((1 − σ)/σ)²               boundary 0.9 (Wan2.2 image-to-video): SNR 1/81

Going down the noise levels the expert changes exactly once, so a step costs one 14B forward and only that
expert has to be on the device (offload). The interface is a dense DiT's: forward, prepare, cfg. A session
plays one view and so meets one high and the low expert: 28B. FSDP wraps each expert like a dense model.

build(preset) makes either kind; weight files are opened by engine/weights.py.

Departures: the boundary, and whether the low expert sees actions and memory, are not disclosed. Here all
experts share one architecture and one context.

Demo: python moe.py      Tests: pytest tests/test_moe.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dit
import flow
from dit import DiT, DiTConfig


@dataclass(frozen=True)
class MoEConfig:
    expert: DiTConfig = DiTConfig()  # the architecture of every expert
    boundary: float = 0.9  # σ from which the high-noise expert works
    views: tuple[str, ...] = ("first", "third")  # one high-noise expert each


PRESETS = {
    "micro-moe": MoEConfig(dit.PRESETS["micro"]),
    "tiny-moe": MoEConfig(dit.PRESETS["tiny"]),
    "28b-moe": MoEConfig(dit.PRESETS["14b"]),
}

# ---- the switch ------------------------------------------------------------------------------------------


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
        self.high, self.low = nn.ModuleDict(high), low
        self.cfg, self.boundary, self.offload = low.cfg, boundary, offload
        self.view = next(iter(high))  # of this session; see look()

    @property
    def config(self) -> MoEConfig:  # what a checkpoint stores: {"model": asdict(experts.config)}
        return MoEConfig(self.cfg, self.boundary, tuple(self.high))

    def look(self, view: str) -> "Experts":
        if view not in self.high:
            raise ValueError(f"no expert for view {view!r}; this model has {', '.join(self.high)}")
        self.view = view
        return self

    def which(self, sigma: Tensor) -> str:  # (B,) -> "low" or the name of a view
        high = sigma >= self.boundary
        if high.any() != high.all():
            raise ValueError(
                f"one expert a step: σ lies on both sides of {self.boundary}, {sigma.tolist()}"
            )
        return self.view if high.all() else "low"

    def at(self, name: str, device: torch.device) -> nn.Module:
        """The expert of this name, on the device it is needed on."""
        everyone = {**self.high, "low": self.low}
        if self.offload:
            for idle in (e for other, e in everyone.items() if other != name):
                idle.to("cpu")
            everyone[name].to(device)
        return everyone[name]

    def prepare(self, context, group=None) -> dict:
        """Filled by the first step of an expert, emptied when the next one takes over."""
        return {"inputs": (context, group)}

    def forward(
        self,
        x_sigma: Tensor,
        sigma: Tensor,
        context,
        prepared: dict | None = None,
        return_past: bool = False,
    ) -> Tensor:  # as DiT.forward
        name = self.which(sigma)
        expert = self.at(name, x_sigma.device)
        if prepared is None:
            return expert(x_sigma, sigma, context, return_past=return_past)
        if name not in prepared:
            inputs = prepared["inputs"]
            prepared.clear()  # the other expert's share is large and not needed again
            prepared.update({"inputs": inputs, name: expert.prepare(*inputs)})
        return expert(x_sigma, sigma, context, prepared=prepared[name], return_past=return_past)


def build(preset: str | DiTConfig | MoEConfig, device: str | torch.device = "cpu") -> DiT | Experts:
    """A fresh model of a preset or config; device "meta" costs no memory."""
    known = {**dit.PRESETS, **PRESETS}
    if isinstance(preset, str) and preset not in known:
        raise ValueError(f"unknown preset {preset!r}; use {', '.join(known)}")
    cfg = known[preset] if isinstance(preset, str) else preset
    with torch.device(device):
        if isinstance(cfg, MoEConfig):
            return Experts(
                {view: DiT(cfg.expert) for view in cfg.views}, DiT(cfg.expert), cfg.boundary
            )
        return DiT(cfg)


def is_new(name: str) -> bool:
    """Cameras and actions: what Matrix-Game 3 added to Wan2.2's tensors."""
    return any(part in name for part in ("cam_", "action_model.", "wancamctrl", "c2ws_"))


# ---- demo ------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    torch.manual_seed(0)
    experts = build("micro-moe").eval()
    for p in experts.parameters():  # a fresh network predicts zero
        p.data.add_(0.05 * torch.randn_like(p))
    context, sigmas = dit.random_context(experts.cfg), flow.sigma_grid(8)
    noise = torch.randn(1, experts.cfg.in_dim, 10, 8, 8)
    first, third = (
        flow.sample(experts.look(view), context, sigmas, noise) for view in ("first", "third")
    )
    dense = flow.sample(experts.low, context, sigmas, noise)
    twins = flow.sample(Experts({"first": experts.low}, experts.low), context, sigmas, noise)
    print("expert by step: " + "  ".join(f"{s:.2f} {experts.which(s[None])}" for s in sigmas[:-1]))
    print(
        f"first and third person differ by {(first - third).abs().max():.2f}, "
        f"two equal experts from one dense model by {(twins - dense).abs().max():.0e}"
    )
    for name, expert in build("28b-moe", "meta").named_children():
        for view, network in expert.items() if name == "high" else [("shared", expert)]:
            sizes = {k: p.numel() / 1e9 for k, p in network.named_parameters()}
            wan = sum(n for k, n in sizes.items() if not is_new(k))
            print(
                f"28b-moe {name:4s} {view:6s}: {wan:.2f} B as in Wan2.2-A14B, "
                f"{sum(sizes.values()):.2f} B with cameras and actions"
            )
