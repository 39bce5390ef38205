"""What weights.py promises."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import GOLDEN_CONFIG, make_context, shaken
from safetensors.torch import load_file, save_file

import dit
import flow
import moe
import released
import vae
from context import Memory, Window, segment_cameras
from engine import configs, parts, weights
from vae import PRESETS, VAE, pruned

GOLDEN = Path(__file__).parent / "golden"
MICRO = dit.PRESETS["micro"]


def released_folder(path, dtype=torch.float32, drop=(), **changes):
    """A checkpoint as published, small, made of the golden network's weights."""
    stored = load_file(GOLDEN / "dit.safetensors")
    tensors = {
        k.removeprefix("weights."): v.to(dtype)
        for k, v in stored.items()
        if k.startswith("weights.")
    }
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v for k, v in tensors.items() if k not in drop},
        path / "diffusion_pytorch_model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((GOLDEN / "meta.json").read_text())["dit_config"] | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


def run_folder(path, model, steps=("000500",), ema=None):
    """What train.py leaves behind."""
    for step in steps:
        folder = path / "ckpt" / step
        weights.write_weights(
            folder / "diffusion_pytorch_model.safetensors",
            model.state_dict(),
            {"model": asdict(model.cfg), "step": int(step)},
        )
        if ema is not None:
            weights.write_weights(
                folder / "ema.safetensors", ema.state_dict(), {"model": asdict(ema.cfg)}
            )
    (path / "latest").write_text(steps[-1])
    return path


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def diffusers_name(key: str) -> str:
    """Our name -> the name in MG-LightVAE.pth, written as a table of its own."""
    for new, old in {
        "downsamples.2.resample": "downsampler.resample",
        "downsamples.2.time_conv": "downsampler.time_conv",
        "upsamples.3.": "upsampler.",
    }.items():
        head, _, tail = key.partition(".downsamples." if "down" in new else ".upsamples.")
        if tail[1:].startswith("." + new):
            return f"{head}.{'down' if 'down' in new else 'up'}_blocks.{tail[0]}.{old}{tail[2 + len(new) :]}"
    p = key.split(".")
    inner = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}

    def block(rest: list[str]) -> str:
        return ".".join(
            [inner[rest[1]], *rest[2:]] if rest[0] == "residual" else ["conv_shortcut", *rest[1:]]
        )

    if p[0] in ("conv1", "conv2"):
        return f"{'quant_conv' if p[0] == 'conv1' else 'post_quant_conv'}.{p[1]}"
    if p[1] == "middle":
        where = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[p[2]]
        return f"{p[0]}.mid_block.{where}." + (".".join(p[3:]) if p[2] == "1" else block(p[3:]))
    if p[1] in ("downsamples", "upsamples"):
        return f"{p[0]}.{'down' if p[1][0] == 'd' else 'up'}_blocks.{p[2]}.resnets.{p[4]}." + block(
            p[5:]
        )
    return (
        f"{p[0]}."
        + {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}[".".join(p[1:-1])]
        + f".{p[-1]}"
    )


def test_experts_survive_a_checkpoint(experts, tmp_path):
    file = tmp_path / "experts.safetensors"
    weights.write_weights(file, experts.state_dict(), {"model": asdict(experts.moe_config)})
    loaded, _ = weights.load(file)
    assert (
        isinstance(loaded, moe.Experts)
        and loaded.moe_config == experts.moe_config
        and equal(loaded, experts)
    )


def test_experts_trained_apart_are_joined(tmp_path, scene):
    nets = {
        name: shaken(moe.build("micro"), seed)
        for seed, name in enumerate(("first", "low", "third"))
    }
    runs = {name: run_folder(tmp_path / name, net) for name, net in nets.items()}
    joined = weights.join(runs)
    assert set(joined.high) == {"first", "third"} and equal(joined.low, nets["low"])
    sigma = torch.tensor([0.95])
    assert torch.equal(
        joined.look("third")(scene.x, sigma, scene.context),
        nets["third"](scene.x, sigma, scene.context),
    )
    with pytest.raises(ValueError, match="a low one and at least one view"):
        weights.join({"first": runs["first"]})
    wider = run_folder(tmp_path / "wider", moe.build(replace(MICRO, ffn=32)))
    with pytest.raises(ValueError, match="one architecture"):
        weights.join({"first": runs["first"], "low": wider})


