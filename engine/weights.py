"""A file says what it is: find, read and write weights, and make models of them.

    find      what a path means: a file, a run, a model folder, a folder of one model, a hub id
    read      tensors and metadata, of one file or of shards, without running any code in it
    write     complete or not at all, and the same bytes for the same content
    load      a model on any device, without standing in memory twice

What the metadata mean is in engine/configs.py.  Tests: tests/test_weights.py
"""

import hashlib
import json
import os
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import moe
from dit import DiT, DiTConfig
from engine.cli import printable
from engine.configs import Refusal, check_names, config_of, is_new, reading
from vae import PRESETS, VAE, VAEConfig

# ---- what a path means ---------------------------------------------------------------------------

# in order of preference
MAIN = tuple(
    stem + end
    for stem in ("ema", "diffusion_pytorch_model", "model")
    for end in (".safetensors", ".safetensors.index.json")
)
HASHED = 1 << 28  # bytes of the largest file whose hash is worth the time
ENDINGS = (".safetensors", ".safetensors.index.json", ".pth", ".pt")
AGAIN = "download was cut. Re-run the same hf download; it resumes."
RELEASE = """No weights at {path} (looked for base_distilled_model/config.json). Get them (~41 GB):
  hf download Skywork/Matrix-Game-3.0 --local-dir weights/matrix-game-3 \\
    --include "base_distilled_model/*" "MG-LightVAE_v2.pth" "Wan2.2_VAE.pth" "models_t5*" "google/*"
or play without weights: python play.py --fake"""


def find(path: str | Path) -> Path:
    """The weight file that a path means.

    hf:owner/name      the same, after a download
    a file             itself
    a run              the newest checkpoint of train.py
    a model folder     its averaged weights, else its weights
    any other folder   the one model in it, else the one weight file (a released root has VAEs too)
    """
    if str(path).startswith("hf:"):
        return find(_from_hub(str(path)[3:]))
    path = Path(path)
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            allowed = ", ".join(ENDINGS)
            raise Refusal(f"{path} is no weight file; pass a folder or a file in {allowed}")
        return path

    if (path / "latest").is_file():
        checkpoint = newest_checkpoint(path)
        if checkpoint.is_dir():
            return find(checkpoint)
    for name in MAIN:
        if (path / name).is_file():
            return path / name
    if (path / "ckpt").is_dir() or (path / "log.jsonl").is_file():
        raise Refusal(
            f"{path} is a run without a checkpoint; make one with: "
            f"python train.py --stage base --run {path.name}"
        )

    models = sorted({file.parent for name in MAIN for file in path.glob(f"*/{name}")})
    loose = sorted(file for file in path.glob("*") if file.name.endswith(ENDINGS))
    for found, what in ((models, "models"), (loose, "weight files")):
        if len(found) > 1:
            raise Refusal(
                f"{path} is a folder that holds {len(found)} {what}: "
                f"{', '.join(f.name for f in found)}. Pass one of them."
            )
        if found:
            return find(found[0])
    if path.name.endswith(ENDINGS):
        raise Refusal(f"there is no file {path}")
    if path.parent.name == "runs" and not path.exists():
        made = sorted(latest.parent.name for latest in path.parent.glob("*/latest"))
        raise Refusal(
            f"there is no run {path}; runs with weights: {', '.join(made) or 'none yet'}. "
            f"python train.py --stage base --run {path.name} makes one"
        )
    raise Refusal(RELEASE.format(path=path))


def newest_checkpoint(run: Path) -> Path:
    """The folder that a run's `latest` names; it may be gone."""
    with reading(run / "latest"):
        name = (run / "latest").read_text().strip()
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"it names no checkpoint, but {name[:40]!r}")
        return run / "ckpt" / name


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as e:
        raise Refusal(f"hf:{name} needs: pip install huggingface_hub (or pass a folder)") from e
    return Path(snapshot_download(name))


# ---- reading -------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors on the CPU (mapped from the file, not copied) and metadata of any weight file."""
    file = find(path)
    with reading(file):
        if file.name.endswith(".index.json"):
            return _read_shards(file)
        if file.suffix == ".safetensors":
            return _read_safetensors(file)
        return _read_torch(file), {}


