"""What a training needs in memory, from shapes alone."""

import moe
from dit import DiTConfig


def memory_table(
    preset: str | DiTConfig, batch: int, tokens: int, muon: bool, recompute: bool
) -> str:
    """What one training step needs, from the modules themselves, without allocating them."""
    model = moe.build(preset, "meta")
    P, kept = (
        sum(p.numel() for p in model.parameters()),
        2 if recompute else 34,
    )  # widths per token that wait for the backward pass
    sizes = {
        "weights, float32": 4 * P,
        "gradients": 4 * P,
        "optimiser": (4 if muon else 8) * P,
        "average": 4 * P,
        "computing copy": 2 * P,
        "activations": 2 * batch * tokens * model.cfg.dim * model.cfg.layers * kept,
    }
    rows = [
        f"| {name} | {size / 1e9:.2f} | {size / 8e9:.2f} |"
        for name, size in (sizes | {"total": sum(sizes.values())}).items()
    ]
    return "\n".join(
        [
            f"{P / 1e6:.1f} M parameters, {tokens} tokens a clip, {batch} clips at once",
            "| what | 1 rank, GB | 8 ranks, GB |",
            "|---|---|---|",
            *rows,
        ]
    )