def test_weights_and_metadata_survive_a_round_trip(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.arange(5),
        "c": torch.randn(4, 6).t(),
        "d": torch.ones(2).bfloat16(),
    }
    said = {"model": {"dim": 3}, "step": 7, "note": "x0 → v", "list": [1, 2]}
    weights.write_weights(tmp_path / "deep" / "w.safetensors", tensors, said)
    found, metadata = weights.read_weights(tmp_path / "deep" / "w.safetensors")
    assert metadata == said and found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_a_failed_save_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    weights.write_weights(file, {"a": torch.zeros(3)})

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        weights.write_weights(file, {"a": torch.ones(3)})
    assert list(tmp_path.iterdir()) == [file] and weights.read_weights(file)[0]["a"].sum() == 0


def test_a_file_a_folder_and_a_run_open_the_same_model(tmp_path):
    model = shaken(moe.build("micro"))
    run = run_folder(tmp_path / "runs" / "x", model, ("000010", "000500"))
    checkpoint = run / "ckpt" / "000500"
    for path in (run, str(checkpoint), checkpoint / "diffusion_pytorch_model.safetensors"):
        loaded, meta = weights.load(path)
        assert (
            equal(loaded, model)
            and loaded.cfg == MICRO
            and meta["step"] == 500
            and not loaded.training
        )
    assert weights.find(run).parent.name == "000500"


def test_averaged_weights_are_preferred(tmp_path):
    model, ema = shaken(moe.build("micro")), shaken(moe.build("micro"), seed=1)
    assert equal(weights.load(run_folder(tmp_path, model, ema=ema))[0], ema)


def test_shards_make_one_model(tmp_path):
    folder = released_folder(tmp_path / "model")
    whole, _ = weights.load(folder, dtype=torch.float32)
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for i in range(3):
        shard = f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors"
        save_file({n: tensors[n] for n in names[i::3]}, folder / shard)
        index |= {n: shard for n in names[i::3]}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    assert equal(weights.load(folder, dtype=torch.float32)[0], whole)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ValueError, match="lacks 1 of 3 shards, diffusion_pytorch_model-00002-of-00003.safetensors"
    ):
        weights.load(folder)


def test_nested_and_flat_torch_files_open_without_running_code(tmp_path):
    tensors = {"conv1.weight": torch.randn(2, 2)}
    torch.save(tensors, tmp_path / "flat.pth")
    torch.save({"state_dict": {"gen_model": tensors, "step": 3}}, tmp_path / "nested.pth")
    for name in ("flat", "nested"):
        found, _ = weights.read_weights(tmp_path / f"{name}.pth")
        assert found.keys() == tensors.keys() and torch.equal(
            found["conv1.weight"], tensors["conv1.weight"]
        )
    torch.save({"a": SimpleNamespace()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="code.pth is damaged: .*(weights_only|Weights only)"):
        weights.read_weights(tmp_path / "code.pth")


def test_an_fp32_checkpoint_becomes_a_bf16_model_of_the_rounded_weights(tmp_path):
    model, _ = weights.load(released_folder(tmp_path), dtype=torch.bfloat16)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(t, stored[n].bfloat16()) for n, t in model.state_dict().items())
    context = dit.random_context(model.cfg, memory=2, past=1, new=3, size=4)
    x = torch.randn(1, 48, 3, 4, 4)
    assert model(x, torch.tensor([0.5]), context).isfinite().all()


