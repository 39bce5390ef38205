"""A file says what it is: find, read and write weights, released names and configs."""

import json
import os
import re
import time
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import moe
from dit import DiT, DiTConfig
from vae import PRESETS, VAE, VAEConfig


def vae_metadata(vae: VAE) -> dict[str, dict]:
    """What a weight file must say about itself: the whole config, statistics included."""
    return {"vae": asdict(vae.cfg)}


VAE_RENAMES = (  # MG-LightVAE's diffusers-style names -> ours
    (r"^post_quant_conv", "conv2"),
    (r"^quant_conv", "conv1"),
    (r"conv_in", "conv1"),
    (r"conv_out", "head.2"),
    (r"norm_out", "head.0"),
    (r"mid_block.attentions.0", "middle.1"),
    (r"mid_block.resnets.0", "middle.0"),
    (r"mid_block.resnets.1", "middle.2"),
    (r"(down|up)_blocks.(\d).resnets", r"\1samples.\2.\1samples"),
    (r"down_blocks.(\d).downsampler", r"downsamples.\1.downsamples.2"),
    (r"up_blocks.(\d).upsampler", r"upsamples.\1.upsamples.3"),
    (r"(\d).norm1", r"\1.residual.0"),
    (r"(\d).conv1", r"\1.residual.2"),
    (r"(\d).norm2", r"\1.residual.3"),
    (r"(\d).conv2", r"\1.residual.6"),
    (r"conv_shortcut", "shortcut"),
)


def vae_released_name(key: str) -> str:
    """encoder.down_blocks.1.resnets.0.norm1.gamma -> encoder.downsamples.1.downsamples.0.residual.0.gamma, …"""
    for old, new in VAE_RENAMES:
        key = re.sub(old, new, key)
    return key


def vae_from_weights(tensors: dict, metadata: dict | None = None) -> VAE:
    """A float32 VAE from the content of a file: ours (config in its metadata), Wan2.2_VAE.pth or MG-LightVAE*.pth."""
    for nest in (
        "state_dict",
        "gen_model",
        "generator",
    ):  # MG-LightVAE keeps its network two levels down
        tensors = tensors.get(nest, tensors)
    tensors = {
        vae_released_name(k): v
        for k, v in tensors.items()
        if isinstance(v, Tensor) and not k.startswith("dynamic_feature_projection_heads.")
    }
    if config := (metadata or {}).get("vae"):
        cfg = VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    else:  # released: only the base widths can differ
        dim, width = (
            len(tensors.get(f"{side}.conv1.weight", ())) for side in ("encoder", "decoder")
        )
        cfg = replace(
            PRESETS["wan2.2"], dim=dim, dec_dim=max(1, width // PRESETS["wan2.2"].dim_mult[-1])
        )
    with torch.device("meta"):
        vae = VAE(cfg)
    want = vae.state_dict()
    wrong = [f"{k} missing" for k in want if k not in tensors] + [
        f"{k} unknown" for k in tensors if k not in want
    ]
    wrong += [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(want[k].shape)}"
        for k in want
        if k in tensors and tensors[k].shape != want[k].shape
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors do not fit this VAE: {'; '.join(wrong[:3])}; expected Wan2.2_VAE.pth, "
            "MG-LightVAE.pth or a vae.safetensors, undamaged: download or train it again"
        )
    vae = vae.to_empty(device="cpu")
    vae.load_state_dict(tensors, strict=True)
    vae.set_statistics(cfg.mean, cfg.std)  # these are not among the released weights
    return vae


def is_new(name: str) -> bool:
    """Cameras and actions: what Matrix-Game 3 added to Wan2.2's tensors."""
    return any(part in name for part in ("cam_", "action_model.", "wancamctrl", "c2ws_"))


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
        raise ValueError(
            f"{file.name} is {size_in_words(size)}, header says {size_in_words(full)}: {AGAIN}"
        )
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


def write_text(path: Path, text: str) -> None:
    """Atomic: readers see the old text or the new one."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def _decoded(value: str) -> object:
    """Metadata of ours is JSON; that of others ({"format": "pt"}) stays a string."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def size_in_words(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n} bytes"


def config_of(file: Path, metadata: dict) -> DiTConfig | moe.MoEConfig:
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
        return moe.MoEConfig(_ours(said["expert"]), said["boundary"], tuple(said["views"]))
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


def load(
    path: str | Path,  # run folder, model folder, folder holding one model, or file
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,  # None keeps what is stored
) -> tuple[DiT | moe.Experts, dict]:  # the model in eval mode, and its metadata (with "path")
    """Build on meta, then give every parameter its stored tensor: no model stands in memory twice."""
    file = find(path)
    tensors, metadata = read_weights(file)
    model = moe.build(config_of(file, metadata), "meta")
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
) -> moe.Experts:
    if "low" not in parts or len(parts) < 2:
        raise ValueError(
            f"experts need a low one and at least one view, got {', '.join(parts) or 'nothing'}"
        )
    found = {name: load(path, device, dtype)[0] for name, path in parts.items()}
    if len({expert.cfg for expert in found.values()}) > 1:
        raise ValueError("experts must share one architecture; train them with one --preset")
    return moe.Experts(
        {name: e for name, e in found.items() if name != "low"}, found["low"], boundary
    ).eval()


def start_from(
    path: str | Path, preset: str | DiTConfig, dtype: torch.dtype = torch.float32
) -> tuple[DiT, list[str]]:
    """A model to train further, and what is fresh in it: nothing, or cameras and actions on plain Wan2.2."""
    file = find(path)
    tensors, _ = read_weights(file)
    model = moe.build(preset).to(dtype)
    wanted = model.state_dict()
    fresh = [name for name in wanted if name not in tensors and is_new(name)]
    check_names({name: t for name, t in wanted.items() if name not in fresh}, tensors, file)
    model.load_state_dict(
        {name: t.to(dtype) for name, t in tensors.items()}, strict=False, assign=True
    )
    return model, fresh


def check_names(wanted: dict[str, Tensor], got: dict[str, Tensor], file: Path) -> None:
    """Refuse a file whose tensors are not exactly this model's, and say what the file is instead."""
    missing, unexpected = [k for k in wanted if k not in got], [k for k in got if k not in wanted]
    if missing or unexpected:
        hint = ""
        if missing and not unexpected and all(map(is_new, missing)):
            hint = "\nIt looks like plain Wan2.2-TI2V-5B: use it with train.py --init."
        elif any(name.endswith("weight_int8") for name in unexpected):
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