def _read_torch(file: Path) -> dict[str, Tensor]:
    """Of a pickle only tensors and plain values are taken; code in it is refused."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise Refusal(f"{file.name} is no readable torch file ({reason}): {AGAIN}") from error

    # the released decoders are nested
    for key in ("state_dict", "gen_model", "generator", "model"):
        inner = found.get(key)
        found = inner if isinstance(inner, dict) else found
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict]:
    size = file.stat().st_size
    with reading(file), open(file, "rb") as f:  # length of header · header · tensors
        full = 8 + int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(full - 8)) if full <= size else {}
        ends = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
    full += max(ends, default=0)
    if size < full:
        raise Refusal(
            f"{file.name} is {size_in_words(size)}, header says {size_in_words(full)}: {AGAIN}"
        )

    with safe_open(file, framework="pt") as f:
        metadata = {name: _decoded(value) for name, value in (f.metadata() or {}).items()}
        return {name: f.get_tensor(name) for name in f.keys()}, metadata


def _read_shards(index: Path) -> tuple[dict[str, Tensor], dict]:
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise ValueError(f"{outside[0]!r:.80} is no file of its folder")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise Refusal(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards, "
            f"{printable(', '.join(missing))}, named in {index.name}: {AGAIN}"
        )
    tensors = {}
    metadata = {}
    for shard in shards:
        with reading(index.parent / shard):
            more_tensors, more_metadata = _read_safetensors(index.parent / shard)
        tensors |= more_tensors
        metadata |= more_metadata
    return tensors, metadata


def _decoded(value: str) -> object:
    """Metadata of ours is JSON; that of others ({"format": "pt"}) stays a string."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


# ---- writing -------------------------------------------------------------------------------------


def write_weights(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict | None = None
) -> None:
    """One safetensors file, complete or not there at all; metadata values are stored as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    words = {name: json.dumps(value) for name, value in (metadata or {}).items()}
    try:
        tmp.touch()
        mode = tmp.stat().st_mode  # as of any file here; safetensors' own is for its owner alone
        save_file(plain, tmp, words)
        tmp.chmod(mode)
        with open(tmp, "r+b") as f:
            _sort_metadata(f)
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except SafetensorError as error:  # a full disk, above all
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        tmp.unlink(missing_ok=True)


def _sort_metadata(f) -> None:
    """safetensors writes metadata in an order drawn anew each time: files of one content differ."""
    size = int.from_bytes(f.read(8), "little")
    header = json.loads(f.read(size))
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if header["__metadata__"]:
        assert len(text) <= size, "the same entries in another order are as long"
        f.seek(8)
        f.write(text.ljust(size))


def hash_of(file: Path) -> str:
    """Of what is in a file; of one that would take too long, only how long it is."""
    size = file.stat().st_size
    if size > HASHED:
        return f"{size} bytes"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Atomic: readers see the old text or the new one."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def size_in_words(n: int) -> str:
    if n >= 1e8:
        return f"{n / 1e9:.1f} GB"
    return f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n} bytes"


# ---- models --------------------------------------------------------------------------------------


def load(
    path: str | Path,  # whatever find() understands
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,  # None keeps what is stored
) -> tuple[DiT | moe.Experts, dict]:  # the model in eval mode, and its metadata (with "path")
    """Build on meta, then give every parameter its stored tensor: no model is in memory twice."""
    file = find(path)
    tensors, metadata = read_weights(file)
    cfg = config_of(file, metadata)
    with reading(file):
        model = moe.build(cfg, "meta")
        check_names(model.state_dict(), tensors, file)

    # one by one: the float32 release becomes bfloat16 in 13 GB
    for name in list(tensors):
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
        names = ", ".join(parts) or "nothing"
        raise Refusal(f"experts need a low one and at least one view, got {names}")
    experts = {name: load(path, device, dtype)[0] for name, path in parts.items()}
    if len({expert.cfg for expert in experts.values()}) > 1:
        raise Refusal("experts must share one architecture; train them with one --preset")
    low = experts.pop("low")
    return moe.Experts(experts, low, boundary).eval()


def start_from(
    path: str | Path, preset: str | DiTConfig, dtype: torch.dtype = torch.float32
) -> tuple[DiT, list[str]]:
    """A model to train further, and what is fresh in it.

    Nothing is, or cameras and actions on plain Wan2.2.
    """
    file = find(path)
    tensors, _ = read_weights(file)
    model = moe.build(preset).to(dtype)
    wanted = model.state_dict()
    fresh = [name for name in wanted if name not in tensors and is_new(name)]
    check_names({name: t for name, t in wanted.items() if name not in fresh}, tensors, file)
    stored = {name: t.to(dtype) for name, t in tensors.items()}
    model.load_state_dict(stored, strict=False, assign=True)
    return model, fresh


# ---- VAEs ----------------------------------------------------------------------------------------

# MG-LightVAE's diffusers-style names -> ours:
# encoder.down_blocks.1.resnets.0.norm1.gamma -> encoder.downsamples.1.downsamples.0.residual.0.gamma
VAE_RENAMES = (
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
    for old, new in VAE_RENAMES:
        key = re.sub(old, new, key)
    return key


def vae_metadata(vae: VAE) -> dict[str, dict]:
    """What a weight file must say about itself: the whole config, statistics included."""
    return {"vae": asdict(vae.cfg)}


def load_vae(path: str | Path) -> VAE:
    file = find(path)
    tensors, metadata = read_weights(file)
    with reading(file):
        return vae_from_weights(tensors, metadata)


def vae_from_weights(tensors: dict, metadata: dict | None = None) -> VAE:
    """A float32 VAE from a file's content: ours (config inside), Wan2.2_VAE.pth, MG-LightVAE*.pth."""
    helpers = "dynamic_feature_projection_heads."  # of its training
    named = {
        vae_released_name(name): t
        for name, t in tensors.items()
        if isinstance(t, Tensor) and not name.startswith(helpers)
    }
    cfg = _vae_config(named, (metadata or {}).get("vae"))
    with torch.device("meta"):
        vae = VAE(cfg)
    _check_vae(vae.state_dict(), named)
    vae.load_state_dict({name: t.float() for name, t in named.items()}, assign=True)
    vae.check_weights()
    vae.set_statistics(cfg.mean, cfg.std)  # these are not among the released weights
    return vae