def test_the_released_config_says_everything(tmp_path):
    model, _ = weights.load(released_folder(tmp_path))
    assert model.cfg == replace(GOLDEN_CONFIG, timestep="bf16", fp32_stream=True)
    published = {
        "_class_name": "WanModel",
        "dim": 3072,
        "ffn_dim": 14336,
        "num_heads": 24,
        "num_layers": 30,
        "freq_dim": 256,
        "in_dim": 48,
        "out_dim": 48,
        "text_len": 512,
        "eps": 1e-6,
        "sigma_theta": 0.8,
        "action_config": {
            "blocks": list(range(15)),
            "heads_num": 16,
            "hidden_size": 128,
            "mouse_hidden_dim": 1024,
            "mouse_qk_dim_list": [8, 28, 28],
            "windows_size": 3,
            "vae_time_compression_ratio": 4,
        },
    }
    assert configs.from_released(published) == dit.PRESETS["5b"]


def test_a_config_without_sigma_theta_is_warned_about(tmp_path):
    folder = released_folder(tmp_path)
    said = json.loads((folder / "config.json").read_text())
    del said["sigma_theta"]
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.warns(UserWarning, match="no sigma_theta: using 0.8"):
        assert weights.load(folder)[0].cfg.sigma_theta == 0.8


@torch.no_grad()
def test_a_released_folder_reproduces_the_golden_rollout(tmp_path):
    released_folder(tmp_path / "weights" / "base_distilled_model", timestep="integer")
    model, _ = weights.load(tmp_path / "weights", dtype=torch.float32)
    golden = load_file(GOLDEN / "rollout.safetensors")
    c2w = released.from_released(golden["extrinsics"])[None]
    history = golden["image_latent"]
    for k in range(4):
        first, last, n_past = Window().segment(k)
        frames = slice(4 * first - 3 if k else 0, 4 * last - 3)
        mouse, keyboard = (
            released.windows(golden[name][None, frames]) for name in ("mouse", "keyboard")
        )
        remembered = None
        if k:
            index = golden[f"segment{k}.memory_latents_idx"][None]
            seen = torch.stack([segment_cameras(c2w, int(i), 1)[:, 0] for i in index[0]], 1)
            remembered = Memory(history[:, :, index[0]], index, seen)
        context = make_context(
            history[:, :, first : first + n_past],
            torch.arange(first, last)[None],
            segment_cameras(c2w, first, last - first),
            mouse,
            keyboard,
            golden["context"][None],
            remembered,
            encoding="released",
            stride=16,
        )
        noise = golden[f"segment{k}.noise"][:, :, n_past:]
        x0 = flow.sample(model, context, golden["sigmas"], noise, "unipc")
        history = torch.cat([history, x0], 2)
        wanted = golden[f"segment{k}.latents"]
        assert (history[:, :, -wanted.shape[2] :] - wanted).norm() / wanted.norm() < 5e-6, (
            f"segment {k}"
        )


def test_wan_weights_start_a_model_whose_cameras_and_actions_are_fresh(tmp_path):
    model = shaken(moe.build("micro"))
    wan = {n: t for n, t in model.state_dict().items() if not configs.is_new(n)}
    weights.write_weights(tmp_path / "wan" / "diffusion_pytorch_model.safetensors", wan)
    started, fresh = weights.start_from(tmp_path / "wan", "micro")
    assert fresh and all(map(configs.is_new, fresh))
    assert all(torch.equal(started.state_dict()[n], t) for n, t in wan.items())
    same, fresh = weights.start_from(run_folder(tmp_path / "run", model), "micro", torch.bfloat16)
    assert not fresh and next(same.parameters()).dtype == torch.bfloat16


