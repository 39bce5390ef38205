"""Two networks, one per noise range, behind one door: two whole networks, not a token router.

Paper: section 3.5 (28B = 2 x 14B). No weights or code of it were released; the scheme is Wan2.2-A14B's.

    v(x_σ, σ, c) = v_high(x_σ, σ, c)    σ ≥ boundary     layout, motion, obedience to actions; one per view
                 = v_low(x_σ, σ, c)     σ < boundary     detail; shared, also trained without action labels
    SNR(σ) = ((1 − σ)/σ)²               boundary 0.9 (Wan2.2 image-to-video): SNR 1/81

Going down the noise levels the expert changes exactly once, so a step costs one 14B forward and only that
expert has to be on the device (offload). The interface is a dense DiT's: forward, prepare, cfg. A session
plays one view and so meets one high and the low expert: 28B. FSDP wraps each expert like a dense model.

This file is also the door to every model: build(preset), load(path), and read_weights, the one place that
opens a weight file. A file says what it is, in its metadata or the config.json beside it; names mean nothing.

Departures: the boundary, and whether the low expert sees actions and memory, are not disclosed. Here all
experts share one architecture and one context.

Demo: python moe.py      Tests: pytest tests/test_moe.py
"""

import copy
import json
import math
import os
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

import dit
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


# ---- weight files ----------------------------------------------------------------------------------------

MAIN = tuple(
    stem + end
    for stem in ("ema", "diffusion_pytorch_model", "model")  # in order of preference
    for end in (".safetensors", ".safetensors.index.json")
)
ENDINGS = (".safetensors", ".safetensors.index.json", ".pth", ".pt")
AGAIN = "download was cut. Re-run the same hf download; it resumes."
RELEASE = """No weights at {path} (looked for base_distilled_model/config.json). Get them (~30 GB):
  hf download Skywork/Matrix-Game-3.0 --local-dir weights/matrix-game-3 \\
    --include "base_distilled_model/*" "MG-LightVAE_v2.pth" "Wan2.2_VAE.pth"
or play without weights: python play.py --fake"""


