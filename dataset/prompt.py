"""Words to vectors: hashes, umT5, captions."""

import hashlib
import html
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

_rms_norm = lambda x, weight: (
    weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
)


def embed_prompt(text: str, dim: int, length: int) -> Tensor:  # (length, dim)
    """Words as fixed pseudo-random vectors of unit variance, zeros after the last: what `tiny` uses instead of umT5."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()[:length]
    table = np.array(
        [np.frombuffer(hashlib.shake_128(word.encode()).digest(2 * dim), "<u2") for word in words],
        np.float32,
    )
    return F.pad(
        torch.from_numpy(table.reshape(-1, dim) / 65535 - 0.5) * math.sqrt(12),
        (0, 0, 0, length - len(words)),
    )


def umt5(
    weights: dict[str, Tensor], ids: Tensor, mask: Tensor
) -> Tensor:  # (B, L), (B, L) → (B, L, D)
    """The umT5 encoder under the released key names. Not T5: every layer has a position bias of its own; no 1/√d scaling."""
    x = weights["token_embedding.weight"][ids]
    delta = torch.arange(ids.shape[1])[None, :] - torch.arange(ids.shape[1])[:, None]  # key − query
    far = 8 + (delta.abs().clamp_min(1).float().div(8).log() / math.log(128 / 8) * 8).long()
    bucket = 16 * (delta > 0) + torch.where(delta.abs() < 8, delta.abs(), far.clamp_max(15))
    for i in range(sum(key.endswith("norm1.weight") for key in weights)):
        w = {
            key.removeprefix(f"blocks.{i}."): value
            for key, value in weights.items()
            if key.startswith(f"blocks.{i}.")
        }
        n, bias = (
            _rms_norm(x, w["norm1.weight"]),
            w["pos_embedding.embedding.weight"][bucket].permute(2, 0, 1),
        )  # (heads, L, L)
        q, k, v = (
            F.linear(n, w[f"attn.{name}.weight"]).unflatten(-1, (len(bias), -1)).transpose(1, 2)
            for name in "qkv"
        )
        logits = (q @ k.mT + bias).masked_fill(
            mask[:, None, None, :] == 0, torch.finfo(x.dtype).min
        )
        x = x + F.linear(
            (logits.float().softmax(-1).to(x.dtype) @ v).transpose(1, 2).flatten(2),
            w["attn.o.weight"],
        )
        n = _rms_norm(x, w["norm2.weight"])
        gate = F.gelu(F.linear(n, w["ffn.gate.0.weight"]), approximate="tanh")
        x = x + F.linear(F.linear(n, w["ffn.fc1.weight"]) * gate, w["ffn.fc2.weight"])
    return _rms_norm(x, weights["norm.weight"]) * mask[:, :, None]  # rows after the prompt are 0


def encode_umt5(
    text: str, tokenizer: Path, weights: Callable[[], dict[str, Tensor]], cache: Path
) -> Tensor:  # (512, 4096)
    """A prompt for the released networks, encoded once; `weights` (11.4 GB) is only called when the cache misses."""
    text = " ".join(html.unescape(html.unescape(text)).split())
    file = Path(cache) / f"umt5-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    if not file.exists():
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(
                f"prompt {text!r} is not in {cache}; its tokeniser needs: pip install transformers sentencepiece"
            ) from error
        tokens = AutoTokenizer.from_pretrained(str(tokenizer))(
            text, max_length=512, padding="max_length", truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            embedding = umt5(weights(), tokens.input_ids, tokens.attention_mask)[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embedding": embedding.contiguous()}, f"{file}.part")
        os.replace(f"{file}.part", file)
    return load_file(file)["embedding"]


def caption(
    scene: str, keyboard: np.ndarray, mouse: np.ndarray, player: np.ndarray, tag: str
) -> dict:
    """Four levels of words from templates: tag, scene, motion, full."""
    walked, turned = (
        np.linalg.norm(np.diff(player[:, [0, 2]], axis=0), axis=1).sum(),
        float(player[-1, 4] - player[0, 4]),
    )
    way = ("forward", "backward", "to the left", "to the right")[
        int(keyboard[:, :4].sum(0).argmax())
    ]
    motion = (
        f"The camera walks {walked:.0f} m, mostly {way}"
        if walked > 0.5
        else "The camera stays in its place"
    )
    turn = f", and turns {abs(turned):.0f} degrees {'right' if turned > 0 else 'left'}"
    motion += turn if abs(turned) >= 20 else ", and looks around" if np.abs(mouse).sum() > 2 else ""
    levels = {"tag": tag, "scene": scene, "motion": motion, "full": f"{scene}. {motion}"}
    return {
        "detailed": [
            {"start": 0, "end": len(player) - 1, "prompt": {"start": scene, "dynamic": motion}}
        ],
        "simple": levels,
    }
