"""The same world model as a page that needs no server.

    npm ci --prefix web                            the runtime, once: onnxruntime-web, from its lock file
    python export.py --web web                     web/model/, from the shipped weights or from any of `tiny`
    python -m http.server -d web                   or any other static host

What it does. A browser does not run PyTorch, but there are programs for it that run ONNX, a
format for networks: a list of operators and their weights. torch.export calls the very functions
that play runs, and writes down every operator that they use. So there are three files: the
network, for segments of any length; the decoder for the first latent of a video, which is one
frame; and the decoder for all that follow. What a decoder remembers (vae.py) becomes inputs and
outputs of its file, and the page carries it from call to call. All else is geometry and
bookkeeping, which web/*.js does: camera.js, memory.js, context.js and flow.js do what the
chapters of the same names do, session.js does what realtime.py does.

What it checks. A session of realtime.py walks twice, with its own networks in float32 and with
the files run by onnxruntime in their place. No pixel may differ by more than one of 256 grey
levels; else it exits with 1. Weights are stored in float16, or in float32 where float16 is not
enough for that.

What differs from play. Noise: a browser has no torch.Generator, see engine/exported.py. No
prompt: its text is zeros, as in play without one. The decoder is the 75 % lighter one.

Tests: pytest tests/test_export.py tests/test_web.py      In a browser: pytest -m browser tests/test_web.py
"""

import contextlib
import gzip
import importlib.util
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import actions
import attention
import camera
import dit
import flow
import realtime
import vae
import vae_blocks
from context import Window
from engine import cli, weights
from engine.exported import ExportedDecoder, ExportedNetwork, HashedDenoiser
from engine.parts import SIZES, Options, model_of
from world import MAX_PITCH

FORMAT = 2  # number of the layout of web/model/; web/networks.js reads this one
PRESET = "tiny"
DECODER = "light75"
EXTRA = ("onnx", "onnxscript", "onnxruntime")
SEED = 42
# ONNX names types by numbers: of what a tensor holds (32 and 64 bits), and of an operator's attribute
FLOAT = 1
DOUBLE = 11
INT_ATTRIBUTE = 2
GREY = 1  # of 256 grey levels: so much a pixel of the page may differ


# ---- what is traced ----------------------------------------------------------------------------------------


class VelocityGraph(nn.Module):
    """The velocity that the network predicts at (x, σ) in a context, as one function of tensors.

    Latents come first, (n, C, h, w) and not (C, n, h, w), so that the page can put arrays one
    behind the other. The graph does not know how many clean latents are memory, and need not: the
    network treats memory and past alike, but for the clock of the actions (actions.py), which
    starts again after the memory. So that clock is an input.
    """

    def __init__(self, network: dit.DiT) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        noisy: Tensor,  # (n, C, h, w)
        sigma: Tensor,  # (1,)
        clean: Tensor,  # (K, C, h, w) memory, then past
        rays: Tensor,  # (1, R, K + n, h, w)
        mouse: Tensor,  # (1, K + n, 12, 2)
        keyboard: Tensor,  # (1, K + n, 12, 6)
        times: Tensor,  # (K + n,) int32, absolute
        clock: Tensor,  # (K + n,) int32
    ) -> Tensor:  # (n, C, h, w)
        cfg = self.network.cfg
        past = clean.transpose(0, 1)[None]
        context = SimpleNamespace(
            past=past,
            memory=past[:, :, :0],
            rays=rays,
            mouse=mouse,
            keyboard=keyboard,
            times=times[None],
            text=torch.zeros(1, cfg.text_len, cfg.text_dim),
        )
        prepared = self.network.encode_context(context)
        action_rope = attention.cos_sin(actions.angles(clock, cfg))
        prepared = replace(prepared, action_rope=action_rope)
        x = noisy.transpose(0, 1)[None]
        return self.network(x, sigma, context, prepared=prepared)[0].transpose(0, 1)


class DecoderGraph(nn.Module):
    """Latents (n, C, h, w) and what the decoder remembers -> frames, and what it remembers then.

    Frames are (4n, H, W, 4) bytes: red, green, blue and opacity, as a canvas wants them.
    """

    def __init__(self, network: vae.VAE) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        stream = vae_blocks.Stream(dict(enumerate(state)))
        z = self.network.unwhiten(latents.transpose(0, 1)[None])
        video = vae.unpatchify(self.network.decoder(z, stream), self.network.cfg.patch)[0]
        grey = video.clamp(-1, 1).add(1).mul(127.5).round()  # (3, F, H, W)
        rgba = torch.cat([grey, torch.full_like(grey[:1], 255)]).permute(1, 2, 3, 0)
        return rgba.to(torch.uint8), *(stream.next[slot] for slot in sorted(stream.next))