def test_missing_weights_name_the_command_that_gets_them(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(ValueError) as error:
            weights.load(path)
        assert str(error.value) == (
            f"No weights at {path} (looked for base_distilled_model/config.json). Get them (~41 GB):\n"
            "  hf download Skywork/Matrix-Game-3.0 --local-dir weights/matrix-game-3 \\\n"
            '    --include "base_distilled_model/*" "MG-LightVAE_v2.pth" "Wan2.2_VAE.pth"'
            ' "models_t5*" "google/*"\n'
            "or play without weights: python play.py --fake"
        )


def test_a_folder_of_two_models_asks_for_one(tmp_path):
    for name in ("base_model", "base_distilled_model"):
        released_folder(tmp_path / name)
    torch.save({}, tmp_path / "Wan2.2_VAE.pth")
    with pytest.raises(
        ValueError,
        match=" is a folder that holds 2 models: "
        "base_distilled_model, base_model. Pass one of them.",
    ):
        weights.load(tmp_path)
    shutil.rmtree(tmp_path / "base_model")
    assert weights.load(tmp_path)[0].cfg.layers == 2  # one model beside a VAE file is no question


def test_of_the_released_folder_the_student_plays(tmp_path):
    for name in ("base_model", "base_distilled_model"):
        released_folder(tmp_path / name)
    assert parts.model_of(tmp_path) == tmp_path / "base_distilled_model"
    assert parts.model_of(tmp_path / "base_model") == tmp_path / "base_model"


def test_a_file_that_is_no_weight_file_is_refused(tmp_path):
    (tmp_path / "start.png").write_bytes(b"x")
    with pytest.raises(
        ValueError, match="is no weight file; pass a folder or a file in .safetensors"
    ):
        weights.load(tmp_path / "start.png")


def test_a_mistyped_run_is_answered_with_the_runs_there_are(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "latest").write_text("000001")
    with pytest.raises(ValueError, match=r"no run .*mien; runs with weights: mine\. .*--run mien"):
        weights.find(tmp_path / "runs" / "mien")


def test_a_run_without_a_checkpoint_says_how_to_make_one(tmp_path):
    (tmp_path / "demo" / "ckpt").mkdir(parents=True)
    with pytest.raises(ValueError, match="python train.py --stage base --run demo"):
        weights.load(tmp_path / "demo")
    (tmp_path / "demo" / "latest").write_text("000500")  # its folder was deleted
    with pytest.raises(ValueError, match="run without a checkpoint"):
        weights.load(tmp_path / "demo")


def test_plain_wan_weights_are_recognised(tmp_path):
    new = [n for n in moe.build("micro", "meta").state_dict() if configs.is_new(n)]
    stored = load_file(GOLDEN / "dit.safetensors")
    drop = {k.removeprefix("weights.") for k in stored if configs.is_new(k)}
    with pytest.raises(ValueError) as error:
        weights.load(released_folder(tmp_path, drop=drop))
    text = str(error.value)
    assert (
        new
        and f"diffusion_pytorch_model.safetensors is not a Matrix-Game 3 DiT: {len(drop)} missing ("
        in text
    )
    assert "0 unexpected." in text
    assert text.endswith("It looks like plain Wan2.2-TI2V-5B: use it with train.py --init.")


def test_other_keys_are_counted_and_shown(tmp_path):
    folder = released_folder(tmp_path, drop={"head.head.bias", "blocks.0.norm3.weight"})
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(tensors | {"ghost": torch.ones(1)}, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        ValueError, match=r"2 missing \(blocks.0.norm3.weight, …\), 1 unexpected \(ghost\)\.$"
    ):
        weights.load(folder)


def test_a_quantised_file_says_where_it_belongs(tmp_path):
    model = moe.build("micro")
    tensors = {n: t for n, t in model.state_dict().items() if n != "blocks.0.self_attn.q.weight"}
    tensors["blocks.0.self_attn.q.weight_int8"] = torch.ones(2, dtype=torch.int8)
    weights.write_weights(tmp_path / "q.safetensors", tensors, {"model": asdict(model.cfg)})
    with pytest.raises(ValueError, match="It is quantised: load the float weights"):
        weights.load(tmp_path / "q.safetensors")


def test_a_config_of_another_size_names_the_tensor(tmp_path):
    folder = released_folder(tmp_path, ffn_dim=256)
    with pytest.raises(
        ValueError,
        match=r"does not fit its config: blocks.0.ffn.0.weight is \(128, 64\), "
        r"the config needs \(256, 64\)",
    ):
        weights.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 300, -10])
