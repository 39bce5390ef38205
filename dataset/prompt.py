"""Words to vectors: hashes, umT5, captions.

Our small models read a handful of words of templates, so any fixed and distinct vectors will do: a
hash of each word. The released networks were trained with umT5-XXL, whose encoder is here under its
released names. It is T5 but for two things: every layer has a position bias of its own, and there is
no 1/√d in the attention.
Tests: pytest tests/test_prompt.py
"""

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

# how a message says where the text encoder and its tokeniser are to be had
GET = (
    "hf download Skywork/Matrix-Game-3.0 --local-dir weights/matrix-game-3 "
    '--include "models_t5*" "google/*"'
)


def embed_prompt(text: str, dim: int, length: int) -> Tensor:
    """(length, dim): fixed pseudo-random vectors of unit variance, zeros after the last word."""
    letters = "".join(c if c.isalnum() else " " for c in text.lower())
    words = letters.split()[:length]
    digests = [hashlib.shake_128(word.encode()).digest(2 * dim) for word in words]
    rows = [np.frombuffer(digest, "<u2") for digest in digests]
    table = np.array(rows, np.float32).reshape(-1, dim)
    uniform = torch.from_numpy(table / 65535 - 0.5)
    missing = length - len(words)
    return F.pad(uniform * math.sqrt(12), (0, 0, 0, missing))


# ---- umT5 --------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    exact = x.float()
    mean_square = exact.square().mean(-1, keepdim=True)
    normed = exact * torch.rsqrt(mean_square + 1e-6)
    return weight * normed.to(x.dtype)


def position_buckets(length: int) -> Tensor:
    """(L, L): 16 kinds of distances to the left and as many to the right, finer when near."""
    place = torch.arange(length)
    delta = place[None, :] - place[:, None]  # key − query
    distance = delta.abs()
    ratio = distance.clamp_min(1).float().div(8)
    far = 8 + (ratio.log() / math.log(128 / 8) * 8).long()
    bucket = torch.where(distance < 8, distance, far.clamp_max(15))
    return 16 * (delta > 0) + bucket


def umt5(weights: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """The encoder: (B, L), (B, L) -> (B, L, D), rows after the prompt are 0."""
    x = weights["token_embedding.weight"][ids]
    bucket = position_buckets(ids.shape[1])
    depth = sum(key.endswith("norm1.weight") for key in weights)
    for i in range(depth):
        w = layer_weights(weights, f"blocks.{i}.")
        x = x + self_attention(w, rms_norm(x, w["norm1.weight"]), bucket, mask)
        x = x + feed_forward(w, rms_norm(x, w["norm2.weight"]))
    return rms_norm(x, weights["norm.weight"]) * mask[:, :, None]


def layer_weights(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = [name for name in weights if name.startswith(prefix)]
    return {name.removeprefix(prefix): weights[name] for name in names}


def self_attention(w: dict[str, Tensor], n: Tensor, bucket: Tensor, mask: Tensor) -> Tensor:
    bias = w["pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)  # (heads, L, L)
    heads = len(bias)

    def project(name: str) -> Tensor:  # -> (B, heads, L, D/heads)
        y = F.linear(n, w[f"attn.{name}.weight"])
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    scores = project("q") @ project("k").mT + bias
    padding = mask[:, None, None, :] == 0
    scores = scores.masked_fill(padding, torch.finfo(n.dtype).min)
    shares = scores.float().softmax(-1).to(n.dtype)
    mixed = (shares @ project("v")).transpose(1, 2)
    return F.linear(mixed.flatten(2), w["attn.o.weight"])


def feed_forward(w: dict[str, Tensor], n: Tensor) -> Tensor:
    gate = F.linear(n, w["ffn.gate.0.weight"])
    gate = F.gelu(gate, approximate="tanh")
    hidden = F.linear(n, w["ffn.fc1.weight"]) * gate
    return F.linear(hidden, w["ffn.fc2.weight"])


def encode_umt5(
    text: str,
    tokenizer: Path,
    weights: Callable[[], dict[str, Tensor]],  # 11.4 GB: only called when the cache misses
    cache: Path,
) -> Tensor:  # (512, 4096)
    """A prompt for the released networks, encoded once."""
    # as the release cleans its prompts, but for ftfy, which straightens curly quotes too
    text = " ".join(html.unescape(html.unescape(text)).split())
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    file = Path(cache) / f"umt5-{digest}.safetensors"
    if not file.exists():
        if not tokenizer.is_dir():
            raise ValueError(f"prompt {text!r} needs umT5, and {tokenizer} does not exist: {GET}")
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            need = "its tokeniser needs: pip install transformers sentencepiece"
            raise ValueError(f"prompt {text!r} is not in {cache}; {need}") from error
        read = AutoTokenizer.from_pretrained(str(tokenizer))
        shape = {"max_length": 512, "padding": "max_length", "truncation": True}
        tokens = read(text, return_tensors="pt", **shape)

        with torch.no_grad():
            embedding = umt5(weights(), tokens.input_ids, tokens.attention_mask)[0]

        # a stop while writing must not leave half a file under the final name; all ranks write at once
        file.parent.mkdir(parents=True, exist_ok=True)
        part = f"{file}.{os.getpid()}.part"
        save_file({"embedding": embedding.contiguous()}, part)
        os.replace(part, file)
    return load_file(file)["embedding"]


# ---- captions ----------------------------------------------------------------------------------------------


def caption(
    scene: str, keyboard: np.ndarray, mouse: np.ndarray, player: np.ndarray, tag: str
) -> dict:
    """Four levels of words from templates: tag, scene, motion, full."""
    motion = describe_motion(keyboard, mouse, player)
    whole_clip = {
        "start": 0,
        "end": len(player) - 1,
        "prompt": {"start": scene, "dynamic": motion},
    }
    levels = {
        "tag": tag,
        "scene": scene,
        "motion": motion,
        "full": f"{scene}. {motion}",
    }
    return {"detailed": [whole_clip], "simple": levels}


def describe_motion(keyboard: np.ndarray, mouse: np.ndarray, player: np.ndarray) -> str:
    ground = player[:, [0, 2]]
    walked = np.linalg.norm(np.diff(ground, axis=0), axis=1).sum()
    turned = float(player[-1, 4] - player[0, 4])
    ways = ("forward", "backward", "to the left", "to the right")
    way = ways[int(keyboard[:, :4].sum(0).argmax())]

    motion = "The camera stays in its place"
    if walked > 0.5:
        motion = f"The camera walks {walked:.0f} m, mostly {way}"
    if abs(turned) >= 20:
        side = "right" if turned > 0 else "left"
        return f"{motion}, and turns {abs(turned):.0f} degrees {side}"
    return f"{motion}, and looks around" if np.abs(mouse).sum() > 2 else motion