def find(path: str | Path) -> Path:
    """The weight file that a file, run folder, model folder, folder holding one model, or hf: id means."""
    if str(path).startswith("hf:"):
        return find(_from_hub(str(path)[3:]))
    path = Path(path)
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise ValueError(
                f"{path} is no weight file; pass a folder or a file in {', '.join(ENDINGS)}"
            )
        return path
    if (path / "latest").is_file():  # a run of train.py
        checkpoint = path / "ckpt" / (path / "latest").read_text().strip()
        if checkpoint.is_dir():
            return find(checkpoint)
    for name in MAIN:
        if (path / name).is_file():
            return path / name
    if (path / "ckpt").is_dir() or (path / "log.jsonl").is_file():
        raise ValueError(
            f"{path} is a run without a checkpoint; make one with: "
            f"python train.py --stage base --run {path.name}"
        )
    models = sorted({file.parent for name in MAIN for file in path.glob(f"*/{name}")})
    loose = sorted(file for file in path.glob("*") if file.name.endswith(ENDINGS))
    for found, what in (
        (models, "models"),
        (loose, "weight files"),
    ):  # released root: models beside VAEs
        if len(found) > 1:
            raise ValueError(
                f"--weights points at a folder; it holds {len(found)} {what}: "
                f"{', '.join(f.name for f in found)}. Pass one of them."
            )
        if found:
            return find(found[0])
    raise ValueError(RELEASE.format(path=path))


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as e:
        raise ValueError(f"hf:{name} needs: pip install huggingface_hub (or pass a folder)") from e
    return Path(snapshot_download(name))


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors on the CPU (mapped from the file, not copied) and metadata of any weight file or folder."""
    file = find(path)
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError) as e:
        raise ValueError(
            f"{file.name} is no readable torch file ({str(e).splitlines()[0]}): {AGAIN}"
        ) from e
    for key in (
        "state_dict",
        "gen_model",
        "generator",
        "model",
    ):  # the released decoders are nested
        tensors = tensors[key] if isinstance(tensors.get(key), dict) else tensors
    return {k: v for k, v in tensors.items() if isinstance(v, Tensor)}, {}


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict]:
    size = file.stat().st_size
    with open(file, "rb") as f:  # length of header · header · tensors
        full = 8 + int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(full - 8)) if full <= size else {}
    full += max(
        (e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"), default=0
    )
    if size < full:
        raise ValueError(f"{file.name} is {_bytes(size)}, header says {_bytes(full)}: {AGAIN}")
    with safe_open(file, framework="pt") as f:
        metadata = {name: _decoded(value) for name, value in (f.metadata() or {}).items()}
        return {name: f.get_tensor(name) for name in f.keys()}, metadata


def _read_shards(index: Path) -> tuple[dict[str, Tensor], dict]:
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise ValueError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards, "
            f"{', '.join(missing)}: {AGAIN}"
        )
    tensors, metadata = {}, {}
    for shard in shards:
        part, said = _read_safetensors(index.parent / shard)
        tensors, metadata = tensors | part, metadata | said
    return tensors, metadata


def write_weights(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict | None = None
) -> None:
    """One safetensors file, complete or not there at all; every metadata value is stored as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(plain, tmp, {name: json.dumps(value) for name, value in (metadata or {}).items()})
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def _decoded(value: str) -> object:
    """Metadata of ours is JSON; that of others ({"format": "pt"}) stays a string."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _bytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n} bytes"


# ---- configs ---------------------------------------------------------------------------------------------


def config_of(file: Path, metadata: dict) -> DiTConfig | MoEConfig:
    """What a weight file says it is: in its metadata, else in the config.json beside it, ours or released."""
    beside = file.parent / "config.json"
    said = metadata.get("model") or metadata.get("config")
    if said is None and not beside.is_file():
        raise ValueError(
            f"{file.name} does not say what it is: no config in its metadata and no config.json "
            f"beside it. Put the config.json it was published with into {file.parent}."
        )
    if said is None:
        said = json.loads(beside.read_text())
        said = said.get("model", said)
    if "expert" in said:
        return MoEConfig(_ours(said["expert"]), said["boundary"], tuple(said["views"]))
    return from_released(said) if "num_heads" in said else _ours(said)


def _ours(said: dict) -> DiTConfig:
    unknown = sorted(set(said) - {f.name for f in fields(DiTConfig)})
    if unknown:
        raise ValueError(
            f"config has unknown fields {', '.join(unknown)}: written by another version?"
        )
    return DiTConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in said.items()})


def from_released(said: dict) -> DiTConfig:
    """The released config.json in our words. Fields under our own names in it win."""
    names = {
        "num_heads": "heads",
        "num_layers": "layers",
        "ffn_dim": "ffn",
        "patch_size": "patch",
        "camera_embed_in_channels": "ray_channels",
    }
    cfg = {
        "text_dim": 4096,
        "text_len": 512,
        "ray_channels": 6 * 16 * 16,
        "action_blocks": (),
        "timestep": "bf16",
        "rays_at_input": False,
        "fp32_stream": True,
    }
    if actions := said.get("action_config"):
        cfg |= {
            "action_blocks": actions["blocks"],
            "action_hidden": actions["hidden_size"],
            "action_width": actions["mouse_hidden_dim"],
            "action_heads": actions["heads_num"],
            "action_rope": actions["mouse_qk_dim_list"][0],
            "action_window": actions["windows_size"] * actions["vae_time_compression_ratio"],
        }
    cfg |= {names[name]: value for name, value in said.items() if name in names}
    cfg |= {f.name: said[f.name] for f in fields(DiTConfig) if f.name in said}
    if "sigma_theta" not in said:
        warnings.warn(
            "config.json has no sigma_theta: using 0.8, as both released models do", stacklevel=2
        )
    return _ours(cfg)


# ---- presets and checkpoints to models -------------------------------------------------------------------


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


def load(
    path: str | Path,  # run folder, model folder, folder holding one model, or file
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,  # None keeps what is stored
) -> tuple[DiT | Experts, dict]:  # the model in eval mode, and its metadata (with "path")
    """Build on meta, then give every parameter its stored tensor: no model stands in memory twice."""
    file = find(path)
    tensors, metadata = read_weights(file)
    model = build(config_of(file, metadata), "meta")
    check_names(model.state_dict(), tensors, file)
    for name in list(tensors):  # one by one: the float32 release becomes bfloat16 in 13 GB
        tensors[name] = tensors[name].to(device, dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval(), metadata | {"path": str(file)}


def join(
    parts: dict[str, str | Path],  # {"first": run, "third": run, "low": run}, trained apart
    boundary: float = 0.9,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Experts:
    if "low" not in parts or len(parts) < 2:
        raise ValueError(
            f"experts need a low one and at least one view, got {', '.join(parts) or 'nothing'}"
        )
    found = {name: load(path, device, dtype)[0] for name, path in parts.items()}
    if len({expert.cfg for expert in found.values()}) > 1:
        raise ValueError("experts must share one architecture; train them with one --preset")
    return Experts(
        {name: e for name, e in found.items() if name != "low"}, found["low"], boundary
    ).eval()


def start_from(
    path: str | Path, preset: str | DiTConfig, dtype: torch.dtype = torch.float32
) -> tuple[DiT, list[str]]:
    """A model to train further, and what is fresh in it: nothing, or cameras and actions on plain Wan2.2."""
    file = find(path)
    tensors, _ = read_weights(file)
    model = build(preset).to(dtype)
    wanted = model.state_dict()
    fresh = [name for name in wanted if name not in tensors and is_new(name)]
    check_names({name: t for name, t in wanted.items() if name not in fresh}, tensors, file)
    model.load_state_dict(
        {name: t.to(dtype) for name, t in tensors.items()}, strict=False, assign=True
    )
    return model, fresh


def is_new(name: str) -> bool:
    """Cameras and actions: what Matrix-Game 3 added to Wan2.2's tensors."""
    return any(part in name for part in ("cam_", "action_model.", "wancamctrl", "c2ws_"))


