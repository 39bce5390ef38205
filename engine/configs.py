"""What a weight file says it is: our configs, the released one, the names of its tensors.

Nothing is guessed. A file of ours carries its whole config; a released one has a config.json
beside it, in words of its own; whatever either says is checked before a network of that size is
built. Whatever is wrong with a file ends in a ValueError of one line that names it.  Tests:
tests/test_weights.py
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from torch import Tensor

import moe
from dit import DiTConfig
from engine.cli import printable


class Refusal(ValueError):
    """A sentence about a file that needs no more words."""


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever a damaged file makes its reader say becomes one line that names the file."""
    try:
        yield
    except Refusal:
        raise
    except OSError as error:
        raise Refusal(f"{file} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        first_line = printable((str(error).splitlines() or [""])[0])
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
        raise Refusal(f"{file} is damaged: {kind}{first_line}") from error


def config_of(file: Path, metadata: dict) -> DiTConfig | moe.MoEConfig:
    """What a weight file says it is: in its metadata, else in the config.json beside it."""
    config = metadata.get("model") or metadata.get("config")
    source = file
    if config is None:
        source = file.parent / "config.json"
        if not source.is_file():
            raise Refusal(
                f"{file.name} does not say what it is: no config in its metadata and no config.json "
                f"beside it. Put the config.json it was published with into {file.parent}."
            )
        with reading(source):
            config = json.loads(source.read_text())
            config = config.get("model", config)
    with reading(source):
        if "expert" in config:
            expert = ours(config["expert"])
            return moe.MoEConfig(expert, float(config["boundary"]), tuple(config["views"]))
        return from_released(config) if "num_heads" in config else ours(config)


def ours(config: dict) -> DiTConfig:
    """Fields as we store them, with the types and sizes that a network can have."""
    defaults = {field.name: field.default for field in fields(DiTConfig)}
    unknown = sorted(set(config) - set(defaults))
    if unknown:
        names = ", ".join(unknown)
        raise ValueError(f"config has unknown fields {names}: written by another version?")

    # a size that no network has would be built for ever, or end far from here
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items()}
    for name, value in plain.items():
        default = defaults[name]
        kinds = (int, float) if type(default) is float else (type(default),)
        numbers = value if isinstance(value, tuple) else (value,)
        lowest = 1 if type(default) is int or name == "patch" else 0
        largest = 1000 if name in ("layers", "action_blocks", "patch") else 10**6
        if type(value) not in kinds or not all(sane(n, lowest, largest) for n in numbers):
            raise ValueError(f"no network has {name} = {str(value)[:40]}")
    return DiTConfig(**plain)


def sane(value: object, lowest: int, largest: int) -> bool:
    """A text, or a number between these two."""
    if isinstance(value, str):
        return True
    return isinstance(value, int | float) and lowest <= value <= largest


# names in the released config.json -> ours
RELEASED_NAMES = {
    "num_heads": "heads",
    "num_layers": "layers",
    "ffn_dim": "ffn",
    "patch_size": "patch",
    "camera_embed_in_channels": "ray_channels",
}
# what it does not say
RELEASED_DEFAULTS = {
    "text_dim": 4096,
    "text_len": 512,
    "ray_channels": 6 * 16 * 16,
    "action_blocks": (),
    "timestep": "bf16",
    "rays_at_input": False,
    "fp32_stream": True,
}


def from_released(config: dict) -> DiTConfig:
    """The released config.json in our words. Fields under our own names in it win."""
    cfg = dict(RELEASED_DEFAULTS)
    if actions := config.get("action_config"):
        cfg |= {
            "action_blocks": actions["blocks"],
            "action_hidden": actions["hidden_size"],
            "action_width": actions["mouse_hidden_dim"],
            "action_heads": actions["heads_num"],
            "action_rope": actions["mouse_qk_dim_list"][0],
            "action_window": actions["windows_size"] * actions["vae_time_compression_ratio"],
        }
    cfg |= {ours: config[theirs] for theirs, ours in RELEASED_NAMES.items() if theirs in config}
    cfg |= {field.name: config[field.name] for field in fields(DiTConfig) if field.name in config}
    if "sigma_theta" not in config:
        warnings.warn(
            "config.json has no sigma_theta: using 0.8, as both released models do", stacklevel=2
        )
    return ours(cfg)


def is_new(name: str) -> bool:
    """Cameras and actions: what Matrix-Game 3 added to Wan2.2's tensors."""
    return any(part in name for part in ("cam_", "action_model.", "wancamctrl", "c2ws_"))


def check_names(wanted: dict[str, Tensor], got: dict[str, Tensor], file: Path) -> None:
    """Refuse a file whose tensors are not exactly this model's, and say what it is instead."""
    missing = [name for name in wanted if name not in got]
    unexpected = [name for name in got if name not in wanted]
    if missing or unexpected:
        hint = ""
        if missing and not unexpected and all(map(is_new, missing)):
            hint = " It looks like plain Wan2.2-TI2V-5B: use it with train.py --init."
        elif any(name.endswith("weight_int8") for name in unexpected):
            hint = " It is quantised: load the float weights and give --int8."
        elif any(name.startswith("decoder.") for name in unexpected):
            hint = " It is a VAE, which train.py takes as --vae."
        raise Refusal(
            f"{file.name} is not a Matrix-Game 3 DiT: {_count(missing, 'missing')}, "
            f"{_count(unexpected, 'unexpected')}.{hint}"
        )
    for name, t in wanted.items():
        if t.shape != got[name].shape:
            raise Refusal(
                f"{file.name} does not fit its config: {name} is {tuple(got[name].shape)}, "
                f"the config needs {tuple(t.shape)}"
            )
        if not got[name].is_floating_point():
            raise Refusal(
                f"{file.name} is damaged: {name} is {got[name].dtype}, weights are floats"
            )


def _count(names: list[str], what: str) -> str:
    first = printable(names[0], 80) + (", …" if len(names) > 1 else "") if names else ""
    return f"{len(names)} {what}" + (f" ({first})" if first else "")