def plain_norm_silu(x: Tensor, gamma: Tensor, past: Tensor) -> Tensor:
    """vae_blocks.NormSiLU without its gradient: standard operators."""
    normed = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * gamma
    return torch.cat([past, F.silu(normed)], 2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attention.attention in two products and a softmax, (B, L, heads, d) each."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2)


@contextlib.contextmanager
def standard_operators() -> Iterator[None]:
    """While tracing, two functions that are fast on a CPU give way to forms in ONNX's own operators."""
    with (
        mock.patch.object(attention, "attention", plain_attention),
        mock.patch.object(vae_blocks, "norm_silu", plain_norm_silu),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        yield


# ---- the files ---------------------------------------------------------------------------------------------


def trace_network(network: dit.DiT) -> object:
    """One graph for segments of any length: the axes that count latents are dynamic."""
    cfg = network.cfg
    h, w = latent_size()
    K, n = 9, 10  # any numbers: what is traced does not depend on them
    T = K + n
    example = {
        "noisy": torch.randn(n, cfg.in_dim, h, w),
        "sigma": torch.rand(1),
        "clean": torch.randn(K, cfg.in_dim, h, w),
        "rays": torch.randn(1, cfg.ray_channels, T, h, w),
        "mouse": torch.randn(1, T, cfg.action_window, 2),
        "keyboard": torch.randn(1, T, cfg.action_window, 6),
        "times": torch.arange(T, dtype=torch.int32),
        "clock": torch.arange(T, dtype=torch.int32),
    }
    axes = {"noisy": 0, "clean": 0, "rays": 2, "mouse": 1, "keyboard": 1, "times": 0, "clock": 0}
    shapes = {name: {axis: torch.export.Dim.DYNAMIC} for name, axis in axes.items()}
    return to_onnx(VelocityGraph(network), example, shapes | {"sigma": None}, ["velocity"])


def trace_decoder(network: vae.VAE) -> tuple[object, object]:
    """One graph for the first latent of a video, and one for all that follow, any number at once."""
    graph = DecoderGraph(network)
    latents = torch.randn(3, network.cfg.z_dim, *latent_size())
    with standard_operators():
        state = list(graph(latents[:1], [])[1:])
    names = ["frames", *(f"next_{slot}" for slot in range(len(state)))]
    first = to_onnx(graph, {"latents": latents[:1], "state": []}, None, names)

    shapes = {"latents": {0: torch.export.Dim.DYNAMIC}, "state": [None] * len(state)}
    inputs = ["latents", *(f"past_{slot}" for slot in range(len(state)))]
    following = {"latents": latents, "state": state}
    return first, to_onnx(graph, following, shapes, names, inputs)


def to_onnx(
    graph: nn.Module,
    example: dict,
    shapes: dict | None,
    outputs: list[str],
    inputs: list[str] | None = None,
) -> object:  # an onnx.ModelProto
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with standard_operators():
        program = torch.export.export(
            graph.eval(), (), example, dynamic_shapes=shapes, strict=False
        )
        exported = torch.onnx.export(
            program,
            input_names=inputs,
            output_names=outputs,
            dynamo=True,
            optimize=False,  # every runtime does that itself, a hundred times faster
            verbose=False,
        )
    model = exported.model_proto
    simplify(model.graph)
    return model


def simplify(graph: object) -> None:
    """What a browser need not know, or what its graphics card lacks: Python's lines, CastLike, doubles.

    Only angles of clocks are computed in double. They stay below a few thousand in play, and a
    float32 knows them to a ten-thousandth of a turn.
    """
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        del node.metadata_props[:]  # which line of Python it came from
        for attribute in node.attribute:
            if attribute.HasField("t"):
                types[node.output[0]] = attribute.t.data_type
                narrow(attribute.t)
        # "to the type of that tensor" becomes "to this type"
        if node.op_type == "CastLike" and types.get(node.input[1]):
            node.op_type = "Cast"
            node.attribute.add(name="to", type=INT_ATTRIBUTE, i=types[node.input[1]])
            del node.input[1]
        if node.op_type == "Cast" and node.attribute[0].i == DOUBLE:
            node.attribute[0].i = FLOAT
    for tensor in graph.initializer:
        narrow(tensor)
    for value in values:
        if value.type.tensor_type.elem_type == DOUBLE:
            value.type.tensor_type.elem_type = FLOAT


def narrow(tensor: object) -> None:
    """A stored double becomes a float."""
    import onnx

    if tensor.data_type == DOUBLE:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def latent_size() -> tuple[int, int]:
    H, W = SIZES[PRESET]
    _, row, column = vae.PRESETS[PRESET].stride
    return H // row, W // column


def in_half(model: object) -> object:
    """A copy that stores its large tensors in float16; operators in front widen them to float32."""
    import onnx

    small = onnx.ModelProto()
    small.CopyFrom(model)
    casts = []
    for tensor in small.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < 256:
            continue
        name = tensor.name
        half = onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}_half")
        tensor.CopyFrom(half)
        widen = onnx.TensorProto.FLOAT
        casts.append(onnx.helper.make_node("Cast", [half.name], [name], to=widen))
    for node in reversed(casts):
        small.graph.node.insert(0, node)
    return small


# ---- the check ---------------------------------------------------------------------------------------------


def walk(session: realtime.Session, image: Tensor, lengths: list[int]) -> Tensor:
    """All frames of a walk: the first segment, then one of every length and three in all at least."""
    frames = [session.reset(image, seed=SEED).frames]
    later = (2 * lengths)[: max(2, len(lengths))]
    for new in [Window.first - 1, *later]:
        session.options = replace(session.options, new=new)
        keyboard, mouse = camera.actions_from_keys(["w+l"] * (Window.stride * new))
        frames.append(session.step(keyboard, mouse).frames)
    return torch.cat(frames)


def worst_pixel(session: realtime.Session, files: dict[str, bytes], image: Tensor) -> int:
    """By how many of 256 grey levels a walk through the exported files differs at most."""
    plain = session.denoiser, session.decoder
    meta = session.denoiser.meta
    # the networks of play, but with the noise that the page draws
    session.denoiser = HashedDenoiser(session.nets["dit"], meta, session.options)
    expected = walk(session, image, session.lengths).int()

    # the same steps again, through the files
    network = ExportedNetwork(files["network.onnx"])
    session.denoiser = HashedDenoiser(network, meta, session.options)
    session.decoder = ExportedDecoder(files["decoder_first.onnx"], files["decoder_next.onnx"])
    got = walk(session, image, session.lengths).int()
    session.denoiser, session.decoder = plain
    return int((got - expected).abs().max())


# ---- the program -------------------------------------------------------------------------------------------


def check_weights(path: str) -> None:
    """Weights that the page cannot run are refused before anything is loaded."""
    file = weights.find(model_of(Path(path or cli.beside("assets", PRESET))))
    metadata = weights.read_weights(file)[1] if file.suffix == ".safetensors" else {}
    config = weights.config_of(file, metadata)
    if not isinstance(config, dit.DiTConfig):
        raise ValueError(f"{file} holds experts; the page runs one network: export one of {PRESET}")
    if config != dit.PRESETS[PRESET]:
        preset = metadata.get("preset", "another shape")
        raise ValueError(
            f"{file} is a model of {preset}; a browser can run {PRESET} alone (8 million weights). "
            f"Train one: python train.py --stage base --preset {PRESET}"
        )
    if metadata.get("encoding", "anchored") != "anchored":
        raise ValueError(
            f"{file} was trained with {metadata['encoding']} cameras; web/camera.js knows anchored"
        )


def check_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{missing[0]} is not installed; type: pip install {' '.join(EXTRA)}")


def read_picture(path: Path) -> Tensor:
    H, W = SIZES[PRESET]
    picture = Image.open(path).convert("RGB").resize((W, H))
    return torch.from_numpy(np.array(picture))


def encode(session: realtime.Session, pictures: list[Tensor]) -> np.ndarray:
    """(n, C, h, w): every start picture as the latent that a session begins with."""
    pixels = torch.stack(pictures).permute(0, 3, 1, 2)[:, :, None].float()  # (n, 3, 1, H, W)
    with torch.no_grad():
        return session.nets["encoder"].encode(pixels / 127.5 - 1)[:, :, 0].numpy()


def facts(session: realtime.Session, source: str, starts: list[Path]) -> dict:
    """All that the page must know of the model, beside the networks themselves."""
    meta = session.denoiser.meta
    return {
        "format": FORMAT,
        "weights": source,
        "preset": PRESET,
        "latent": [session.nets["dit"].cfg.in_dim, *latent_size()],
        "frame": list(SIZES[PRESET]),
        "lengths": session.lengths,
        "sigmas": flow.sigma_grid(session.options.steps, meta["shift"]).tolist(),
        "method": meta["method"],
        "sink": bool(meta["sink"]),
        "memory": meta["p_memory_off"] < 1,
        "max_pitch": MAX_PITCH,
        "starts": [path.stem for path in starts],
    }


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Networks are packed: not every static host does that on its way.

    The files of before are replaced when all are there: a page of two exports would not run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drafts = {}
    try:
        for name, content in files.items():
            packed = name.endswith(".onnx")
            path = folder / (f"{name}.gz" if packed else name)
            drafts[path] = path.with_name(f"{path.name}.tmp")
            drafts[path].write_bytes(gzip.compress(content, 9, mtime=0) if packed else content)
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def megabytes(paths: list[Path]) -> float:
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def main(argv: list[str]) -> int | None:
    parser = cli.Parser("export.py", "The same world model as a page that needs no server.")
    parser.add_argument("--web", required=True, help="the folder of the page: web")
    parser.add_argument("--weights", default="", help=f"of {PRESET}; default: the shipped ones")
    parser.add_argument("--steps", type=int, default=3, help="network calls per segment")
    args = parser.parse_args(argv)
    page = cli.find(args.web)
    if not (page / "index.html").is_file():
        raise ValueError(f"{page} has no index.html; the page of this repository is: --web web")
    check_extra()
    args.weights = str(cli.find(args.weights)) if args.weights else ""
    check_weights(args.weights)

    options = Options(PRESET, args.weights, DECODER, args.steps, device="cpu", dtype="float32")
    session = realtime.Session(options)

    # where a visitor may begin; the first picture is also the one that the check walks from
    starts = cli.start_pictures()
    pictures = [read_picture(path) for path in starts]

    began = time.perf_counter()
    print("tracing the network and its decoder", flush=True)
    first, following = trace_decoder(session.nets["decoder"])
    models = {
        "network.onnx": trace_network(session.nets["dit"]),
        "decoder_first.onnx": first,
        "decoder_next.onnx": following,
    }
    print(f"traced in {time.perf_counter() - began:.0f} s; comparing with play", flush=True)

    # half of the bytes, where they are enough
    for stored, form in (("float16", in_half), ("float32", lambda model: model)):
        files = {name: form(model).SerializeToString() for name, model in models.items()}
        worst = worst_pixel(session, files, pictures[0])
        print(f"{stored}: at most {worst} of 256 grey levels from realtime.Session", flush=True)
        if worst <= GREY:
            break

    # what the page reads first, and what it shows before anything is imagined
    source = args.weights or f"assets/{PRESET}"
    about = facts(session, source, starts) | {"stored": stored, "worst_grey_level": worst}
    files["facts.json"] = json.dumps(about, indent=1).encode()
    files["starts.bin"] = encode(session, pictures).astype("<f4").tobytes()
    for number, path in enumerate(starts):
        files[f"start-{number}.png"] = path.read_bytes()
    write(page / "model", files)
    report_size(page, time.perf_counter() - began)
    return 0 if worst <= GREY else 1


def report_size(page: Path, seconds: float) -> None:
    """What a visitor downloads, and what is missing to serve the page."""
    model = megabytes(list((page / "model").iterdir()))
    texts = megabytes([*page.glob("*.js"), *page.glob("*.html"), *page.glob("*.css")])
    runtime = megabytes([*page.glob("runtime/ort.wasm*"), *page.glob("runtime/*threaded.wasm.gz")])
    print(
        f"{cli.shown(page / 'model')} written in {seconds:.0f} s. A visitor downloads "
        f"{model + texts + runtime:.1f} MB: model {model:.1f}, runtime {runtime:.1f}, page {texts:.2f}"
    )
    if not runtime:
        print("The runtime is missing. Fetch it with: npm ci --prefix web")
    print(f"Serve it: python -m http.server -d {cli.shown(page)}")


if __name__ == "__main__":
    cli.run(main)
