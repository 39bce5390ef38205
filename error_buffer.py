"""Replay the model's own mistakes into its training context.

What it does. The model predicts new latents from two kinds of old ones: its past, the last few, and
its memory, older ones that saw the same place. A buffer keeps a few hundred errors that the model
made, each the size of one latent. Every training step stores how far off its clean estimate of the
new latents was (push, called in train.py), and adds errors from earlier steps to the past and the
memory of its own clips (perturb, called in engine/mistakes.py). What the model shall predict stays
clean, there is no loss on past and memory, and in play nothing is added.
Paper: §3.1, Eq. 1-2 (past); §3.2, Eq. 4-5 (past and memory).  Released: no training code.

Why it works. In play every past and memory frame but the start picture is the model's own output, a
little wrong. A model that was trained on clean ones takes a mistake for the world, draws it again
and adds the next one; a model that has seen such mistakes beside a clean target learns to undo
them. They cost nothing: a training step mixes a clean latent x0 with noise ε to x_σ = (1 − σ)·x0 +
σ·ε and compares the velocity v̂ that the model predicts with the true one, v = ε − x0, anyway. Each
belongs to a clean latent, x̂0 = x_σ − σ·v̂ and x0 = x_σ − σ·v (flow.py), and the difference is

    δ = x̂0 − x0 = −σ·(v̂ − v)                                             Eq. 1, 4             (1)

A latent x of a later clip becomes an imperfect one by a stored error δ', each as likely as
another, times a strength γ:

    x̃ = x + γ·δ'                                                         Eq. 2, 5             (2)

How large is δ? By (1), σ times the velocity's error: a tenth of it at σ = .1, nine tenths at .9.
Training draws σ from 0 to 1 with a shift s (flow.py), which puts half of the draws above s/(s + 1):
above .6 for our small models, s = 1.5, and above .83 for 5B, s = 5. There much of δ is no mistake:
x̂0 is the mean of what is possible (flow.py), and even a perfect network's is off by the spread
around it. What play draws is no such mean: the stored errors exaggerate.

How old is δ'? A full buffer holds N errors, and every push overwrites n random ones, one after
the other. A given error is not the one that is overwritten with chance 1 − 1/N; so it is still
there after k pushes with chance

    (1 − 1/N)^(n·k) ≈ exp(−n·k/N)                                                              (3)

For N = 500 and n = 16 the mean age is N/n = 31 pushes, one per training step: in so few steps a
model hardly changes, so the errors are its own.

What differs. δ is taken from the new latents only. Eq. 4 takes it from past and memory as well, but
those enter at σ = 0, where by (1) there is no error: what is off in them is what was added. One
buffer serves both; call perturb for the past with the paper's γ_h, then for the memory with its
γ_m. A start picture alone is real and stays clean. The paper does not say how large γ is, how many
errors are kept, which one is replaced, when to begin, how often to perturb, and whether a clip gets
one δ' or each latent its own. ErrorConfig has our answers: each latent has its own δ'; within one
call, the latents of a clip are perturbed all or none, with one γ. Past and memory take two calls,
so a clip may have either, both or none perturbed. engine/mistakes.py has another source of δ
(--p-own): there the model itself estimates the latents that are perturbed.

Try it: python error_buffer.py      Tests: pytest tests/test_error_buffer.py
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ErrorConfig:
    """What the paper leaves open."""

    gamma: float = 1.0  # γ
    jitter: float = 0.2  # γ times a uniform number in 1 − jitter .. 1 + jitter, once per sample
    probability: float = 0.5  # that a call perturbs a sample; others stay as they are, to the bit
    capacity: int = 500  # N, in latents
    warmup: int = 50  # pushes before the first use: early errors are those of an untrained network
    per_push: int = 16  # n, latents stored per step
    kind: str = "real"  # or, to compare with, "gaussian": noise with the std of δ', of no shape
    dtype: str = "float16"  # storage on the CPU; "bfloat16": wider range, less precision

    def __post_init__(self):
        allowed = {"kind": ("real", "gaussian"), "dtype": ("float16", "bfloat16", "float32")}
        for name, values in allowed.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"ErrorConfig.{name} must be one of {values}, got {value!r}")
        if self.capacity < 1 or self.per_push < 1 or not 0 <= self.probability <= 1:
            raise ValueError(f"need capacity, per_push >= 1 and 0 <= probability <= 1, got {self}")


class ErrorBuffer:
    """At most `capacity` errors, each of one latent; `size` are there, `pushes` counts the calls of push."""

    def __init__(self, cfg: ErrorConfig = ErrorConfig()):
        self.cfg = cfg
        self.size = 0
        self.pushes = 0
        self.entries: Tensor | None = None  # (capacity, C, h, w), allocated by the first push

    def __len__(self) -> int:
        return self.size

    def push(
        self,
        delta: Tensor,  # (B, C, T, h, w) δ of the new latents
        generator: torch.Generator | None = None,  # on the CPU; None takes the global one
    ) -> None:
        """Store a few of these errors."""
        if delta.ndim != 5:
            raise ValueError(f"push needs delta (B, C, T, h, w), got {tuple(delta.shape)}")
        B, C, T, h, w = delta.shape
        self._check(C, h, w)

        # a random choice among all latents of the batch
        picks = torch.randperm(B * T, generator=generator)[: self.cfg.per_push].to(delta.device)
        chosen = delta.detach().transpose(1, 2).flatten(0, 1)[picks]
        chosen = chosen.to("cpu", getattr(torch, self.cfg.dtype))
        if not chosen.isfinite().all():
            raise ValueError(
                f"push got NaN or more than {self.cfg.dtype} can hold: the step diverged"
            )

        if self.entries is None:
            self._allocate(chosen)
        for latent in chosen:
            self.entries[self._claim_slot(generator)] = latent
        self.pushes += 1

    def ready(self) -> bool:
        """Whether errors may be injected: early ones are those of an untrained network."""
        return self.size > 0 and self.pushes >= self.cfg.warmup

    def amplitude(
        self, B: int, gamma: float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """(B,) γ with its jitter for the samples that are perturbed, 0 for the others."""
        gamma = self.cfg.gamma if gamma is None else gamma
        hit = torch.rand(B, generator=generator) < self.cfg.probability
        spread = 1 + self.cfg.jitter * (2 * torch.rand(B, generator=generator) - 1)
        return gamma * spread * hit * self.ready()

    def perturb(
        self,
        x: Tensor,  # (B, C, T, h, w) past or memory latents, clean
        gamma: float | None = None,  # γ_h or γ_m; None takes the config's
        generator: torch.Generator | None = None,  # on the CPU; None takes the global one
    ) -> Tensor:  # (B, C, T, h, w) x̃ of (2); x itself until the warm-up is over
        """Latents that are a little wrong, as the model's own are."""
        if x.ndim != 5:
            raise ValueError(f"perturb needs latents (B, C, T, h, w), got {tuple(x.shape)}")
        B, C, T, h, w = x.shape
        self._check(C, h, w)
        if gamma == 0 or T == 0 or not self.ready():
            return x

        scale = self.amplitude(B, gamma, generator).to(x)
        picks = torch.randint(self.size, (B, T), generator=generator)
        delta = self.entries[picks].transpose(1, 2).to(x)  # (B, C, T, h, w)
        if self.cfg.kind == "gaussian":
            size = delta.std((1, 3, 4), keepdim=True)  # (B, 1, T, 1, 1)
            delta = size * torch.randn(delta.shape, generator=generator).to(x)

        return x + scale.view(B, 1, 1, 1, 1) * delta  # (2)

    def state_dict(self) -> dict:
        """Plain tensors, numbers and strings: torch.load(weights_only=True) reads it back."""
        kept = None if self.entries is None else self.entries[: self.size].clone()
        return {"cfg": asdict(self.cfg), "pushes": self.pushes, "entries": kept}

    def load_state_dict(self, state: dict) -> None:
        here = (self.cfg.capacity, self.cfg.dtype)
        saved = (state["cfg"]["capacity"], state["cfg"]["dtype"])
        if here != saved:
            raise ValueError(
                f"this error buffer has (capacity, dtype) = {here}, the saved one {saved}: "
                "pass the saved values, or start a new run with --fresh"
            )
        kept = state["entries"]
        self.pushes = state["pushes"]
        self.size = 0 if kept is None else len(kept)
        self.entries = None
        if kept is not None:
            self._allocate(kept)
            self.entries[: self.size] = kept

    def _allocate(self, like: Tensor) -> None:
        self.entries = torch.empty(self.cfg.capacity, *like.shape[1:], dtype=like.dtype)

    def _claim_slot(self, generator: torch.Generator | None) -> int:
        """Where the next latent goes: a free slot, else in the place of a random old one."""
        if self.size == self.cfg.capacity:
            return int(torch.randint(self.cfg.capacity, (), generator=generator))
        self.size += 1
        return self.size - 1

    def _check(self, *shape: int) -> None:
        if self.entries is not None and tuple(self.entries.shape[1:]) != shape:
            held = tuple(self.entries.shape[1:])
            raise ValueError(
                f"got latents (C, h, w) = {shape}, the buffer holds {held}: "
                "one buffer serves one preset; start a new run with --fresh"
            )


