"""evaluate.py as a specification: closed forms and fakes for every metric, claims as data, tables from the json alone."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import attention
import camera
import dit
import evaluate
import memory
import moe
import realtime
import world
from dataset import episode
from game import render, scene
from lab import bench, metrics, report, truth
from lab.claims import CLAIMS, GAPS, OPPOSITE, OUT, PLACES, judge

TEST = scene.SPLITS["test"].start


@pytest.fixture(scope="module")
def look() -> tuple:
    script = evaluate.place(TEST, "l:12 w:4")
    return script, *evaluate.draw(script)


def arguments(out: Path, **more: object) -> argparse.Namespace:
    said = {
        "full": False,
        "final": False,
        "tune": False,
        "worlds": 2,
        "weights": str(out / "none"),
        "out": str(out),
    }
    return argparse.Namespace(**said | more)


# ---- images ----------------------------------------------------------------------------------------------------------


def test_identical_frames_score_perfectly(look: tuple) -> None:
    frames = look[1][:3]
    best = {"psnr": 50.0, "ssim": 1.0, "gmsd": 0.0, "haarpsi": 1.0, "zncc": 1.0}
    for name, metric in metrics.METRICS.items():
        assert torch.allclose(
            metric(frames, frames).float(), torch.tensor(best[name]), atol=1e-3
        ), name
    assert all(
        float(metrics.sharpness(x[None], x[None])) == pytest.approx(1, abs=1e-5) for x in frames
    )
    assert float(metrics.sharpness(frames, frames).mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_every_metric_ranks_truth_above_a_turn_above_another_world(name: str, look: tuple) -> None:
    script, frames = look[:2]
    turned = evaluate.shoot(script.scene, script.poses[12:16].numpy() + [0, 0, 0, 0, 2.0])[0]
    other = evaluate.draw(evaluate.place(TEST + 1, "l:12 w:4"), slice(12, 16))[0]
    near, far = (
        metrics.BETTER[name] * float(metrics.METRICS[name](x, frames[12:16]).mean())
        for x in (turned, other)
    )
    assert (
        metrics.BETTER[name] * float(metrics.METRICS[name](frames[12:16], frames[12:16]).mean())
        > near
        > far
    )


def test_psnr_of_a_constant_error_is_its_closed_form() -> None:
    grey = torch.full((1, 64, 64, 3), 0.5)
    assert float(episode.psnr(grey + 0.1, grey)) == pytest.approx(20.0, abs=1e-4)


def test_blur_lowers_sharpness_and_noise_raises_it(look: tuple) -> None:
    true = torch.from_numpy(look[1][:2]) / 255
    soft = torch.nn.functional.avg_pool2d(
        true.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False
    ).permute(0, 2, 3, 1)
    each = lambda pred: [
        float(metrics.sharpness(a[None], b[None])) for a, b in zip(pred, true, strict=True)
    ]
    assert max(each(soft)) < 0.9
    assert min(each(true + 0.1 * torch.randn_like(true))) > 1.5
    bare = torch.cat([true, torch.full_like(true, 0.5)])
    assert float(metrics.sharpness(bare + 0.01 * torch.randn_like(bare), bare).mean()) < 1.2, (
        "noise on a bare wall decides nothing"
    )


# ---- distributions ---------------------------------------------------------------------------------------------------


def test_pixel_features_tell_a_blurred_set_from_the_truth(look: tuple) -> None:
    frames = torch.from_numpy(look[1]) / 255
    features = metrics.pixel_pca(frames)
    assert features(frames).shape == (17, 2)  # no more axes than an eighth of the frames
    assert (
        metrics.frechet(features(1 - frames), features(frames))
        > 10 * abs(metrics.frechet(features(frames), features(frames))) + 0.1
    )


# ---- geometry --------------------------------------------------------------------------------------------------------


def test_a_view_sees_itself_and_nothing_behind_its_back(look: tuple) -> None:
    script, _, depth, c2w = look
    assert truth.visible(depth[:1], c2w[:1], depth[:1], c2w[:1]).float().mean() > 0.99
    back = evaluate.shoot(script.scene, script.poses[:1].numpy() + [0, 0, 0, 0, 180.0])
    assert not truth.visible(depth[:1], c2w[:1], back[1], back[2]).any()


def test_seen_pixels_have_the_colour_they_had(look: tuple) -> None:
    script, frames, depth, c2w = look
    seen = truth.visible(depth[12:13], c2w[12:13], depth[:1], c2w[:1])[0, 0].numpy()
    assert 0.5 < seen.mean() < 0.95  # 18 degrees further right: a part is new
    columns = np.flatnonzero(~seen.any(0))
    assert len(columns) and columns.min() > 32  # and it lies on the right


def test_registration_finds_where_clean_frames_were_taken() -> None:
    errors = []
    for seed in (TEST, TEST + 1, TEST + 2):
        script = evaluate.place(seed, "l:12 w:4")
        found = evaluate.register(
            script.scene,
            evaluate.draw(script, [12])[0][0],
            script.poses[12].numpy() + np.array([0.1, 0, -0.1, 0, 6.0]),
        )
        assert found.score > 0.99
        errors.append(np.abs(found.pose - script.poses[12].numpy()))
    x, _, z, _, yaw = np.transpose(errors)
    assert np.median(yaw) < 0.25 and np.median(np.hypot(x, z)) < 0.01


def test_the_oracle_warp_is_exact_where_it_stands_and_better_than_a_copy_elsewhere(
    look: tuple,
) -> None:
    script, frames, depth, c2w = look
    shown, old, now = torch.from_numpy(frames) / 255, np.arange(0, 9), np.arange(14, 17)
    assert (
        episode.psnr(
            truth.warp(depth[:2], c2w[:2], shown[:2], depth[:2], c2w[:2]), frames[:2]
        ).min()
        > 45
    )
    warped = truth.warp(depth[now], c2w[now], shown[old], depth[old], c2w[old])
    nearest = memory.overlap(torch.from_numpy(c2w[now]), torch.from_numpy(c2w[old])).argmax(1)
    seen = truth.visible(depth[now], c2w[now], depth[old], c2w[old]).any(1)
    assert (
        episode.psnr(warped, frames[now], seen)
        > episode.psnr(shown[nearest], frames[now], seen) + 5
    ).all()
    assert torch.equal(
        warped[~seen], shown[nearest][~seen]
    )  # what nobody saw is the old frame as it is


# ---- paths -----------------------------------------------------------------------------------------------------------


def test_scripts_are_free_of_contact_and_come_back() -> None:
    for name, offset in PLACES.items():
        script = evaluate.revisit(TEST + 2, offset)
        game = world.World(script.scene, pose=script.poses[0].tolist())
        assert not any(
            game.move(k, m)
            for k, m in zip(script.keyboard.tolist(), script.mouse.tolist(), strict=True)
        )
        apart = script.poses[-1] - script.poses[0]
        assert float(apart[[0, 2]].norm()) == pytest.approx(offset, abs=0.07), name
        assert float(apart[4]) == pytest.approx(360, abs=1e-3)


def test_an_undone_plan_leads_home_frame_by_frame() -> None:
    plan = "l2:40 w:4 -:12 a:4"
    poses = camera.integrate(
        (1, -1.6, 2, 0, 30), *evaluate.chords(f"{plan} {evaluate.undone(plan)}")
    )
    assert torch.allclose(poses, poses.flip(0), atol=1e-5) and float(
        (poses[60] - poses[0])[4]
    ) == pytest.approx(120, abs=1e-3)


def test_a_number_after_a_turn_multiplies_it() -> None:
    keyboard, mouse = evaluate.chords("j2.5:2 w:1 -:1")
    assert mouse[:, 1].tolist() == pytest.approx([-0.25, -0.25, 0, 0]) and keyboard[
        :, 0
    ].tolist() == [0, 0, 1, 0]
    assert evaluate.chords("")[0].shape == (0, 6)


def test_in_third_person_the_player_stands_in_the_picture() -> None:
    script = evaluate.place(TEST, "l:12 w:4", view="third")
    frames, depth, c2w = evaluate.draw(script, [0])
    bare = render.render(script.scene, c2w, camera.intrinsics(64, 64).numpy(), 64, 64)
    changed = (bare[0] != frames).any(-1)[0]
    assert 0.01 < changed.mean() < 0.5 and not np.allclose(c2w[0, :3, 3], script.poses[0, :3])
    assert (depth[0][changed] < 4).mean() > 0.8  # an arm's length away


def test_the_three_lists_of_worlds_are_disjoint() -> None:
    lists = [set(seeds) for seeds in scene.SPLITS.values()]
    assert set(scene.SPLITS) == {"train", "tune", "test", "final"} and sum(map(len, lists)) == len(
        set.union(*lists)
    )


# ---- there and back, opposite keys: a renderer in place of the model --------------------------------------------------


def perfect(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    """Latents are poses and decoding is rendering; frozen: every frame is that of the last true one."""

    def dream(
        p: object,
        script: evaluate.Script,
        z: object,
        segments: int,
        policy: str = "camera",
        actions: tuple | None = None,
    ) -> tuple:
        poses = (
            camera.integrate(script.poses[script.known - 1], *actions)
            if actions
            else script.poses[script.known - 1 :]
        )
        return (poses[:1] if frozen else poses[1:]).expand(len(poses) - 1, 5)[None], {}

    def render(p: object, poses: torch.Tensor, last: int) -> torch.Tensor:
        return torch.stack(
            [
                torch.from_numpy(evaluate.shoot(evaluate.scene(TEST), x.numpy())[0]) / 255
                for x in poses
            ]
        )

    monkeypatch.setattr(
        evaluate, "opened", lambda p, script, frames=None: (script, evaluate.draw(script)[0], None)
    )
    monkeypatch.setattr(evaluate, "rollout", dream)
    monkeypatch.setattr(evaluate, "decode", render)


def fresh_run(out: Path) -> evaluate.Run:
    return evaluate.Run([TEST], False, "none", out, {}, {}, [], {})


@pytest.mark.parametrize("out, gaps", [(out, GAPS[:n]) for out, n in zip(OUT, (3, 5), strict=True)])
def test_there_and_back_rewards_a_return_and_not_a_standstill(
    out: str, gaps: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = {}
    for frozen in (False, True):
        perfect(monkeypatch, frozen)
        evaluate.palindrome(run := fresh_run(tmp_path), None, TEST, out)
        row = f"palindrome{OUT[out]} from one frame, camera/"
        score[frozen] = {k.removeprefix(row): v[0] for k, v in run.raw.items() if k.startswith(row)}
    assert {key for key in score[False] if "apart" in key} == {f"{gap} W apart, dB" for gap in gaps}
    assert min(score[False][f"{gap} W apart, dB"] for gap in gaps) > 45 and score[False][
        "travelled / commanded"
    ] == pytest.approx(1, abs=0.05)
    assert score[False]["m"] < 0.02 and score[False]["deg"] < 0.5 and not score[False]["lost"]
    assert (
        max(score[True][f"{gap} W apart, dB"] for gap in (1, 2)) < 30
        and abs(score[True]["travelled / commanded"]) < 0.1
    )


def test_opposite_keys_count_only_if_both_act(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for frozen in (False, True):
        perfect(monkeypatch, frozen)
        evaluate.opposites(run := fresh_run(tmp_path), None, TEST)
        assert set(sum(run.raw.values(), [])) == {float(not frozen)} and len(run.raw) == len(
            OPPOSITE
        )
    asked = np.array([[0.0, 0.37], [0.0, -0.37]])
    assert metrics.answered(0.5 * asked, asked, 0.1) and not metrics.answered(
        0.2 * asked, asked, 0.1
    )
    assert not metrics.answered(asked[[0, 0]], asked, 0.1)  # always forward is no answer to "back"


# ---- claims and reports ----------------------------------------------------------------------------------------------


def test_an_unmeasured_cell_says_not_measured(tmp_path: Path) -> None:
    result = evaluate.measure("drift", arguments(tmp_path))
    assert {c["verdict"] for c in result["claims"]} == {"not measured"}
    assert "not measured" in report.claim_table(
        result
    ) and "python train.py --stage base" in report.claim_table(result)


def test_predictions_are_stored_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(run: evaluate.Run) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setitem(evaluate.COMMANDS, "memory", dies)
    with pytest.raises(RuntimeError):
        evaluate.measure("memory", arguments(tmp_path))
    stored = json.loads((tmp_path / "memory.json").read_text())
    assert stored["raw"] == {} and any(
        c["predicted"] == ">= 6" and c["verdict"] == "not measured" for c in stored["claims"]
    )


def test_one_formula_gives_25_79_fps_from_1_551_s_and_905_tf() -> None:
    released = bench.segment_flops(realtime.Options(preset="5b"))[1]
    assert round(40 / 1.551, 2) == 25.79 and released / 1e12 == pytest.approx(905.5, abs=0.3)


def test_retrieval_is_measured_without_a_model_and_the_oracle_is_1(tmp_path: Path) -> None:
    result = evaluate.measure("retrieval", arguments(tmp_path, worlds=1))
    assert np.allclose(result["raw"]["greedy oracle/coverage@5"], 1)
    assert all(
        0 <= v <= 1.3 for k, x in result["raw"].items() if k.endswith("coverage@5") for v in x
    )
    assert len(result["raw"]["recent/coverage@5"]) == 1 and result["raw"]["camera, uniform/ms"]


def test_tables_are_rebuilt_from_the_json_alone_and_name_hardware_and_command(
    tmp_path: Path,
) -> None:
    out, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text(
        "# x\n<!-- table:moe -->\nold\n<!-- /table -->\nkept\n<!-- table:rope:raw -->\n<!-- /table -->\n"
    )
    evaluate.measure("moe", arguments(out))
    report.report(out, readme, tmp_path / "figures")
    first = readme.read_text()
    assert (
        "old" not in first
        and "kept" in first
        and "`python evaluate.py moe --quick --worlds " in first
        and "cores" in first
    )
    assert "<!-- table:rope:raw -->\nnot measured\n<!-- /table -->" in first
    evaluate.measure(
        "moe", arguments(out, final=True)
    )  # the last worlds have a folder of their own
    assert (out / "final/moe.json").exists() and "final" in json.loads(
        (out / "final/moe.json").read_text()
    )["command"]
    readme.write_text(first + "<!-- table:final-moe -->\n<!-- /table -->\n")
    report.report(out, readme, tmp_path / "figures")
    assert "2 final worlds" in readme.read_text() and "2 test worlds" in readme.read_text()
    readme.write_text(first)
    report.report(out, readme, tmp_path / "figures")
    assert readme.read_text() == first


def test_nothing_is_reported_while_a_metric_ranks_fakes_wrongly(tmp_path: Path) -> None:
    evaluate.measure("retrieval", arguments(tmp_path, worlds=1))
    for fair in (1.0, 0.0):
        (tmp_path / "sanity.json").write_text(
            json.dumps(
                json.loads((tmp_path / "retrieval.json").read_text())
                | {
                    "claims": [],
                    "raw": {
                        f"ranks fakes as expected/{m}": [1.0 if m != "ssim" else fair]
                        for m in metrics.BETTER
                    },
                }
            )
        )
        if fair:
            report.report(tmp_path, tmp_path / "none.md", tmp_path / "figures")
    with pytest.raises(ValueError, match="ssim: ranks fakes wrongly"):
        report.report(tmp_path, tmp_path / "none.md", tmp_path / "figures")


def test_figures_are_drawn_from_the_json_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    evaluate.measure("retrieval", arguments(tmp_path, worlds=1))
    rows = [
        [f"{name}: {ms} ms, IQR 1; times faster", None, None, 1.0, None]
        for name, ms in (("whole", 100.0), ("slower", 120.0), ("fast", 60.0))
    ]
    (tmp_path / "bench-tiny-ladder.json").write_text(json.dumps({"rows": rows, "table": ["x"]}))
    report.report(tmp_path, tmp_path / "none.md", tmp_path / "figures")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "figures").glob("*.png")}
    assert {"retrieval.png", "ladder.png"} <= set(sizes) and max(sizes.values()) < 200_000


def test_arms_are_compared_by_seed_with_a_t_interval(tmp_path: Path) -> None:
    slopes = {
        "none-1": -1.0,
        "none-2": -2.0,
        "none-3": -3.0,
        "both-1": -0.9,
        "both-2": -1.7,
        "both-3": -2.5,
    }
    for name, slope in slopes.items():
        (tmp_path / "buffer" / name).mkdir(parents=True)
        claim = judge(CLAIMS["drift"][0], {"in place, camera/dB per 100 frames": [slope]})
        said = dict.fromkeys(("command", "split", "machine", "date", "threads"), "x") | {
            "claims": [claim],
            "worlds": [1],
            "versions": {"torch": "t"},
        }
        (tmp_path / "buffer" / name / "drift.json").write_text(json.dumps(said))
    header, _, none, both, *_ = report.contrast(tmp_path / "buffer", "none")["table"]
    assert "each seed" in header and none.endswith("| -1, -2, -3 | -2 | - |")
    assert both.endswith(
        "| -0.9, -1.7, -2.5 | -1.7 | +0.3 [-0.197, +0.797] |"
    )  # .1, .3, .5: .3 ± 4.303·.2/√3
    assert evaluate.main(["compare", "--out", str(tmp_path / "buffer")]) == 0
    (tmp_path / "README.md").write_text("<!-- table:compare-buffer -->\n<!-- /table -->")
    report.report(tmp_path, tmp_path / "README.md", tmp_path / "figures")
    assert both in (tmp_path / "README.md").read_text()


def test_a_run_of_its_stage_is_as_good_as_a_folder_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(realtime, "resolve", lambda options: options)
    monkeypatch.setattr(
        realtime, "load_parts", lambda options, *parts: ({}, {"from": options.weights})
    )
    (tmp_path / "latest").write_text("000010")
    (tmp_path / "config.json").write_text(json.dumps({"stage": "distill"}))
    assert evaluate.player(str(tmp_path), "student").options.weights == str(tmp_path)
    assert (
        evaluate.player(str(tmp_path), "base") is None
        and evaluate.player(str(tmp_path / "none"), "student") is None
    )


def test_more_clocks_make_distant_times_less_alike() -> None:
    alike = []
    for sigma in (0.0, 0.8):
        cfg = replace(dit.PRESETS["tiny"], sigma_theta=sigma)
        alike.append(
            float(
                attention.rope_angles(torch.arange(100, 4000)[None], 1, 1, cfg)[0, :, 0, :, :12]
                .cos()
                .mean((-1, -2))
                .max()
            )
        )
    assert alike[1] < alike[0]


# ---- rollouts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dreamer() -> evaluate.Player:
    torch.manual_seed(0)
    options = realtime.Options(
        preset="micro", weights="random", steps=1, dtype="float32", device="cpu"
    )
    return evaluate.Player(
        "random",
        options,
        *realtime.load_parts(realtime.resolve(options), "dit", "encoder", "decoder")[::-1],
    )


def test_a_rollout_is_deterministic_and_depends_on_what_the_bank_holds(
    dreamer: evaluate.Player,
) -> None:
    script = evaluate.revisit(TEST, 0.0)
    z = torch.randn(
        1, dreamer.nets["dit"].cfg.in_dim, 65, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    again = [evaluate.rollout(dreamer, script, z, 1)[0] for _ in range(2)]
    assert (
        torch.equal(*again)
        and again[0].shape[2] == 14
        and torch.equal(again[0][:, :, :4], z[:, :, 41:45])
    )
    others = [
        evaluate.rollout(dreamer, script, z, 1, **how)[0]
        for how in (
            {"policy": "none"},
            {"bank": torch.zeros_like(z)},
            {"shuffle": True},
            {"later": 200},
            {"seed": 1},
        )
    ]
    assert all(not torch.equal(again[0], x) for x in others)


def test_the_walk_of_a_rollout_is_the_walk_of_the_script(dreamer: evaluate.Player) -> None:
    script = evaluate.revisit(TEST, 0.4)
    z = torch.zeros(1, dreamer.nets["dit"].cfg.in_dim, 65, 8, 8)
    poses = torch.tensor(evaluate.rollout(dreamer, script, z, 2)[1]["poses"])
    assert torch.allclose(poses.double(), script.poses[217:], atol=1e-4)
    assert camera.STEP * round(0.4 / camera.STEP) == pytest.approx(
        float((script.poses[-1] - script.poses[0])[[0, 2]].norm()), abs=1e-6
    )


def test_a_rollout_from_one_frame_begins_with_the_longer_segment(dreamer: evaluate.Player) -> None:
    script = evaluate.place(TEST, "l2:40 w:4 -:12 a:4 d:4 -:12 s:4 j2:40 -:16", 0)._replace(known=1)
    z = torch.randn(
        1, dreamer.nets["dit"].cfg.in_dim, 35, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    latents, said = evaluate.rollout(dreamer, script, z, 3)
    assert latents.shape[2] == 1 + 14 + 10 + 10 and torch.equal(latents[:, :, :1], z[:, :, :1])
    assert torch.allclose(torch.tensor(said["poses"]).double(), script.poses[97:], atol=1e-4)


def test_experts_that_are_one_network_are_that_network_and_cameras_follow_the_view(
    dreamer: evaluate.Player,
) -> None:
    net = dreamer.nets["dit"]
    twins = dreamer._replace(
        nets=dreamer.nets | {"dit": moe.Experts({"first": net, "third": net}, net, 0.9)}
    )
    z, made = (
        torch.randn(1, net.cfg.in_dim, 65, 8, 8, generator=torch.Generator().manual_seed(0)),
        {},
    )
    for view in ("first", "third"):
        script = evaluate.revisit(TEST, 0.0, "first")._replace(view=view)
        made[view] = evaluate.rollout(dreamer, script, z, 1)[0]
        assert (
            torch.equal(made[view], evaluate.rollout(twins, script, z, 1)[0])
            and twins.nets["dit"].view == view
        )
    assert not torch.equal(made["first"], made["third"])
