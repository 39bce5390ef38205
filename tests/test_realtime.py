"""A session: the same frames however they are made, bounded in memory, honest about its cost."""

import json
import math
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from walking import IMAGE, OPTIONS, actions, pixels, walk

import camera
import dit
import memory
import moe
import realtime
import world
from dit import DiT
from engine import actors, configs, parts, weights
from game import render
from game.scene import make_scene

GOLDEN = Path(__file__).parent / "golden"


def same(chunks: list[realtime.Chunk], right: list[realtime.Chunk]) -> None:
    assert len(chunks) == len(right)
    for a, b in zip(chunks, right, strict=True):
        assert torch.equal(a.frames, b.frames)


# ---- identity: one walk, many ways to make it --------------------------------------------------------------


def test_the_first_chunk_has_56_frames_and_later_ones_40(three: list[realtime.Chunk]) -> None:
    assert [tuple(c.frames.shape) for c in three] == [
        (56, 64, 64, 3),
        (40, 64, 64, 3),
        (40, 64, 64, 3),
    ]
    assert all(c.frames.dtype == torch.uint8 for c in three)
    assert all(c.frames.float().std() > 5 for c in three)
    assert [c.info["segment"] for c in three] == [0, 1, 2]
    assert [c.info["first_latent"] for c in three] == [1, 15, 25]
    assert [len(c.info["poses"]) for c in three] == [56, 40, 40]
    assert all(set(c.info["ms"]) == {"retrieve", "denoise", "decode"} for c in three)


