"""What lab/failures.py promises: one flag is one fault, its curves and scores are stored, its page is
made of them."""

import base64
import importlib.util
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

import train
from engine import cli, parts, weights
from lab import claims, failures, report

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "results" / "failures.json"
QUICK = ["--preset", "micro", "--dtype", "float32", "--steps", "4", "--worlds", "1"]
MOMENTS = 2  # of each arm: enough to see that they are told apart


@pytest.fixture(autouse=True)
def place(studio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trainings of a micro model, in this process and in a folder of their own."""
    for name in ("assets", "datasets"):
        (tmp_path / name).symlink_to(studio / name)
    (tmp_path / "results/notes").mkdir(parents=True)
    (tmp_path / "results/notes/failures").symlink_to(ROOT / "results/notes/failures")
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    monkeypatch.setattr(failures, "call", lambda words: train.main(words[1:]))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def in_a_hurry(monkeypatch: pytest.MonkeyPatch, stage: str, flags: str) -> None:
    """So few steps must be large ones, if anything is to be seen of them."""
    study = failures.STUDIES[stage]
    quick = study._replace(calls=2, segments=2, flags=f"{study.flags} --log-every 1 {flags}")
    monkeypatch.setitem(failures.STUDIES, stage, quick)
    monkeypatch.setattr(failures, "MOMENTS", MOMENTS)


def args_of(*words: str) -> failures.Namespace:
    return failures.parse([*words])


def flags_of(words: list[str]) -> dict[str, str]:
    """--flag value pairs; the last of two wins, as it does in train.py."""
    return dict(zip(words[1::2], words[2::2], strict=True))


@pytest.mark.parametrize("stage", failures.STUDIES)
def test_a_fault_is_one_thing_that_differs_from_the_healthy_arm(stage: str) -> None:
    args = args_of(stage)
    healthy = flags_of(failures.command_of(stage, "healthy", args))
    for name, arm in failures.STUDIES[stage].arms.items():
        if arm.weights:
            assert not arm.flags, "it is not trained"
            assert arm.weights in failures.STUDIES[stage].arms
            assert arm._replace(weights="") != failures.Arm(), "it is played otherwise"
            continue
        other = flags_of(failures.command_of(stage, name, args))
        asked = arm.flags.split()[::2]
        changed = [flag for flag in other if other[flag] != healthy.get(flag)]
        assert sorted(changed) == sorted(["--run", *asked][name == "healthy" :])
        train.parse(failures.command_of(stage, name, args)[1:])  # every flag is one of train.py


@pytest.mark.parametrize("stage", failures.STUDIES)
def test_what_is_expected_is_written_in_the_language_of_claims(stage: str) -> None:
    study = failures.STUDIES[stage]
    for claim in claims.table(study.claims):
        _, row, _, other = claims.MEASURE.fullmatch(claim.measure).groups()
        assert {row, other} <= {*study.arms, "start"}
        assert claim.where in study.arms


@pytest.mark.long
def test_a_base_is_trained_played_judged_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_hurry(monkeypatch, "base", "--net '' --ema 0 --warmup 1 --lr 0.03")
    out = ["--out", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")]
    failures.main(["base", *QUICK, *out])
    result = json.loads((tmp_path / "results/failures.json").read_text())["base"]
    arms = failures.BASE.arms

    # all moments of every arm, in every world; curves of those that were trained
    facts = result["facts"]
    assert facts["steps"] == [2, 4]
    assert list(facts["arms"]) == list(arms)
    for name, fact in facts["arms"].items():
        values = np.array(fact["scores"]["psnr"])
        assert values.shape == (MOMENTS, 1)
        assert np.isfinite(values).all()
        assert ("log" in fact) == (not arms[name].weights)
    steps, losses = np.transpose(facts["arms"]["healthy"]["log"]["loss"])
    assert steps.tolist() == [1, 2, 3, 4]
    assert losses.min() > 0
    assert facts["arms"]["high rate"]["command"].endswith("--lr 1e-2 --muon 1e-1")

    # what is played otherwise differs, though its weights do not
    last = {name: fact["scores"]["spread"][-1] for name, fact in facts["arms"].items()}
    for name in ("other rays", "healthy, guided"):
        assert last["healthy"] != last[name], name

    # claims are judged from what is stored alone, and pictures are of all moments
    judged = judged_of("base", result)
    assert judged == result["claims"]
    strip = imageio.imread(base64.b64decode(result["pictures"]["healthy"]))
    assert strip.shape == (64, MOMENTS * 64, 3)
    assert list(result["weights"]) == ["micro/vae.safetensors"]

    # the page and its figure; the same numbers give the same page
    page = tmp_path / "results/failures.md"
    written = page.read_text()
    assert report.claim_table(result) in written
    assert "{{" not in written
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "figures/failures-base.png").exists() == has_matplotlib
    failures.main(["report", *out])
    assert page.read_text() == written


@pytest.mark.long
def test_a_student_starts_from_a_base_and_is_played_with_both_samplers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_hurry(monkeypatch, "distill", "--cold-start 2 --ratio-cold 1 --segments 1")
    big_steps = ["--ema", "0", "--warmup", "1", "--lr", "0.03"]
    train.main(
        ["--preset", "micro", "--steps", "2", "--run", "b", "--dtype", "float32", *big_steps]
    )
    start = ["--init", str(tmp_path / "runs/b")]
    args = args_of("distill", *QUICK, *start)
    result = failures.measure("distill", args, "x")
    arms = result["facts"]["arms"]
    assert len(arms["slow critic"]["log"]["critic"]) == 4
    assert arms["fast student"]["scores"] != arms["healthy"]["scores"]
    assert arms["euler"]["scores"] != arms["healthy"]["scores"], "the same weights"
    assert np.isfinite(result["raw"]["start/psnr"]).all()
    assert [claim["n"] for claim in result["claims"]] == [1] * len(result["claims"])


def judged_of(stage: str, result: dict) -> list[dict]:
    """The claims of a study, judged from the stored numbers."""
    listed = claims.table(failures.STUDIES[stage].claims)
    judged = [claims.judge(claim, result["raw"], {}) for claim in listed]
    return json.loads(json.dumps(judged))


def test_a_curve_s_last_quarter_is_what_is_compared() -> None:
    points = [[step, float(step)] for step in range(1, 9)]
    trained = failures.Trained("", {"loss": points, "norm": points[:1]}, {})
    assert trained.last() == {"last loss": 7.5, "last norm": 1.0}


def test_numbers_in_the_text_come_from_the_json() -> None:
    raw = {"a/psnr": [3.0, 5.0], "b/psnr": [1.0, 2.0]}
    found = {"base": {"raw": raw}}
    text = "lost {{base psnr: a - b}} dB of {{base psnr: a}}; {{distill psnr: a}}"
    assert failures.fill(text, found) == "lost 2.5 dB of 4; (not measured)"
    with pytest.raises(ValueError, match="nearest is"):
        failures.fill("{{base psnr: c}}", found)


def test_what_cannot_be_run_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        args_of("base", "--steps", "6")
    with pytest.raises(ValueError, match="did you mean distill"):
        args_of("distil")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="status 2: python train.py --stage nothing"):
        failures.call(["train.py", "--stage", "nothing"])


@pytest.mark.skipif(not STORED.exists(), reason="nothing was measured yet")
def test_the_page_is_what_the_json_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "ROOT", ROOT)
    weights.write_text(tmp_path / "failures.json", STORED.read_text())
    failures.write_page(tmp_path, tmp_path / "figures")
    again = "python lab/failures.py report writes it anew"
    page = STORED.with_name("failures.md")
    assert (tmp_path / "failures.md").read_text() == page.read_text(), again
    for stage, result in json.loads(STORED.read_text()).items():
        assert judged_of(stage, result) == result["claims"]
