"""evaluate.py as a specification: closed forms and fakes for every metric, claims as data, tables from the json alone."""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import dit
import evaluate
import memory
import world

TEST = world.SPLITS["test"].start
NOISE = torch.rand(6, 64, 64, 3, generator=torch.Generator().manual_seed(0))
normal = lambda n, d, seed: torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def look() -> tuple:
    script = evaluate.place(TEST, "l:12 w:4")
    return script, *evaluate.draw(script)


def arguments(out: Path, **more: object) -> argparse.Namespace:
    said = {"full": False, "final": False, "tune": False, "worlds": 2, "weights": str(out / "none"), "out": str(out)}
    return argparse.Namespace(**said | more)


# ---- images ----------------------------------------------------------------------------------------------------------
def test_identical_frames_score_perfectly(look: tuple) -> None:
    frames = look[1][:3]
    best = {"psnr": 50.0, "ssim": 1.0, "gmsd": 0.0, "haarpsi": 1.0, "zncc": 1.0}
    for name, metric in evaluate.METRICS.items():
        assert torch.allclose(metric(frames, frames).float(), torch.tensor(best[name]), atol=1e-3), name
    assert all(float(evaluate.sharpness(x[None], x[None])) == pytest.approx(1, abs=1e-5) for x in frames)
    assert float(evaluate.sharpness(frames, frames).mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", evaluate.METRICS)
def test_every_metric_ranks_truth_above_a_turn_above_another_world(name: str, look: tuple) -> None:
    script, frames = look[:2]
    turned = evaluate.shoot(script.scene, script.poses[12:16].numpy() + [0, 0, 0, 0, 2.0])[0]
    other = evaluate.draw(evaluate.place(TEST + 1, "l:12 w:4"), slice(12, 16))[0]
    near, far = (evaluate.BETTER[name] * float(evaluate.METRICS[name](x, frames[12:16]).mean()) for x in (turned, other))
    assert evaluate.BETTER[name] * float(evaluate.METRICS[name](frames[12:16], frames[12:16]).mean()) > near > far


def test_psnr_of_a_constant_error_is_its_closed_form() -> None:
    grey = torch.full((1, 64, 64, 3), 0.5)
    assert float(evaluate.data.psnr(grey + 0.1, grey)) == pytest.approx(20.0, abs=1e-4)


def test_gmsd_does_not_see_a_change_of_brightness_and_sees_noise() -> None:
    grey = 0.3 + 0.4 * NOISE
    assert float(evaluate.gmsd(grey + 0.1, grey).max()) < 0.01
    assert float(evaluate.gmsd(NOISE, NOISE.flip(0)).min()) > 0.1


def test_haarpsi_equals_a_plain_sum_of_its_definition() -> None:
    a, b = (255 * x.double().numpy() for x in (NOISE[0], NOISE[1]))
    yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    pool = lambda x: x.reshape(32, 2, 32, 2).mean((1, 3))
    a, b = ([pool(x @ row) for row in yiq] for x in (a, b))

    def haar(y: np.ndarray, k: int, down: bool) -> np.ndarray:
        kernel = np.ones((k, k)) / k
        kernel[k // 2:] *= -1
        kernel, padded = kernel if down else kernel.T, np.pad(y, (k // 2 - 1, k // 2))
        return np.abs([[(padded[i:i + k, j:j + k] * kernel).sum() for j in range(32)] for i in range(32)])

    like = lambda p, q: (2 * p * q + 30) / (p * p + q * q + 30)
    s = [sum(like(haar(a[0], k, d), haar(b[0], k, d)) for k in (2, 4)) / 2 for d in (True, False)]
    w = [np.maximum(haar(a[0], 8, d), haar(b[0], 8, d)) for d in (True, False)]
    mean4 = lambda x: np.pad(np.abs(x[:-1, :-1] + x[1:, :-1] + x[:-1, 1:] + x[1:, 1:]) / 4, (0, 1))
    s, w = [*s, (like(mean4(a[1]), mean4(b[1])) + like(mean4(a[2]), mean4(b[2]))) / 2], [*w, (w[0] + w[1]) / 2]
    x = sum((q / (1 + np.exp(-4.2 * p))).sum() for p, q in zip(s, w, strict=True)) / sum(q.sum() for q in w)
    assert float(evaluate.haarpsi(NOISE[:1], NOISE[1:2])) == pytest.approx((math.log(x / (1 - x)) / 4.2) ** 2, abs=1e-4)


def test_blur_lowers_sharpness_and_noise_raises_it(look: tuple) -> None:
    true = torch.from_numpy(look[1][:2]) / 255
    soft = torch.nn.functional.avg_pool2d(true.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False).permute(0, 2, 3, 1)
    each = lambda pred: [float(evaluate.sharpness(a[None], b[None])) for a, b in zip(pred, true, strict=True)]
    assert max(each(soft)) < 0.9
    assert min(each(true + 0.1 * torch.randn_like(true))) > 1.5
    bare = torch.cat([true, torch.full_like(true, 0.5)])
    assert float(evaluate.sharpness(bare + 0.01 * torch.randn_like(bare), bare).mean()) < 1.2, "noise on a bare wall decides nothing"


# ---- distributions ---------------------------------------------------------------------------------------------------
def test_frechet_of_two_normal_laws_is_its_closed_form() -> None:
    a, b = normal(20_000, 3, 0), 2 * normal(20_000, 3, 1) + torch.tensor([1.0, 0, 0], dtype=torch.float64)
    assert evaluate.frechet(a, b) == pytest.approx(1 + 3 * (1 + 4 - 2 * 2), rel=0.05)
    assert abs(evaluate.frechet(a, a)) < 1e-8


def test_mmd_is_unbiased() -> None:
    same = [evaluate.mmd(normal(128, 8, 2 * s), normal(128, 8, 2 * s + 1)) for s in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(60) + 0.01
    assert evaluate.mmd(normal(128, 8, 0) + 0.5, normal(128, 8, 1)) > 5 * np.std(same)


def test_pixel_features_tell_a_blurred_set_from_the_truth(look: tuple) -> None:
    frames = torch.from_numpy(look[1]) / 255
    features = evaluate.pixel_pca(frames)
    assert features(frames).shape == (17, 2)                         # no more axes than an eighth of the frames
    assert evaluate.frechet(features(1 - frames), features(frames)) > 10 * abs(evaluate.frechet(features(frames), features(frames))) + 0.1


# ---- statistics ------------------------------------------------------------------------------------------------------
def test_a_95_percent_interval_covers_the_mean_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    spans = [evaluate.bca(rng.normal(1.0, 2.0, 32), resamples=1000) for _ in range(200)]
    assert 0.89 <= np.mean([low <= 1.0 <= high for low, high in spans]) <= 0.99


def test_absence_of_a_difference_is_no_equivalence() -> None:
    rng = np.random.default_rng(0)
    assert evaluate.equivalent(rng.normal(0, 0.5, 64), 0.5)
    assert not evaluate.equivalent(rng.normal(0, 5.0, 8), 0.5)       # not different, but not shown to be equal either


def test_theil_sen_ignores_an_outlier() -> None:
    y = [2.0 * x for x in range(20)]
    y[7] = 1000.0
    assert evaluate.theil_sen(range(20), y) == pytest.approx(2.0)


def test_lost_is_eight_frames_in_a_row() -> None:
    assert evaluate.time_to_lost([0.9] * 5 + [0.1] * 7 + [0.9] + [0.1] * 8, 0.7) == 13
    assert evaluate.time_to_lost([0.9] * 21, 0.7) == 21


# ---- geometry --------------------------------------------------------------------------------------------------------
def test_a_view_sees_itself_and_nothing_behind_its_back(look: tuple) -> None:
    script, _, depth, c2w = look
    assert evaluate.visible(depth[:1], c2w[:1], depth[:1], c2w[:1]).mean() > 0.99
    back = evaluate.shoot(script.scene, script.poses[:1].numpy() + [0, 0, 0, 0, 180.0])
    assert evaluate.visible(depth[:1], c2w[:1], back[1], back[2]).mean() == 0


def test_seen_pixels_have_the_colour_they_had(look: tuple) -> None:
    script, frames, depth, c2w = look
    seen = evaluate.visible(depth[12:13], c2w[12:13], depth[:1], c2w[:1])[0, 0]
    assert 0.5 < seen.mean() < 0.95                                  # 18 degrees further right: a part is new
    columns = np.flatnonzero(~seen.any(0))
    assert len(columns) and columns.min() > 32                       # and it lies on the right


def test_the_greedy_oracle_covers_at_least_as_much_as_any_choice() -> None:
    seen = np.random.default_rng(0).random((9, 16, 16)) < 0.2
    best = evaluate.coverage(seen, evaluate.greedy(seen, 2))
    assert evaluate.coverage(seen, range(9)) == 1
    assert all(best >= 0.63 * evaluate.coverage(seen, (i, j)) for i in range(9) for j in range(9))
    assert evaluate.coverage(seen, evaluate.greedy(seen, 1)) == max(evaluate.coverage(seen, [i]) for i in range(9))


def test_registration_finds_where_clean_frames_were_taken() -> None:
    errors = []
    for seed in (TEST, TEST + 1, TEST + 2):
        script = evaluate.place(seed, "l:12 w:4")
        found = evaluate.register(script.scene, evaluate.draw(script, [12])[0][0], script.poses[12].numpy() + np.array([0.1, 0, -0.1, 0, 6.0]))
        assert found.score > 0.99
        errors.append(np.abs(found.pose - script.poses[12].numpy()))
    x, _, z, _, yaw = np.transpose(errors)
    assert np.median(yaw) < 0.25 and np.median(np.hypot(x, z)) < 0.01


# ---- paths -----------------------------------------------------------------------------------------------------------
def test_scripts_are_free_of_contact_and_come_back() -> None:
    for name, offset in evaluate.PLACES.items():
        script = evaluate.revisit(TEST + 2, offset)
        game = world.World(script.scene, pose=script.poses[0].tolist())
        assert not any(game.move(k, m) for k, m in zip(script.keyboard.tolist(), script.mouse.tolist(), strict=True))
        apart = script.poses[-1] - script.poses[0]
        assert float(apart[[0, 2]].norm()) == pytest.approx(offset, abs=0.07), name
        assert float(apart[4]) == pytest.approx(360, abs=1e-3)


def test_the_three_lists_of_worlds_are_disjoint() -> None:
    lists = [set(world.SPLITS[name][:count]) for name, count in evaluate.WORLDS.items()]
    assert sum(map(len, lists)) == len(set.union(*lists)) and not set.union(*lists) & set(world.SPLITS["train"])


def test_a_donors_frames_are_adopted_only_by_a_copy_of_them() -> None:
    true, donor, mask = np.zeros((3, 8, 8, 3), np.uint8), np.full((3, 8, 8, 3), 255, np.uint8), np.ones((3, 8, 8), bool)
    assert evaluate.adoption(donor / 255, true, donor, mask) == 1 and evaluate.adoption(true / 255, true, donor, mask) == 0


# ---- claims and reports ----------------------------------------------------------------------------------------------
def test_every_published_number_has_a_row() -> None:
    printed = {claim.paper for claims in evaluate.CLAIMS.values() for claim in claims}
    assert {40.0, 27.38, 25.79, 6.6, 33.79, 31.84, 31.14, 0.99, 0.52, 0.35, 0.76, 0.3, 0.13} <= printed


def test_an_unmeasured_cell_says_not_measured(tmp_path: Path) -> None:
    result = evaluate.measure("drift", arguments(tmp_path))
    assert {c["verdict"] for c in result["claims"]} == {"not measured"}
    assert "not measured" in evaluate.claim_table(result) and "python train.py --stage base" in evaluate.claim_table(result)


def test_a_row_called_exact_is_exact() -> None:
    claim = next(c for claims in evaluate.CLAIMS.values() for c in claims if c.exact)
    row = "arithmetic/FPS at 1.551 s a segment"
    assert evaluate.judge(claim, {row: [40 / 1.551]})["verdict"] == "met"
    assert evaluate.judge(claim, {row: [25.78]})["verdict"] == "missed"


def test_verdicts_follow_from_prediction_and_value() -> None:
    for predicted, value, verdict in ((">= 3", 3.0, "met"), ("> 3", 3.0, "missed"), ("<= 2", 2.5, "missed"), ("0.9-1.1", 1.0, "met"),
                                      ("", 1.0, "reported"), ("-0.5-0.5", 0.2, "met")):
        claim = evaluate.Claim("x", None, predicted, "", "", lambda raw: raw["k"])
        assert evaluate.judge(claim, {"k": [value]})["verdict"] == verdict, (predicted, value)
    near_zero = evaluate.Claim("x", None, "-0.5-0.5", "dB", "", lambda raw: raw["k"])
    assert evaluate.judge(near_zero, {"k": [-9.0, 9.0, 0.1]})["verdict"] == "missed"         # a mean near 0 is no equivalence
    above = evaluate.Claim("x", None, "> 0", "dB", "", lambda raw: raw["k"])
    assert evaluate.judge(above, {"k": [-9.0, 9.0, 0.1, 3.0, -1.0]})["verdict"] == "unclear"      # the mean says yes, the interval no
    assert evaluate.judge(above, {"k": [2.0, 3.0, 2.5, 3.5, 2.2]})["verdict"] == "met"


def test_both_sides_of_a_ratio_come_from_one_run() -> None:
    claim = evaluate.Claim("x", 2.53, "2-3", "x", "", evaluate.of("s", "a", "b", True))
    assert evaluate.judge(claim, {"a/s": [4.0, 9.0], "b/s": [2.0, 3.0]})["value"] == 2.5
    assert evaluate.judge(claim, {"a/s": [4.0]})["verdict"] == "not measured"
    with pytest.raises(ValueError):
        evaluate.judge(claim, {"a/s": [4.0, 9.0], "b/s": [2.0]})


def test_predictions_are_stored_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(run: evaluate.Run) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setitem(evaluate.COMMANDS, "memory", dies)
    with pytest.raises(RuntimeError):
        evaluate.measure("memory", arguments(tmp_path))
    stored = json.loads((tmp_path / "memory.json").read_text())
    assert stored["raw"] == {} and any(c["predicted"] == ">= 6" and c["verdict"] == "not measured" for c in stored["claims"])


def test_one_formula_gives_25_79_fps_from_1_551_s_and_905_tf() -> None:
    released = evaluate.realtime.segment_flops(evaluate.realtime.Options(preset="5b"))[1]
    assert round(40 / 1.551, 2) == 25.79 and released / 1e12 == pytest.approx(905.5, abs=0.3)


def test_retrieval_is_measured_without_a_model_and_the_oracle_is_1(tmp_path: Path) -> None:
    result = evaluate.measure("retrieval", arguments(tmp_path, worlds=1))
    assert np.allclose(result["raw"]["greedy oracle/coverage@5"], 1)
    assert all(0 <= v <= 1.3 for k, x in result["raw"].items() if k.endswith("coverage@5") for v in x)
    assert len(result["raw"]["recent/coverage@5"]) == 4 and result["raw"]["camera, uniform/ms"]


def test_tables_are_rebuilt_from_the_json_alone_and_name_hardware_and_command(tmp_path: Path) -> None:
    out, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text("# x\n<!-- table:moe -->\nold\n<!-- /table -->\nkept\n<!-- table:rope:raw -->\n<!-- /table -->\n")
    evaluate.measure("moe", arguments(out))
    evaluate.report(out, readme, tmp_path / "figures")
    first = readme.read_text()
    assert "old" not in first and "kept" in first and "`python evaluate.py moe --quick --worlds " in first and "cores" in first
    assert "<!-- table:rope:raw -->\nnot measured\n<!-- /table -->" in first
    evaluate.report(out, readme, tmp_path / "figures")
    assert readme.read_text() == first


def test_arms_are_compared_by_seed_with_a_t_interval(tmp_path: Path) -> None:
    slopes = {"none-1": -1.0, "none-2": -2.0, "none-3": -3.0, "both-1": -0.9, "both-2": -1.7, "both-3": -2.5}
    for name, slope in slopes.items():
        (tmp_path / "buffer" / name).mkdir(parents=True)
        claim = evaluate.judge(evaluate.CLAIMS["drift"][0], {"in place, camera/dB per 100 frames": [slope]})
        said = dict.fromkeys(("command", "split", "machine", "date", "threads"), "x") | {"claims": [claim], "worlds": [1], "versions": {"torch": "t"}}
        (tmp_path / "buffer" / name / "drift.json").write_text(json.dumps(said))
    header, _, none, both, *_ = evaluate.contrast(tmp_path / "buffer", "none")["table"]
    assert "each seed" in header and none.endswith("| -1, -2, -3 | -2 | - |")
    assert both.endswith("| -0.9, -1.7, -2.5 | -1.7 | +0.3 [-0.197, +0.797] |")          # .1, .3, .5: .3 ± 4.303·.2/√3
    assert evaluate.main(["compare", "--out", str(tmp_path / "buffer")]) == 0
    (tmp_path / "README.md").write_text("<!-- table:compare-buffer -->\n<!-- /table -->")
    evaluate.report(tmp_path, tmp_path / "README.md", tmp_path / "figures")
    assert both in (tmp_path / "README.md").read_text()


def test_a_run_of_its_stage_is_as_good_as_a_folder_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.realtime, "resolve", lambda options: options)
    monkeypatch.setattr(evaluate.realtime, "load_parts", lambda options, *parts: ({}, {"from": options.weights}))
    (tmp_path / "latest").write_text("000010")
    (tmp_path / "config.json").write_text(json.dumps({"stage": "distill"}))
    assert evaluate.player(str(tmp_path), "student").options.weights == str(tmp_path)
    assert evaluate.player(str(tmp_path), "base") is None and evaluate.player(str(tmp_path / "none"), "student") is None


def test_more_clocks_make_distant_times_less_alike() -> None:
    alike = []
    for sigma in (0.0, 0.8):
        cfg = evaluate.replace(dit.PRESETS["tiny"], sigma_theta=sigma)
        alike.append(float(dit.rope_angles(torch.arange(100, 4000)[None], 1, 1, cfg)[0, :, 0, :, :12].cos().mean((-1, -2)).max()))
    assert alike[1] < alike[0]


# ---- rollouts --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def dreamer() -> evaluate.Player:
    torch.manual_seed(0)
    options = evaluate.realtime.Options(preset="micro", weights="random", steps=1, dtype="float32", device="cpu")
    return evaluate.Player("random", options, *evaluate.realtime.load_parts(evaluate.realtime.resolve(options), "dit", "encoder", "decoder")[::-1])


def test_a_rollout_is_deterministic_and_depends_on_what_the_bank_holds(dreamer: evaluate.Player) -> None:
    script = evaluate.revisit(TEST, 0.0)
    z = torch.randn(1, dreamer.nets["dit"].cfg.in_dim, 65, 8, 8, generator=torch.Generator().manual_seed(0))
    again = [evaluate.rollout(dreamer, script, z, 1)[0] for _ in range(2)]
    assert torch.equal(*again) and again[0].shape[2] == 14 and torch.equal(again[0][:, :, :4], z[:, :, 41:45])
    others = [evaluate.rollout(dreamer, script, z, 1, **how)[0] for how in (
        {"policy": "none"}, {"bank": torch.zeros_like(z)}, {"shuffle": True}, {"later": 200}, {"seed": 1})]
    assert all(not torch.equal(again[0], x) for x in others)


def test_the_walk_of_a_rollout_is_the_walk_of_the_script(dreamer: evaluate.Player) -> None:
    script = evaluate.revisit(TEST, 0.4)
    z = torch.zeros(1, dreamer.nets["dit"].cfg.in_dim, 65, 8, 8)
    poses = torch.tensor(evaluate.rollout(dreamer, script, z, 2)[1]["poses"])
    assert torch.allclose(poses.double(), script.poses[217:], atol=1e-4)
    assert memory.STEP * round(0.4 / memory.STEP) == pytest.approx(float((script.poses[-1] - script.poses[0])[[0, 2]].norm()), abs=1e-6)
