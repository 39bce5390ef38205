"""What claims.py promises."""

import base64
import json
from pathlib import Path

import imageio.v3 as imageio
import pytest

from dataset import episode
from lab.claims import CLAIMS, GAPS, PANES, Claim, judge, of

ROOT = Path(__file__).resolve().parents[1]
STORED = [path for path in sorted((ROOT / "results").rglob("*.json")) if path.stem in CLAIMS]


def test_every_published_number_has_a_row() -> None:
    printed = {claim.paper for claims in CLAIMS.values() for claim in claims}
    assert {
        40.0,
        27.38,
        25.79,
        6.6,
        33.79,
        31.84,
        31.14,
        0.99,
        0.52,
        0.35,
        0.76,
        0.3,
        0.13,
    } <= printed


def test_a_row_called_exact_is_exact() -> None:
    claim = next(c for claims in CLAIMS.values() for c in claims if c.exact)
    row = "arithmetic/FPS at 1.551 s a segment"
    assert judge(claim, {row: [40 / 1.551]})["verdict"] == "met"
    assert judge(claim, {row: [25.78]})["verdict"] == "missed"


def test_verdicts_follow_from_prediction_and_value() -> None:
    for predicted, value, verdict in (
        (">= 3", 3.0, "met"),
        ("> 3", 3.0, "missed"),
        ("<= 2", 2.5, "missed"),
        ("0.9-1.1", 1.0, "met"),
        ("", 1.0, "reported"),
        ("-0.5-0.5", 0.2, "met"),
    ):
        claim = Claim("x", None, predicted, "", "", lambda raw: raw["k"])
        assert judge(claim, {"k": [value]})["verdict"] == verdict, (predicted, value)
    near_zero = Claim("x", None, "-0.5-0.5", "dB", "", lambda raw: raw["k"])
    assert (
        judge(near_zero, {"k": [-9.0, 9.0, 0.1]})["verdict"] == "unclear"
    )  # a mean near 0 is no equivalence
    above = Claim("x", None, "> 0", "dB", "", lambda raw: raw["k"])
    assert (
        judge(above, {"k": [-9.0, 9.0, 0.1, 3.0, -1.0]})["verdict"] == "unclear"
    )  # the mean says yes, the interval no
    assert judge(above, {"k": [2.0, 3.0, 2.5, 3.5, 2.2]})["verdict"] == "met"


def test_both_sides_of_a_ratio_come_from_one_run() -> None:
    claim = Claim("x", 2.53, "2-3", "x", "", of("s", "a", "b", True))
    assert judge(claim, {"a/s": [4.0, 9.0], "b/s": [2.0, 3.0]})["value"] == 2.5
    assert judge(claim, {"a/s": [4.0]})["verdict"] == "not measured"
    with pytest.raises(ValueError):
        judge(claim, {"a/s": [4.0, 9.0], "b/s": [2.0]})


def test_the_gain_over_the_oracle_is_a_ratio_of_mean_gains() -> None:
    raw = {
        f"exact, {arm}/psnr bank-only": x
        for arm, x in {
            "camera": [20.0, 24.0],
            "none": [14.0, 16.0],
            "oracle warp": [25.0, 25.0],
        }.items()
    }
    claim = next(
        c
        for c in CLAIMS["memory"]
        if c.name.startswith("exact: gain of memory / of the oracle warp")
    )
    assert judge(claim, raw)["value"] == pytest.approx((6 + 8) / (11 + 9))


def test_half_life_is_where_agreement_above_another_world_has_halved() -> None:
    claim = next(c for c in CLAIMS["memory"] if c.name.endswith("half-life"))
    raw = {
        f"palindrome over 8 W from a bank, camera/{gap} W apart, dB": x
        for gap, x in zip(
            GAPS,
            ([30.0, 30.0], [25.0, 29.0], [15.0, 28.0], [12.0, 27.0], [12.0, 26.0]),
            strict=True,
        )
    } | {"exact, floor: other world/psnr": [9.0, 11.0]}
    assert judge(claim, raw)["value"] == pytest.approx(
        (1.5 + 8) / 2
    )  # half of 20 dB lies at 1.5 W; the other is never there


def test_a_world_that_is_never_lost_counts_as_long_as_it_was_watched() -> None:
    claim = next(c for c in CLAIMS["drift"] if c.name.startswith("in place: frames until lost"))
    assert (
        judge(
            claim,
            {
                "in place, camera/frames until lost": [320.0, 100.0],
                "in place, camera/lost": [0.0, 1.0],
            },
        )["value"]
        == 210
    )


def test_action_to_photon_is_the_mean_of_the_clock_over_the_formula() -> None:
    claim, row = CLAIMS["latency"][-1], "action to photon at 40 FPS"
    raw = {f"{row}/s by the clock": [1.0, 0.2], f"{row}/s by formula": [0.5]}
    assert (
        judge(claim, raw)["value"] == pytest.approx(1.2)
        and judge(claim, raw)["verdict"] == "missed"
    )


@pytest.mark.parametrize("path", STORED, ids=lambda path: str(path.relative_to(ROOT)))
def test_stored_claims_follow_from_the_stored_values(path: Path) -> None:
    stored = json.loads(path.read_text())
    assert stored["claims"] == json.loads(
        json.dumps([judge(claim, stored["raw"]) for claim in CLAIMS[path.stem]])
    )
    assert (
        stored["command"].startswith(f"python evaluate.py {path.stem}")
        and stored["worlds"]
        and "torch" in stored["versions"]
    )


def test_a_stored_number_is_computed_again_from_the_stored_frames() -> None:
    stored = json.loads((ROOT / "results/vae.json").read_text())
    picture = imageio.imread(base64.b64decode(stored["pictures"]["decoders"]))[1::3, 1::3]
    for i in range(6):  # a column for each world: truth, full, 50 % and 75 % decoder
        true, *made = (picture[64 * k : 64 * k + 64, 64 * i : 64 * i + 64][None] for k in range(4))
        for row, frame in zip(PANES, made, strict=True):
            assert (
                float(episode.psnr(frame, true))
                == stored["raw"][f"{row}, 33 frames/last frame psnr"][i]
            )