def check_names(wanted: dict[str, Tensor], got: dict[str, Tensor], file: Path) -> None:
    """Refuse a file whose tensors are not exactly this model's, and say what the file is instead."""
    missing, unexpected = [k for k in wanted if k not in got], [k for k in got if k not in wanted]
    if missing or unexpected:
        hint = ""
        if missing and not unexpected and all(map(is_new, missing)):
            hint = "\nIt looks like plain Wan2.2-TI2V-5B: use it with train.py --init."
        elif any(name.endswith(("weight_int8", "weight_fp8")) for name in unexpected):
            hint = "\nIt is quantised: load the float weights and give --int8."
        raise ValueError(
            f"{file.name} is not a Matrix-Game 3 DiT: {_count(missing, 'missing')}, "
            f"{_count(unexpected, 'unexpected')}.{hint}"
        )
    for name, t in wanted.items():
        if t.shape != got[name].shape:
            raise ValueError(
                f"{file.name} does not fit its config: {name} is {tuple(got[name].shape)}, "
                f"the config needs {tuple(t.shape)}"
            )


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what}" + (
        f" ({names[0]}{', …' if len(names) > 1 else ''})" if names else ""
    )


# ---- a model in training: shards, precision, steps ------------------------------------------------------------


def shard(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """FSDP2 over all ranks, one unit per block; a single process keeps the plain model."""
    if dist.is_initialized():
        kind = next(model.parameters()).device.type
        mesh = init_device_mesh("cpu" if kind == "meta" else kind, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(dtype if dtype != torch.float32 else None, torch.float32)
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def twin(model: nn.Module, dtype: torch.dtype, recompute: bool = False) -> nn.Module:
    """The model that computes: a copy in a lower precision, or the model itself (FSDP lowers it on its own).
    recompute: its blocks keep only their inputs and run again in the backward pass (activation checkpointing)."""
    low = (
        model if dist.is_initialized() or dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    )
    for block in low.blocks if recompute else ():
        block.forward = partial(
            checkpoint, partial(type(block).forward, block), use_reentrant=False
        )  # copies along with the block
    return low


@torch.no_grad()
def refresh(low: nn.Module, model: nn.Module) -> nn.Module:
    """Float32 weights into the computing copy, before a forward pass."""
    if low is not model:
        torch._foreach_copy_(list(low.parameters()), list(model.parameters()))
    return low


def collect(low: nn.Module, model: nn.Module) -> None:
    """Gradients of the computing copy onto the float32 weights, after a backward pass."""
    for q, p in zip(low.parameters(), model.parameters(), strict=True):
        if low is not model and q.grad is not None:
            p.grad = q.grad.float() if p.grad is None else p.grad + q.grad
            q.grad = None


def optimizers(
    model: nn.Module,
    lr: float,  # of AdamW
    muon: float = 0.0,  # of Muon; 0 = AdamW everywhere
    decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside DiT blocks and VAE coders (kernels flattened to matrices), AdamW on everything else."""
    inside = {
        n: p
        for n, p in model.named_parameters()
        if muon
        and ("blocks." in n or "coder." in n)
        and p.ndim > 1
        and min(p.flatten(1).shape) > 16
    }
    found = [
        torch.optim.AdamW(
            [p for n, p in model.named_parameters() if n not in inside],
            lr=lr,
            betas=betas,
            weight_decay=decay,
        )
    ]
    if inside:
        views = [
            nn.Parameter(p.detach().flatten(1)) for p in inside.values()
        ]  # share the weights' memory
        found += [torch.optim.Muon(views, lr=muon, weight_decay=decay)]
        found[-1].viewed = list(inside.values())
    for o in found:
        o.param_groups[0]["top"] = o.param_groups[0]["lr"]
    return found


def update(
    opts: list, model: nn.Module, factor: float, clip: float, ema: list[Tensor], decay: float
) -> float:
    """Clip, step, zero, average. Returns the gradient norm."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    for o in opts:
        for p, view in zip(getattr(o, "viewed", ()), o.param_groups[0]["params"], strict=False):
            view.grad = None if p.grad is None else p.grad.flatten(1)
        o.param_groups[0]["lr"] = o.param_groups[0]["top"] * factor
        o.step()
        o.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    if ema:
        torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 1 - decay)
    return float(whole(norm))


def lr_at(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to 5 %: a factor on every learning rate."""
    done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    return min(1.0, (step + 1) / max(1, warmup)) * (
        0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
    )


def average(model: nn.Module) -> list[Tensor]:
    """The start of the averaged weights."""
    return [p.detach().clone() for p in model.parameters()]


@torch.no_grad()
def averaged(model: nn.Module, ema: list[Tensor]) -> nn.Module:
    """A copy of the model that holds the averaged weights."""
    other = copy.deepcopy(model)
    torch._foreach_copy_(list(other.parameters()), ema)
    return other


def gathered(x: Tensor) -> Tensor:
    """The rows of all ranks in the order in which one process would hold them."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def check_finite(loss: Tensor, model: nn.Module, folder: Path, **batch: Tensor) -> None:
    """A loss that is not a number ends the run, with the batch on disk and the first bad weight named."""
    if (
        not gathered(loss.detach()[None]).isfinite().all()
    ):  # every rank stops, also for the loss of another
        bad = next(
            (n for n, p in model.named_parameters() if not torch.isfinite(whole(p)).all()),
            "none: activations overflowed",
        )
        write_weights(folder / "nan_dump.safetensors", {k: v.detach() for k, v in batch.items()})
        raise ValueError(
            f"loss is {loss.item()}; its batch is in {folder}/nan_dump.safetensors; first bad weight: {bad}"
        )


def memory_table(
    preset: str | DiTConfig, batch: int, tokens: int, muon: bool, recompute: bool
) -> str:
    """What one training step needs, from the modules themselves, without allocating them."""
    model = build(preset, "meta")
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


# ---- checkpoints of a run --------------------------------------------------------------------------------


def whole(x: Tensor) -> Tensor:
    """A sharded tensor gathered; anything else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(full: Tensor, target: Tensor) -> Tensor:
    """A whole tensor laid out as the target is."""
    full = full.to(target.device)
    return (
        distribute_tensor(full, target.device_mesh, target.placements)
        if isinstance(target, DTensor)
        else full
    )


def write_text(path: Path, text: str) -> None:
    """Atomic: readers see the old text or the new one."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def save(
    folder: Path,
    said: dict,
    models: dict[str, nn.Module],
    ema: list[Tensor],
    opts: list,
    keep: int = 2,
    **state: object,
) -> None:
    """folder/ckpt/000500, visible only when complete: every model as a weight file (the first is the one that is averaged),
    ema.safetensors, and train_state.pt with the optimisers and `state`. Sharded tensors are gathered; rank 0 writes."""
    first, chief = next(iter(models)), not dist.is_initialized() or dist.get_rank() == 0
    weights = {
        name: {n: whole(t).detach().cpu() for n, t in m.state_dict().items()}
        for name, m in models.items()
    }
    names = [n for n, _ in models[first].named_parameters()]
    weights["ema"] = weights[first] | {n: whole(e).cpu() for n, e in zip(names, ema, strict=True)}
    state |= {
        "step": said["step"],
        "optimizers": [
            [
                {k: whole(v) for k, v in o.state.get(p, {}).items()}
                for p in o.param_groups[0]["params"]
            ]
            for o in opts
        ],
    }
    if chief:
        final = folder / "ckpt" / f"{said['step']:06d}"
        tmp = final.with_name(final.name + ".tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        said = said | {"config": asdict(models[first].cfg)}
        try:
            tmp.mkdir(parents=True)
            for name, tensors in weights.items():
                write_weights(tmp / f"{name}.safetensors", tensors, said)
            write_text(tmp / "config.json", json.dumps(said, indent=1))
            torch.save(state, tmp / "train_state.pt")
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(tmp, ignore_errors=True)
            raise ValueError(
                f"cannot save {final}: {error}. Older checkpoints are intact: make room, then the same command resumes"
            ) from error
        shutil.rmtree(final, ignore_errors=True)
        os.replace(tmp, final)
        write_text(folder / "latest", final.name)
        for old in sorted((folder / "ckpt").glob("[0-9]*[0-9]"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()


def export(*runs: str, file: str) -> None:
    """The averaged weights of a run, or of the runs of experts joined, as one bfloat16 file: what assets/ holds."""
    found = [read_weights(run) for run in runs]
    (tensors, said), names = (
        found[0],
        [s.get("expert", "none").removeprefix("high-") for _, s in found],
    )
    if len(runs) > 1:
        if (
            len({*names}) < len(runs)
            or len(
                {
                    tuple(s.get(k) for k in ("stage", "boundary", "encoding", "shift", "sink"))
                    for _, s in found
                }
            )
            > 1
        ):
            raise ValueError(
                f"joined runs must be different experts of one --stage moe with one boundary, got {', '.join(names)}"
            )
        tensors = (
            model := join(dict(zip(names, runs, strict=True)), said["boundary"])
        ).state_dict()
        said = said | {"config": asdict(model.config), "view": "both"}
    write_weights(file, {name: t.bfloat16() for name, t in tensors.items()}, said)
    print(
        f"wrote {file}: {len(tensors)} tensors, step {said['step']}, {_bytes(Path(file).stat().st_size)}"
    )


@torch.no_grad()
def restore(folder: Path, models: dict[str, nn.Module], ema: list[Tensor], opts: list) -> dict:
    """Continue from folder's newest checkpoint, if there is one. Returns the state that save() was given, and the step."""
    if not (folder / "latest").exists():
        return {}
    folder = folder / "ckpt" / (folder / "latest").read_text().strip()
    state = torch.load(folder / "train_state.pt", weights_only=True, map_location="cpu")
    for name, model in models.items():
        tensors = read_weights(folder / f"{name}.safetensors")[0]
        for n, t in model.state_dict().items():
            t.copy_(like(tensors[n], t))
    tensors = read_weights(folder / "ema.safetensors")[0]
    for (n, _), e in zip(next(iter(models.values())).named_parameters(), ema, strict=True):
        e.copy_(like(tensors[n], e))
    for o, saved in zip(opts, state["optimizers"], strict=True):
        for p, entries in zip(o.param_groups[0]["params"], saved, strict=True):
            o.state[p] = {k: like(v, p) if v.shape == p.shape else v for k, v in entries.items()}
    return state


def faster_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it clearly faster than float32, by measurement."""
    x, times = torch.randn(2048, 512, device=device), {torch.float32: 1e9, torch.bfloat16: 1e9}
    for dtype in [*times] * 6:
        a, start = x.to(dtype), time.perf_counter()
        torch.nn.functional.linear(a, a[:512]).sum().item()
        times[dtype] = min(times[dtype], time.perf_counter() - start)
    gain = times[torch.float32] / times[torch.bfloat16]
    print(
        f"bfloat16 multiplies {gain:.1f}x as fast as float32 here: using {'bfloat16' if gain > 1.3 else 'float32'}"
    )
    return torch.bfloat16 if gain > 1.3 else torch.float32


# ---- demo ------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    torch.manual_seed(0)
    experts = build("micro-moe").eval()
    for p in experts.parameters():  # a fresh network predicts zero
        p.data.add_(0.05 * torch.randn_like(p))
    context, sigmas = dit.random_context(experts.cfg), dit.sigma_grid(8)
    noise = torch.randn(1, experts.cfg.in_dim, 10, 8, 8)
    first, third = (
        dit.sample(experts.look(view), context, sigmas, noise) for view in ("first", "third")
    )
    dense = dit.sample(experts.low, context, sigmas, noise)
    twins = dit.sample(Experts({"first": experts.low}, experts.low), context, sigmas, noise)
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