def test_a_model_remembers_as_it_was_trained_to(
    session: realtime.Session, three: list[realtime.Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = three[2].info["memory"][-1]
    assert last["sink"] and last["latent"] == 1
    monkeypatch.setitem(session.denoiser.meta, "sink", False)
    session.reset(IMAGE)
    assert not any(pick["sink"] for pick in walk(session, 3)[2].info["memory"])

    # trained without: it is not shown any
    monkeypatch.setitem(session.denoiser.meta, "p_memory_off", 1.0)
    session.reset(IMAGE)
    chunk = walk(session, 3)[2]
    assert chunk.info["memory"] == [] and chunk.info["policy"] == "none"
    assert session.policy == "camera"


def test_the_same_seed_and_actions_give_the_same_frames(
    session: realtime.Session, three: list[realtime.Chunk]
) -> None:
    session.reset(IMAGE)
    same(walk(session, 2), three[:2])
    session.reset(IMAGE, seed=43)
    assert pixels(walk(session, 1)[0].frames, three[0].frames) > 10


@pytest.mark.parametrize("pool", [None, ThreadPoolExecutor(1)], ids=["one thread", "two threads"])
def test_async_frames_equal_sequential_frames_and_stay_in_order(
    session: realtime.Session,
    three: list[realtime.Chunk],
    pool: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "pool", pool)
    session.reset(IMAGE)
    for k in range(3):
        session.submit(*actions(session.frames_needed, k))
    chunks = [session.collect() for _ in range(3)]
    same(chunks, three)
    for chunk, right in zip(chunks, three, strict=True):
        assert chunk.info["segment"] == right.info["segment"]


def test_undo_gives_the_same_frames_again(
    session: realtime.Session, three: list[realtime.Chunk]
) -> None:
    session.reset(IMAGE)
    walk(session, 2)
    wrong = session.step(*actions(40, seed=99)).frames
    session.undo()
    assert pixels(wrong, three[2].frames) > 0
    same(walk(session, 1, 2), three[2:])
    session.undo()
    session.undo()
    same(walk(session, 2, 1), three[1:])


def test_a_restored_session_continues_exactly(
    session: realtime.Session, three: list[realtime.Chunk], tmp_path: Path
) -> None:
    session.reset(IMAGE)
    walk(session, 2)
    session.policy = "recent"
    session.save(tmp_path / "state.safetensors")
    session.policy = "camera"
    other = realtime.Session(OPTIONS)
    other.restore(tmp_path / "state.safetensors")
    assert other.policy == "recent"
    other.policy = "camera"
    assert torch.equal(walk(other, 1, 2)[0].frames, three[2].frames)
    weights.write_weights(tmp_path / "foreign.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="no saved session of preset micro"):
        other.restore(tmp_path / "foreign.safetensors")


def test_a_session_can_start_on_weights_of_a_folder(tmp_path: Path) -> None:
    nets, _ = parts.load_parts(OPTIONS, "dit")
    full = parts.random_part("encoder", OPTIONS)
    model = {
        "preset": "micro",
        "stage": "distill",
        "shift": 2.0,
        "encoding": "anchored",
        "model": vars(dit.PRESETS["micro"]),
    }
    weights.write_weights(tmp_path / "student.safetensors", nets["dit"].state_dict(), model)
    weights.write_weights(
        tmp_path / "vae.safetensors",
        full.state_dict(),
        weights.vae_metadata(full),
    )
    session = realtime.Session(replace(OPTIONS, weights=str(tmp_path)))
    assert session.denoiser.meta == {
        "encoding": "anchored",
        "shift": 2.0,
        "sink": True,
        "p_memory_off": 0.0,
        "method": "renoise",
        "new": "10",
    }
    session.reset(IMAGE)
    assert walk(session, 1)[0].frames.float().std() > 5
    with pytest.raises(ValueError, match="holds a micro model; add --preset micro"):
        parts.load_parts(replace(session.options, preset="tiny"), "dit")
    with pytest.raises(ValueError, match="no light75 decoder.*--stage lightvae"):
        realtime.Session(replace(OPTIONS, weights=str(tmp_path), decoder="light75"))


# ---- the camera of a player: in its eye or behind it -------------------------------------------------------


def test_the_third_person_sees_from_where_the_game_puts_its_camera() -> None:
    scene = make_scene(7, "plaza")
    n = 64
    g = torch.Generator().manual_seed(0)
    ground = len(scene.solid) * torch.rand(n, 2, generator=g, dtype=torch.float64)
    span = torch.tensor([50.0, 360.0])
    lowest = torch.tensor([-45.0, 0.0])
    turns = torch.rand(n, 2, generator=g, dtype=torch.float64) * span + lowest
    poses = torch.cat([ground[:, :1], torch.full((n, 1), -1.6), ground[:, 1:], turns], 1)
    right = torch.from_numpy(world.cameras(scene, poses.numpy(), "third"))

    # where no wall shortens the arm
    arm = right[:, :3, 3] - poses[:, :3] - torch.tensor([0, -0.15, 0])
    free = arm.norm(dim=1) > 2.799
    assert free.sum() > 10
    over = camera.over_the_shoulder(poses, render.MAX_PITCH)
    torch.testing.assert_close(over[free], right[free], rtol=0, atol=1e-5)
    lowest = camera.over_the_shoulder(poses.new_tensor([[0, -1.6, 0, -85, 0]]))
    assert lowest[0, 1, 2] == pytest.approx(math.sin(math.radians(85)))


def test_a_session_in_the_third_person_remembers_what_its_camera_saw(
    session: realtime.Session, three: list[realtime.Chunk], tmp_path: Path
) -> None:
    third = realtime.Session(replace(OPTIONS, view="third"))
    third.reset(IMAGE)
    chunk = walk(third, 1)[0]

    # one player, another camera
    assert chunk.info["poses"] == three[0].info["poses"]
    assert pixels(chunk.frames, three[0].frames) > 0
    latent = third.denoiser.bank.read(torch.tensor([3])).cameras[0, 0, -1].double()
    twelfth = chunk.info["poses"][11]  # latent 3 ends with frame 12
    pose = torch.tensor([twelfth], dtype=torch.float64)
    torch.testing.assert_close(latent, camera.over_the_shoulder(pose)[0], rtol=0, atol=1e-5)
    third.denoiser.camera = camera.pose_to_c2w  # whoever knows the walls brings its own
    third.reset(IMAGE)
    assert torch.equal(walk(third, 1)[0].frames, three[0].frames)
    third.save(tmp_path / "third.safetensors")
    with pytest.raises(
        ValueError,
        match="no saved session of preset micro in the first person; it says: micro, third person",
    ):
        session.restore(tmp_path / "third.safetensors")


def model_file(tmp_path: Path, **said: object) -> parts.Options:
    """A model whose file says this of its training."""
    options = replace(OPTIONS, weights=str(tmp_path / "model.safetensors"))
    about = {"preset": "micro", "model": vars(dit.PRESETS["micro"])} | said
    weights.write_weights(options.weights, moe.build("micro").state_dict(), about)
    return options


def experts_file(tmp_path: Path, **config: object) -> parts.Options:
    """Experts, by default of both views, and a VAE beside them."""
    experts = moe.build(moe.MoEConfig(dit.PRESETS["micro"], **config))
    options = replace(OPTIONS, weights=str(tmp_path / "model.safetensors"))
    about = {"preset": "micro", "stage": "moe", "model": asdict(experts.moe_config)}
    weights.write_weights(options.weights, experts.state_dict(), about)
    full = parts.random_part("encoder", OPTIONS)
    vae = tmp_path / "vae.safetensors"
    weights.write_weights(vae, full.state_dict(), weights.vae_metadata(full))
    return options


@pytest.mark.parametrize("asked, seen", [("first", {}), ("third", {"view": "third"})])
def test_who_has_seen_a_view_may_imagine_it(tmp_path: Path, asked: str, seen: dict) -> None:
    for said in (seen, {"view": "both"}):
        options = replace(model_file(tmp_path, **said), view=asked)
        assert parts.load_parts(options, "dit")[1]["method"] == "unipc"


def test_who_has_not_seen_it_is_refused(tmp_path: Path) -> None:
    message = (
        "^this model has not seen the third person; use --weights of experts: "
        "python train.py --stage moe, or --view first$"
    )
    for said in ({}, {"view": "first"}):
        third = replace(model_file(tmp_path, **said), view="third")
        with pytest.raises(ValueError, match=message):
            parts.load_parts(third, "dit")
    with pytest.raises(ValueError, match="has not seen the first person.*--view third"):
        parts.load_parts(model_file(tmp_path, view="third"), "dit")
    with pytest.raises(ValueError, match="view must be one of first, third, got 'fourth'"):
        parts.resolve(replace(OPTIONS, view="fourth"))


def test_experts_look_where_they_are_asked_and_play(tmp_path: Path) -> None:
    options = experts_file(tmp_path)
    nets, meta = parts.load_parts(replace(options, view="third"), "dit")
    assert nets["dit"].view == "third" and meta["method"] == "unipc"
    assert parts.load_parts(options, "dit")[0]["dit"].view == "first"

    # every expert keeps its own keys and values, guidance passes through
    third = realtime.Session(replace(options, view="third", guidance=2.0))
    third.reset(IMAGE)
    walk(third, 1)
    played = third.step(*actions(40, 2))
    assert played.info["keyboard"] == actions(40, 2)[0].tolist()
    assert played.frames.shape == (40, *IMAGE.shape) and played.info["memory"]

    options = experts_file(tmp_path, views=("first",))
    with pytest.raises(ValueError, match="no expert for view 'third'; this model has first"):
        parts.load_parts(replace(options, view="third"), "dit")


# ---- limit: nothing grows, nothing ends --------------------------------------------------------------------


def test_a_slow_decoder_blocks_the_queue_not_memory(
    session: realtime.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.reset(IMAGE)
    # as with a decoder on another device
    monkeypatch.setattr(session, "pool", ThreadPoolExecutor(1))
    gate = threading.Event()
    decode = session.decoder.decode

    def slowly(*args: object) -> tuple:
        gate.wait(20)
        return decode(*args)

    monkeypatch.setattr(session.decoder, "decode", slowly)
    for k in range(1 + realtime.QUEUE):  # one in work, QUEUE waiting
        session.submit(*actions(session.frames_needed, k))
    fourth = threading.Thread(target=lambda: session.submit(*actions(session.frames_needed, 3)))
    fourth.start()
    fourth.join(0.5)
    assert fourth.is_alive() and len(session.pending) == 1 + realtime.QUEUE
    gate.set()
    fourth.join(20)
    assert not fourth.is_alive()
    assert [session.collect().info["segment"] for _ in range(4)] == [0, 1, 2, 3]


def test_an_error_of_the_decoder_reaches_the_player(
    session: realtime.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.reset(IMAGE)
    monkeypatch.setattr(session.decoder, "decode", lambda *args: 1 / 0)
    session.submit(*actions(56))
    with pytest.raises(ZeroDivisionError):
        session.collect()


def test_latent_2048_is_not_a_wall_and_history_stays_short(session: realtime.Session) -> None:
    session.reset(IMAGE)
    walk(session, 1)
    d = session.denoiser
    rows = len(d.now.poses)
    d.now = d.now._replace(count=d.now.count + 4000, origin=d.now.origin + 16000, segment=400)
    chunk = walk(session, 2)[-1]
    assert chunk.info["first_latent"] == 4025 and chunk.frames.float().std() > 5
    assert len(d.now.poses) == len(d.now.keyboard) + 1 == rows <= 36


def test_short_segments_keep_four_past_latents() -> None:
    short = realtime.Session(replace(OPTIONS, new=2))
    short.reset(IMAGE)
    chunks = walk(short, 3)
    assert [len(c.frames) for c in chunks] == [56, 8, 8] and short.denoiser.now.past.shape[2] == 4
    assert [c.info["first_latent"] for c in chunks] == [1, 15, 17]
    assert len(chunks[2].info["memory"]) == 5


# ---- reference ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_segment_rollout_matches_official(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four released segments, from keys to latents.

    Tolerance: its diagonal step is 8.73 cm, ours 12.35/√2 = 8.733 cm.
    """
    g = load_file(GOLDEN / "rollout.safetensors")
    saved = load_file(GOLDEN / "dit.safetensors")
    said = json.loads((GOLDEN / "meta.json").read_text())["dit_config"]
    cfg = replace(
        configs.from_released(said | {"sigma_theta": 0.0}),
        text_dim=64,
        text_len=said.get("text_len", 16),
        timestep="integer",
    )
    model = DiT(cfg)
    model.load_state_dict(
        {
            n.removeprefix("weights."): t.float()
            for n, t in saved.items()
            if n.startswith("weights.")
        }
    )
    options = parts.Options(preset="5b", device="cpu", dtype="float32")
    d = actors.Denoiser(
        model.eval(), {"encoding": "released", "shift": 5.0, "method": "unipc"}, options
    )
    d.reset(g["image_latent"], g["context"], 0, (0.0, 0.0, 0.0, 0.0, 0.0))
    at = 0
    for k in range(4):
        n = 56 if k == 0 else 40
        monkeypatch.setattr(
            torch, "randn", lambda *a, k=k, n=n, **_: g[f"segment{k}.noise"][:, :, -n // 4 :]
        )
        x0, info = d.run(g["keyboard"][at : at + n], g["mouse"][at : at + n], "camera")
        monkeypatch.undo()
        at += n
        right = g[f"segment{k}.latents"][:, :, -n // 4 :]
        if k:
            assert [m["latent"] for m in info["memory"]] == g[
                f"segment{k}.memory_latents_idx"
            ].tolist()
        assert (x0 - right).norm() / right.norm() < 1e-3, f"segment {k}"


# ---- behaviour: memory policies, bad input, cost -----------------------------------------------------------


def test_memory_is_switched_live(session: realtime.Session) -> None:
    session.reset(IMAGE)
    walk(session, 2)
    picked, frames = {}, {}
    for session.policy in memory.POLICIES:
        chunk = walk(session, 1, 2)[0]
        picked[session.policy], frames[session.policy] = (
            [m["latent"] for m in chunk.info["memory"]],
            chunk.frames,
        )
        session.undo()
    session.policy = "camera"
    assert (
        picked["none"] == []
        and picked["camera"][-1] == 1
        and picked["recent"] == [20, 19, 18, 17, 16]
    )
    assert (
        len(set(picked["random"])) == 5 and max(picked["random"]) < 21
    )  # never the past window itself
    assert pixels(frames["none"], frames["camera"]) > 0


def test_pitch_stops_at_85_degrees(session: realtime.Session) -> None:
    session.reset(IMAGE, pose=(1.0, -1.6, 2.0, 0.0, 0.0))
    chunk = session.step(torch.zeros(56, 6), torch.tensor([0.2, 0.0]).repeat(56, 1))
    assert max(pose[3] for pose in chunk.info["poses"]) == 85.0 and chunk.info["poses"][-1][:3] == [
        1.0,
        -1.6,
        2.0,
    ]


def test_wrong_input_says_what_is_right(session: realtime.Session) -> None:
    fresh = realtime.Session(OPTIONS)
    with pytest.raises(ValueError, match="call reset"):
        fresh.step(*actions(56))
    with pytest.raises(
        ValueError, match=r"image must be \(64, 64, 3\) uint8 for preset micro, got \(32, 64, 3\)"
    ):
        session.reset(IMAGE[:32])
    session.reset(IMAGE)
    with pytest.raises(
        ValueError,
        match="segment 0 takes finite keyboard .56, 6. .* actions of the future belong to the next step",
    ):
        session.step(*actions(96))
    with pytest.raises(ValueError, match="finite"):
        session.step(torch.full((56, 6), float("nan")), torch.zeros(56, 2))
    with pytest.raises(ValueError, match="nothing to undo"):
        session.undo()
    with pytest.raises(ValueError, match="nothing to collect"):
        session.collect()
    session.submit(*actions(56))
    with pytest.raises(ValueError, match="1 segments were submitted and not collected"):
        session.save("nowhere.safetensors")
    session.collect()
    session.policy = "sometimes"
    with pytest.raises(ValueError, match="policy must be one of camera, recent, random, none"):
        session.submit(*actions(40))
    session.policy = "camera"


def test_impossible_options_fail_before_anything_is_allocated() -> None:
    with pytest.raises(ValueError, match="^5b needs a CUDA GPU; found CPU. Try --preset tiny.$"):
        realtime.Session(parts.Options(preset="5b", device="cpu"))
    with pytest.raises(ValueError, match="preset must be one of micro, tiny"):
        realtime.Session(parts.Options(preset="huge"))
    with pytest.raises(ValueError, match="new must be one of 10, 5, 2"):
        realtime.Session(replace(OPTIONS, new=3))
    with pytest.raises(
        ValueError, match="No model for preset micro.*train.py --stage base --preset micro.*--fake"
    ):
        realtime.Session(replace(OPTIONS, weights=""))
    with pytest.raises(
        ValueError, match="17 denoising ranks cannot work here: micro has 16 places"
    ):
        realtime.open_session(OPTIONS, 17)


def test_the_timing_of_a_segment_follows_the_formulas(session: realtime.Session) -> None:
    session.reset(IMAGE)
    t = realtime.time_segment(session, rounds=2, warmup=1)
    assert t["fps side by side"] == pytest.approx(40 / max(t["D"], t["V"])) and t[
        "fps in turn"
    ] == pytest.approx(40 / (t["D"] + t["V"]))
    assert t["mean"] == pytest.approx(0.5 + t["D"] + t["V"])  # frames come when all are decoded
    assert t["worst"] == pytest.approx(t["mean"] + 0.5)
    assert not session.pending


def test_a_picture_reaches_the_encoder_exactly_whatever_it_computes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the grey levels would move if bfloat16 did the arithmetic."""
    session = realtime.Session(replace(OPTIONS, dtype="bfloat16"))
    grey = torch.arange(64 * 64 * 3).remainder(256).byte().view(64, 64, 3)

    def stop(pixels: Tensor) -> None:
        raise InterruptedError(pixels)

    monkeypatch.setattr(session.nets["encoder"], "encode", stop)
    with pytest.raises(InterruptedError) as seen:
        session.reset(grey)
    (pixels,) = seen.value.args
    exact = grey.permute(2, 0, 1).double() / 127.5 - 1
    assert pixels.dtype == torch.bfloat16
    assert torch.equal(pixels[0, :, 0], exact.bfloat16())


@pytest.mark.slow
def test_hours_of_play_stay_within_bounded_memory() -> None:
    """Slow: 200 segments, 8,016 frames."""

    def resident() -> float:
        return (
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        )

    session = realtime.Session(replace(OPTIONS, bank=64))
    session.reset(IMAGE)
    walk(session, 20)
    before, rows = resident(), len(session.denoiser.now.poses)
    chunks = SimpleNamespace(last=None)
    for k in range(20, 200):
        chunks.last = session.step(*actions(40, k))
    assert resident() - before < 50 and len(session.denoiser.now.poses) == rows
    assert chunks.last.info["bank"] < 700 and chunks.last.frames.float().std() > 5


@pytest.mark.gpu
def test_a_gpu_session_plays_like_a_cpu_session() -> None:
    """Needs CUDA: same noise is not promised across devices, finite and lively frames are."""
    session = realtime.Session(replace(OPTIONS, device="cuda", dtype="bfloat16"))
    session.reset(IMAGE)
    chunks = walk(session, 2)
    assert all(c.frames.device.type == "cpu" and c.frames.float().std() > 5 for c in chunks)


# ---- short segments


def with_lengths(tmp_path: Path, lengths: str) -> parts.Options:
    """Weights that say which lengths of segments they were trained for."""
    torch.manual_seed(0)
    file = tmp_path / "base.safetensors"
    tensors = moe.build("micro").state_dict()
    config = asdict(dit.PRESETS["micro"])
    said = {"config": config, "stage": "base", "preset": "micro", "new": lengths}
    weights.write_weights(file, tensors, said)
    shutil.copy(parts.ROOT / "assets/tiny/vae.safetensors", tmp_path)
    return parts.Options("micro", str(file), device="cpu", dtype="float32", steps=1)


def test_weights_that_never_saw_short_segments_keep_ten_and_say_so(tmp_path, capsys) -> None:
    options = with_lengths(tmp_path, "10")
    session = realtime.Session(replace(options, new=2))
    assert session.options.new == 10
    assert "never saw segments of 2 new latents" in capsys.readouterr().out


def test_trained_short_segments_act_after_eight_frames(tmp_path, capsys) -> None:
    session = realtime.Session(replace(with_lengths(tmp_path, "10 5 2"), new=2))
    assert session.options.new == 2 and not capsys.readouterr().out
    session.reset(torch.zeros(64, 64, 3, dtype=torch.uint8))
    session.step(*realtime.walk_actions(session.frames_needed))
    assert session.frames_needed == 8
    assert session.step(*realtime.walk_actions(8)).frames.shape == (8, 64, 64, 3)


@pytest.mark.long
def test_a_live_player_gets_the_shortest_segments_that_are_made_fast_enough(tmp_path) -> None:
    session = realtime.Session(with_lengths(tmp_path, "10 5 2"))
    assert realtime.shortest_sustained(session, 1e-3) == 2  # anything keeps up with this
    assert realtime.shortest_sustained(session, 1e9) == 10  # nothing does with that


def test_a_length_that_nobody_trains_is_refused() -> None:
    with pytest.raises(ValueError, match="new must be one of 10, 5, 2, got 3"):
        parts.resolve(parts.Options("micro", "random", device="cpu", new=3))


# ---- the decoder -------------------------------------------------------------------------------------------


def test_a_decoder_that_draws_nothing_says_so(session: realtime.Session) -> None:
    network = parts.load_parts(OPTIONS, "decoder")[0]["decoder"]
    with torch.no_grad():
        next(network.decoder.parameters()).fill_(float("nan"))
    decoder = actors.Decoder(network, session.options)
    with pytest.raises(ValueError, match="not finite.*--dtype float32"):
        decoder.decode(torch.zeros(1, network.cfg.z_dim, 1, 8, 8))


def test_a_decoder_keeps_no_graph_in_whatever_thread_it_works(session: realtime.Session) -> None:
    network = parts.load_parts(OPTIONS, "decoder")[0]["decoder"].requires_grad_(True)
    decoder = actors.Decoder(network, session.options)
    with ThreadPoolExecutor(1) as pool:  # gradients are switched on and off per thread
        pool.submit(decoder.decode, torch.zeros(1, network.cfg.z_dim, 1, 8, 8)).result()
    assert decoder.state
    assert not any(x.requires_grad for x in decoder.state.values())


def test_old_states_of_a_decoder_leave_a_device_that_is_short_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = {0: torch.ones(10)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert actors.parked(state, "cuda")[0] is state[0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 2000))
    assert actors.parked(state, "cuda") is not state
    assert actors.parked(state, "cpu") is state and actors.parked(None, "cuda") is None


def test_guidance_subtracts_the_negative_prompt_of_the_preset(
    session: realtime.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dit.NEGATIVE_PROMPTS, "micro", "blurred, still image")
    session.reset(IMAGE)
    assert session.denoiser.null_text is None  # without guidance nothing is subtracted

    options = replace(session.options, guidance=5.0)
    guided = actors.Denoiser(session.nets["dit"], session.denoiser.meta, options)
    guided.start(session.denoiser.now)
    context = guided.plan(torch.zeros(56, 6), torch.zeros(56, 2), "none").context
    assert torch.equal(context.null().text[0], parts.embed(options, "blurred, still image"))
    assert not torch.equal(context.null().text[0], context.text[0])


def test_an_encoder_keeps_no_decoder_that_nobody_asks() -> None:
    """A gigabyte, at the released size."""
    encoder = parts.load_parts(OPTIONS, "encoder")[0]["encoder"]
    assert encoder.decoder is None and encoder.encoder is not None


def test_a_start_picture_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the grey levels would be others if 0..255 were divided in bfloat16."""
    session = realtime.Session(replace(OPTIONS, dtype="bfloat16"))
    encoder = session.nets["encoder"]
    encode = encoder.encode
    seen = []

    def watched(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return encode(pixels)

    monkeypatch.setattr(encoder, "encode", watched)
    grey = torch.arange(64 * 64).remainder(256).view(64, 64, 1).expand(64, 64, 3)
    session.reset(grey.byte())
    right = (grey.permute(2, 0, 1).float() / 127.5 - 1).bfloat16()
    assert torch.equal(seen[0][0, :, 0].bfloat16(), right)