def _vae_config(tensors: dict[str, Tensor], config: dict | None) -> VAEConfig:
    if config:
        plain = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items()}
        # so many blocks would be built for ever
        if not 0 < plain.get("res_blocks", 1) <= 100:
            raise ValueError(f"its config says res_blocks = {plain['res_blocks']!s:.40}")
        return VAEConfig(**plain)
    # released: only the base widths can differ
    released = PRESETS["wan2.2"]
    width = len(tensors.get("encoder.conv1.weight", ()))
    decoder_width = len(tensors.get("decoder.conv1.weight", ()))
    return replace(released, dim=width, dec_dim=max(1, decoder_width // released.dim_mult[-1]))


def _check_vae(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    wrong = [f"{name} missing" for name in wanted if name not in got]
    wrong += [f"{name} unknown" for name in got if name not in wanted]
    for name in set(wanted) & set(got):
        have = tuple(got[name].shape)
        need = tuple(wanted[name].shape)
        if have != need:
            wrong.append(f"{name} is {have}, expected {need}")
    if wrong:
        raise Refusal(
            f"{len(wrong)} tensors do not fit this VAE: {'; '.join(wrong[:3])}; expected "
            "Wan2.2_VAE.pth, MG-LightVAE.pth or a vae.safetensors, undamaged: download or train "
            "it again"
        )


# ---- precision -----------------------------------------------------------------------------------


def faster_dtype(device: torch.device | str) -> str:
    """bfloat16 where the hardware multiplies it clearly faster than float32, by measurement."""
    x = torch.randn(2048, 512, device=device)
    best = {torch.float32: 1e9, torch.bfloat16: 1e9}
    for dtype in [*best] * 6:
        a = x.to(dtype)
        start = time.perf_counter()
        torch.nn.functional.linear(a, a[:512]).sum().item()
        best[dtype] = min(best[dtype], time.perf_counter() - start)
    gain = best[torch.float32] / best[torch.bfloat16]
    name = "bfloat16" if gain > 1.3 else "float32"
    print(f"bfloat16 multiplies {gain:.1f}x as fast as float32 here: using {name}")
    return name