def test_a_cut_download_is_recognised(tmp_path, keep):
    folder = released_folder(tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    if keep == -10:
        with pytest.raises(
            ValueError,
            match=r"is 2.7 MB, header says 2.7 MB: download was cut. "
            r"Re-run the same hf download; it resumes.",
        ):
            weights.load(folder)
    else:
        with pytest.raises(ValueError, match="download was cut"):
            weights.load(folder)


def test_a_cut_torch_file_is_recognised(tmp_path):
    torch.save({"a": torch.randn(1000)}, tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:1000])
    with pytest.raises(ValueError, match="no readable torch file .* download was cut"):
        weights.read_weights(tmp_path / "w.pth")


def test_a_file_without_a_config_is_never_guessed(tmp_path):
    weights.write_weights(tmp_path / "w.safetensors", moe.build("micro").state_dict())
    with pytest.raises(ValueError, match="does not say what it is"):
        weights.load(tmp_path)
    weights.write_weights(
        tmp_path / "w.safetensors", {"a": torch.ones(1)}, {"model": asdict(MICRO) | {"wings": 2}}
    )
    with pytest.raises(ValueError, match="unknown fields wings"):
        weights.load(tmp_path)


def test_the_released_light_vae_loads_by_its_own_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VAE(pruned(replace(PRESETS["wan2.2"], dim=8, dec_dim=8), 0.5, encoder=True))
    named = {diffusers_name(k): v for k, v in model.state_dict().items()}
    assert (
        "decoder.up_blocks.0.upsampler.time_conv.weight" in named
        and "encoder.mid_block.resnets.1.norm1.gamma" in named
    )
    named["dynamic_feature_projection_heads.up_block_1.weight"] = torch.zeros(1)
    named["dynamic_feature_projection_heads.up_block_1.bias"] = torch.zeros(1)
    assert len(named) == 198
    for tensors in ({"state_dict": {"gen_model": named}, "step": 3}, named, model.state_dict()):
        torch.save(tensors, tmp_path / "light.pth")
        back = weights.load_vae(tmp_path / "light.pth")
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items())
        assert back.cfg == model.cfg and torch.equal(back.latent_std, torch.tensor(vae.WAN_STD))


# ---- damaged files -----------------------------------------------------------------------------------------


def micro_file(folder: Path) -> Path:
    model = moe.build("micro")
    file = folder / "w.safetensors"
    weights.write_weights(file, model.state_dict(), {"model": asdict(model.cfg), "step": 1})
    return file


def with_header(file: Path, header: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[1, 2]",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"a": 3}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"data_offsets": ["x", "y"]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
        b'{"__metadata__": 5}',
    ],
)
def test_a_damaged_header_is_one_line_that_names_the_file(tmp_path, header):
    file = tmp_path / "w.safetensors"
    with_header(file, header)
    with pytest.raises(ValueError, match="w.safetensors is damaged: ") as error:
        weights.load(file)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"\xff\xfe",
        b"[" * 50_000,
        b"[1]",
        b"7",
        b'{"model": [1]}',
        b'{"expert": 3}',
        b'{"expert": {}, "boundary": "x", "views": []}',
        b'{"dim": "wide"}',
        b'{"dim": -4}',
        b'{"dim": 1e99}',
        b'{"dim": 100000000000}',
        b'{"layers": 1000000000}',
        b'{"heads": 0}',
        b'{"action_blocks": 5}',
        b'{"patch": [1, 0, 0]}',
        b'{"num_heads": 2, "action_config": 3}',
        b'{"num_heads": 2, "sigma_theta": 0.8, "action_config": {"blocks": [0]}}',
    ],
)
def test_a_damaged_config_is_one_line_that_names_the_file(tmp_path, text):
    weights.write_weights(tmp_path / "w.safetensors", {"a": torch.ones(1)})
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"(config.json|w.safetensors) is ") as error:
        weights.load(tmp_path / "w.safetensors")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_one_line_that_names_the_file(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match="model.safetensors.index.json is damaged: "):
        weights.load(tmp_path)


