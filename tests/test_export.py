"""Export: what is traced is what play computes, what a page cannot run is refused."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import attention
import dit
import export
import vae
import vae_blocks
from engine import weights
from engine.exported import gaussian

ROOT = Path(__file__).resolve().parents[1]
MICRO = dit.PRESETS["micro"]


def loud(network: torch.nn.Module) -> torch.nn.Module:
    """Nothing silent, so that every path shows."""
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return network.eval().requires_grad_(False)


# ---- noise -------------------------------------------------------------------------------------------------


def test_noise_is_normal_and_depends_on_seed_and_segment() -> None:
    x = gaussian(42, 0, 200_000)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x**3).mean()) < 0.05 and abs((x**4).mean() - 3) < 0.1
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.01
    assert np.array_equal(gaussian(42, 0, 100), x[:100]), "a longer draw begins with the shorter"
    for other in (gaussian(42, 1, 200_000), gaussian(43, 0, 200_000)):
        assert abs(np.corrcoef(x, other)[0, 1]) < 0.01


# ---- what is traced ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory, past, new", [(0, 1, 14), (5, 4, 10), (0, 4, 10), (5, 4, 2)])
def test_one_graph_is_the_network_for_every_segment(memory: int, past: int, new: int) -> None:
    network = loud(dit.DiT(MICRO))
    context = dit.random_context(MICRO, memory=memory, past=past, new=new)
    context.text = torch.zeros(1, MICRO.text_len, MICRO.text_dim)
    x = torch.randn(1, MICRO.in_dim, new, 8, 8)
    sigma = torch.tensor([0.7])
    expected = network(x, sigma, context)[0].transpose(0, 1)

    clean = torch.cat([context.memory, context.past], 2)[0].transpose(0, 1)
    clock = torch.cat([torch.arange(memory), torch.arange(past + new)]).int()
    with export.standard_operators():
        got = export.VelocityGraph(network)(
            x[0].transpose(0, 1),
            sigma,
            clean,
            context.rays,
            context.mouse,
            context.keyboard,
            context.times[0].int(),
            clock,
        )
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_decoder_streams_as_in_play() -> None:
    network = loud(vae.VAE(vae.PRESETS["micro"]))
    z = torch.randn(1, 16, 6, 8, 8)
    video = network.decode(z, clamp=True)[0]
    expected = video.add(1).mul(127.5).round().permute(1, 2, 3, 0)

    graph = export.DecoderGraph(network)
    frames, state = [], []
    with export.standard_operators():
        for piece in z.split([1, 3, 2], 2):
            shown, *state = graph(piece[0].transpose(0, 1), state)
            frames.append(shown)
    rgba = torch.cat(frames)
    assert rgba.shape == (21, *video.shape[-2:], 4) and rgba.dtype == torch.uint8
    assert (rgba[..., 3] == 255).all()
    assert (rgba[..., :3].float() - expected).abs().max() <= 1


def test_the_plain_norm_is_the_fast_one() -> None:
    x, gamma = torch.randn(2, 8, 3, 4, 4), torch.rand(8, 1, 1, 1)
    past = torch.randn(2, 8, 2, 4, 4)
    fast = vae_blocks.norm_silu(x, gamma, past)
    torch.testing.assert_close(export.plain_norm_silu(x, gamma, past), fast)


def test_after_the_export_everything_is_as_fast_as_before() -> None:
    before = attention.attention, vae_blocks.norm_silu
    with export.standard_operators():
        assert attention.attention is export.plain_attention
    assert (attention.attention, vae_blocks.norm_silu) == before


def test_the_plain_attention_is_the_fast_one() -> None:
    q, k, v = torch.randn(3, 2, 7, 4, 8)
    fast = attention.attention(q, k, v)
    torch.testing.assert_close(export.plain_attention(q, k, v), fast)


def test_half_of_the_bytes() -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx onnxscript onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    matrix = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    floats = onnx.TensorProto.FLOAT
    ends = [onnx.helper.make_tensor_value_info(name, floats, [1, 64]) for name in ("x", "y")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        ends[:1],
        ends[1:],
        [onnx.numpy_helper.from_array(matrix, "w")],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    small = export.in_half(model).SerializeToString()
    assert len(small) < 0.55 * len(model.SerializeToString())
    x = np.ones((1, 64), np.float32)
    (got,) = runtime.InferenceSession(small).run(None, {"x": x})
    np.testing.assert_allclose(got, x @ matrix.astype(np.float16).astype(np.float32), atol=1e-4)


def test_no_double_and_no_cast_like_is_left() -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx onnxscript onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    make, to_tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    third = to_tensor(np.array([1 / 3]))
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3]) for name in ("x", "y")
    ]
    nodes = [
        make("Constant", [], ["third"], value=third),
        make("Cast", ["x"], ["wide"], to=onnx.TensorProto.DOUBLE),
        make("Mul", ["wide", "third"], ["product"]),
        make("CastLike", ["product", "x"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "a third", ends[:1], ends[1:])
    export.simplify(graph)
    assert [node.op_type for node in graph.node] == ["Constant", "Cast", "Mul", "Cast"]
    assert export.DOUBLE not in [node.attribute[0].i for node in graph.node if node.attribute]

    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    x = np.arange(3, dtype=np.float32)
    (got,) = runtime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(got, x / 3, atol=1e-6)


# ---- what is refused ---------------------------------------------------------------------------------------


def weight_file(folder: Path, **metadata: object) -> Path:
    """A weight file that says what it is and holds next to nothing."""
    path = folder / "model.safetensors"
    weights.write_weights(path, {"nothing": torch.zeros(1)}, metadata)
    return path


def config(preset: str) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(dit.PRESETS[preset])))


@pytest.mark.parametrize(
    "metadata, says",
    [
        ({"preset": "small", "config": config("small")}, "is a model of small; a browser can run"),
        ({"config": config("micro")}, "is a model of another shape"),
        ({"config": config("tiny"), "encoding": "absolute"}, "trained with absolute cameras"),
        (
            {"model": {"expert": config("tiny"), "boundary": 0.9, "views": ["first"]}},
            "holds experts; the page runs one network",
        ),
    ],
)
def test_weights_that_the_page_cannot_run(metadata: dict, says: str, tmp_path: Path) -> None:
    file = weight_file(tmp_path, **metadata)
    with pytest.raises(ValueError, match=says):
        export.check_weights(str(file))


def test_a_folder_without_the_page(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="has no index.html; the page of this repository is: --web"
    ):
        export.main(["--web", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    present = export.importlib.util.find_spec

    def lacking(name: str) -> object:
        return None if name == "onnxscript" else present(name)

    monkeypatch.setattr(export.importlib.util, "find_spec", lacking)
    with pytest.raises(ValueError, match="onnx.* is not installed; type: pip install onnx onnxscr"):
        export.check_extra()


# ---- the whole way -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_shipped_weights_become_a_page(tmp_path: Path) -> None:
    for name in export.EXTRA:
        pytest.importorskip(name, reason="needs: pip install onnx onnxscript onnxruntime")
    page = tmp_path / "web"
    without = shutil.ignore_patterns("node_modules", "model")
    shutil.copytree(ROOT / "web", page, ignore=without)
    words = [sys.executable, str(ROOT / "export.py"), "--web", str(page)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1500)
    print(done.stdout)
    assert done.returncode == 0, done.stderr

    assert re.search(r"float16: at most [01] of 256 grey levels", done.stdout)
    size = float(re.search(r"A visitor downloads ([\d.]+) MB", done.stdout)[1])
    assert size < 30
    facts = json.loads((page / "model/facts.json").read_text())
    assert facts["format"] == export.FORMAT
    assert len(facts["starts"]) * np.prod(facts["latent"]) * 4 == len(
        (page / "model/starts.bin").read_bytes()
    )


def test_a_page_is_never_half_of_one_export_and_half_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.write(tmp_path, {"network.onnx": b"old", "facts.json": b"old"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = []

    def fills_up(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) > 1:
            raise OSError("no space left")
        return len(content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fills_up)
        with pytest.raises(OSError, match="no space left"):
            export.write(tmp_path, {"network.onnx": b"new", "facts.json": b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    export.write(tmp_path, {"network.onnx": b"new", "facts.json": b"new"})
    assert (tmp_path / "facts.json").read_bytes() == b"new" and len(before) == 2
