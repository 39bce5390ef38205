"""What a training needs in memory, from shapes alone.

The network is built without numbers, so a model of any size is counted on any machine. Weights,
gradients, optimiser and average are float32, the computing copy and what waits for the backward
pass have two bytes; a block keeps about 34 rows as wide as a token, or two where it is computed
again. train.py --dry-run prints it, for the stages that train one such network.
"""

import moe
from dit import DiTConfig
from engine import parts
from engine.clips import WINDOW
from engine.flags import TrainConfig, network

COUNTED = ("base", "moe")  # stages


def memory_table(
    preset: str | DiTConfig, batch: int, tokens: int, muon: bool, recompute: bool
) -> str:
    """What one training step needs, from the modules themselves, without allocating them."""
    model = moe.build(preset, "meta")
    P = sum(p.numel() for p in model.parameters())
    kept = 2 if recompute else 34  # widths of a token that wait for the backward pass
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


def memory_needed(cfg: TrainConfig) -> str:
    """What --dry-run says."""
    if cfg.stage not in COUNTED:
        raise ValueError(
            f"--dry-run counts the one network of --stage {' or '.join(COUNTED)}; "
            f"{cfg.stage} trains others, which nobody has counted"
        )
    tokens = parts.tokens_per_latent(parts.Options(preset=cfg.preset)) * (
        WINDOW.memory + WINDOW.past + WINDOW.new
    )
    clips = cfg.batch // cfg.accum
    recompute = cfg.checkpoint_activations
    return memory_table(network(cfg), clips, tokens, cfg.muon > 0, recompute)