def main() -> None:
    """A pushed error comes back in other latents; the Gaussian control has its size, not its shape.

    The errors here are easy to recognise: alike in all cells of a latent.
    """
    g = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.95, 0.7, 0.4, 0.1]).view(-1, 1, 1, 1, 1)
    x0 = torch.randn(4, 16, 10, 8, 8, generator=g)
    v_error = torch.randn(4, 16, 10, 1, 1, generator=g).expand_as(x0)  # the same in every cell
    delta = -sigma * v_error  # (1)
    for i, level in enumerate(sigma.flatten().tolist()):
        share = delta[i].std() / v_error[i].std()
        print(f"σ = {level:.2f}: the clean estimate is off by {share:.2f} of the velocity's error")

    print(f"rms of the errors: {delta.square().mean().sqrt():.3f}")
    for kind in ("real", "gaussian"):
        cfg = ErrorConfig(warmup=1, probability=1.0, per_push=40, kind=kind)
        buffer = ErrorBuffer(cfg)
        before = buffer.perturb(x0) - x0
        same = torch.Generator().manual_seed(1)
        buffer.push(delta, same)
        after = buffer.perturb(x0, generator=same) - x0
        likeness = after.mean((3, 4)).square().mean() / after.square().mean()
        print(
            f"{kind:8s}: rms of x̃ − x  empty {before.square().mean().sqrt():.3f}, "
            f"with {len(buffer)} stored errors {after.square().mean().sqrt():.3f}; "
            f"share of it that is alike in all cells {likeness:.2f}"
        )

    # how long an error stays: mark what a full buffer holds, and count it after some pushes
    buffer = ErrorBuffer(ErrorConfig())
    N = buffer.cfg.capacity
    n = buffer.cfg.per_push
    while len(buffer) < N:
        buffer.push(torch.ones(1, 1, n, 1, 1), g)
    for k in (10, 31, 62):
        while buffer.pushes < -(-N // n) + k:  # those that filled it, and k more
            buffer.push(torch.zeros(1, 1, n, 1, 1), g)
        chance = (1 - 1 / N) ** (n * k)  # (3)
        left = buffer.entries.float().mean()
        print(f"after {k} pushes {left:.2f} of the buffer is still there, expected {chance:.2f}")


if __name__ == "__main__":
    main()