def test_a_torch_file_that_holds_no_tensors_by_name_is_damaged(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)) * 4)
    for name in ("list", "noise"):
        with pytest.raises(ValueError, match=f"{name}.pth is (damaged|no readable torch file)"):
            weights.read_weights(tmp_path / f"{name}.pth")


def test_a_damaged_vae_is_one_line_that_names_the_file(tmp_path):
    file = tmp_path / "vae.safetensors"
    for config in ({"wings": 2}, {"dim": "wide"}, [1], {"dim_mult": 3}, {"res_blocks": 10**9}):
        weights.write_weights(file, {"a": torch.ones(1)}, {"vae": config})
        with pytest.raises(ValueError, match="vae.safetensors is damaged: "):
            weights.load_vae(file)


def test_whatever_bytes_are_flipped_a_file_opens_or_is_refused(tmp_path):
    file = micro_file(tmp_path)
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    g = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        place = int(torch.randint(header, (), generator=g))
        bad[place] = int(torch.randint(256, (), generator=g))
        file.write_bytes(bad)
        try:
            weights.load(file)
        except ValueError:
            refused += 1
    assert refused > 30


def test_the_same_content_is_the_same_file(tmp_path):
    said = {f"key {i}": {"value": i, "text": "σ → é \n"} for i in range(12)}
    tensors = {"b": torch.ones(3), "a": torch.zeros(2).bfloat16()}
    files = []
    for i in range(4):
        weights.write_weights(tmp_path / f"{i}.safetensors", tensors, said)
        files.append((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(set(files)) == 1
    found, metadata = weights.read_weights(tmp_path / "0.safetensors")
    assert metadata == said and torch.equal(found["b"], tensors["b"])


# ---- what a seeded hand found (tests/test_fuzz.py)


def test_weights_that_are_no_floats_are_refused(tmp_path):
    file = micro_file(tmp_path)
    tensors, said = weights.read_weights(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name].view(torch.int32)
    weights.write_weights(file, tensors, said)
    with pytest.raises(ValueError, match=f"{file.name} is damaged: {name} is torch.int32"):
        weights.load(file)


def test_an_index_names_files_of_its_folder_alone(tmp_path):
    file = tmp_path / "model.safetensors.index.json"
    save_file({"a": torch.ones(1)}, tmp_path.parent / "other.safetensors")
    file.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(
        ValueError, match="index.json is damaged: '../other.safetensors' is no file"
    ):
        weights.read_weights(tmp_path)


def test_a_refusal_is_one_line_that_a_terminal_can_show(tmp_path):
    file = micro_file(tmp_path)
    odd = "\n\x1b[2J" * 200
    weights.write_weights(file, {odd: torch.ones(1)}, weights.read_weights(file)[1])
    with pytest.raises(ValueError, match="is not a Matrix-Game 3 DiT") as refused:
        weights.load(file)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400


def test_who_loads_a_model_does_not_wait_for_the_compiler() -> None:
    code = """if True:
        import sys, torch, play
        from engine import parts
        options = parts.resolve(parts.Options("tiny", "assets/tiny", device="cpu"))
        parts.load_parts(options, "dit", "encoder", "decoder")
        print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=GOLDEN.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", "it takes seconds to load"


def test_a_file_is_for_whom_the_umask_says(tmp_path):
    weights.write_weights(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    (tmp_path / "b").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
