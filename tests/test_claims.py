"""What claims.py promises."""

import base64
import json
from pathlib import Path

import imageio.v3 as imageio
import pytest

from dataset.film import psnr
from lab import claims
from lab.claims import CLAIMS, Claim, judge
from lab.costs import PANES

ROOT = Path(__file__).resolve().parents[1]
STORED = [path for path in sorted((ROOT / "results").rglob("*.json")) if path.stem in CLAIMS]
STORED = [path for path in STORED if "pilots" not in path.parts]
PUBLISHED = {40.0, 27.38, 25.79, 6.6, 33.79, 31.84, 31.14, 0.99, 0.52, 0.35, 0.76, 0.3, 0.13}
HARDWARE = {"needs a GPU", "needs 8+1 GPUs"}


def one(measure: str, predicted: str = "") -> Claim:
    """A claim about nothing in particular."""
    return Claim("x", "§0", None, False, predicted, "dB", measure)


# ---- the table -------------------------------------------------------------------------------------


def test_a_line_is_read_as_it_stands() -> None:
    line = "  Table 2 says 2.65  | <= 3.15 dB | 75 %: PSNR lost | psnr: full - thin"
    claim = claims.claim(line)
    assert claim.name == "75 %: PSNR lost"
    assert claim.where == "Table 2"
    assert claim.paper == 2.65
    assert claim.predicted == "<= 3.15"
    assert claim.unit == "dB"
    assert claim.measure == "psnr: full - thin"
    assert not claim.exact
    plain = claims.claim("  M1   |           | lost frames | lost: exact, camera")
    assert (plain.predicted, plain.unit, plain.paper) == ("", "", None)


def test_every_published_number_has_a_row() -> None:
    printed = {claim.paper for listed in CLAIMS.values() for claim in listed}
    assert printed >= PUBLISHED


@pytest.mark.parametrize("command", CLAIMS)
def test_names_are_unique_and_only_hardware_is_needed(command: str) -> None:
    names = [claim.name for claim in CLAIMS[command]]
    assert len(set(names)) == len(names)
    needed = {claim.measure for claim in CLAIMS[command] if claim.measure.startswith("needs")}
    assert needed <= HARDWARE


# ---- judging ---------------------------------------------------------------------------------------


def test_a_row_called_exact_is_exact() -> None:
    claim = next(c for c in CLAIMS["latency"] if c.exact)
    key = "arithmetic/FPS at 1.551 s"
    assert judge(claim, {key: [40 / 1.551]}, {})["verdict"] == "met"
    assert judge(claim, {key: [25.78]}, {})["verdict"] == "missed"


@pytest.mark.parametrize(
    "predicted, value, verdict",
    [
        (">= 3", 3.0, "met"),
        ("> 3", 3.0, "missed"),
        ("<= 2", 2.5, "missed"),
        ("0.9-1.1", 1.0, "met"),
        ("", 1.0, "reported"),
        ("-0.5-0.5", 0.2, "met"),
    ],
)
def test_verdicts_follow_from_prediction_and_value(
    predicted: str, value: float, verdict: str
) -> None:
    assert judge(one("k: row", predicted), {"row/k": [value]}, {})["verdict"] == verdict


def test_a_mean_near_zero_is_no_equality_and_one_above_it_no_proof() -> None:
    pytest.importorskip("scipy", reason="intervals need scipy; pip install scipy")
    near = judge(one("k: row", "-0.5-0.5"), {"row/k": [-9.0, 9.0, 0.1]}, {})
    assert near["verdict"] == "unclear"
    above = one("k: row", "> 0")
    wide = {"row/k": [-9.0, 9.0, 0.1, 3.0, -1.0]}
    assert judge(above, wide, {})["verdict"] == "unclear"
    assert judge(above, {"row/k": [2.0, 3.0, 2.5, 3.5, 2.2]}, {})["verdict"] == "met"


def test_differences_and_ratios_are_paired_by_world() -> None:
    raw = {"a/s": [4.0, 9.0], "b/s": [2.0, 3.0]}
    assert judge(one("s: a / b"), raw, {})["value"] == 2.5
    assert judge(one("s: a - b"), raw, {})["value"] == 4.0
    with pytest.raises(ValueError):
        judge(one("s: a / b"), {"a/s": [4.0, 9.0], "b/s": [2.0]}, {})


def test_a_misspelt_row_or_column_is_an_error_with_the_nearest_name() -> None:
    raw = {"exact, camera/psnr": [1.0], "exact, none/psnr": [1.0]}
    with pytest.raises(ValueError, match="'exact, camra'.*nearest is 'exact, camera'"):
        judge(one("psnr: exact, camra - exact, none"), raw, {})
    with pytest.raises(ValueError, match="'pnsr'.*nearest is 'psnr'"):
        judge(one("pnsr: exact, camera"), raw, {})
    with pytest.raises(ValueError, match="no finite value"):
        judge(one("psnr: exact, camera"), {"exact, camera/psnr": [float("nan")]}, {})


def test_not_measured_is_what_needs_hardware_or_what_the_run_left_out() -> None:
    assert judge(one("needs a GPU"), {}, {})["verdict"] == "not measured"
    claim = one("psnr: student 3 - teacher 3")
    raw = {"teacher 3/psnr": [1.0]}
    why = "python train.py --stage distill"
    assert judge(claim, raw, {"student 3": why})["verdict"] == "not measured"
    assert judge(claim, raw, {"psnr": why})["verdict"] == "not measured"
    assert judge(claim, {}, {"*": why})["verdict"] == "not measured"
    measured = judge(one("psnr: teacher 3"), raw, {"*": why})
    assert measured["value"] == 1.0, "the star excuses what is missing, not what is there"


# ---- what is stored --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STORED, ids=lambda path: str(path.relative_to(ROOT)))
def test_stored_claims_follow_from_the_stored_values(path: Path) -> None:
    pytest.importorskip("scipy", reason="intervals need scipy; pip install scipy")
    stored = json.loads(path.read_text())
    raw = stored["raw"]
    judged = [judge(claim, raw, stored["absent"]) for claim in CLAIMS[path.stem]]
    same_within_rounding(json.loads(json.dumps(judged)), stored["claims"])
    assert stored["command"].startswith(f"python evaluate.py {path.stem}")
    assert stored["worlds"]
    assert "torch" in stored["versions"]


def same_within_rounding(judged: list[dict], stored: list[dict]) -> None:
    """Equal but for the last digits of an interval, in which versions of scipy may differ."""
    for now, then in zip(judged, stored, strict=True):
        interval = then.pop("interval") or ()
        assert (now.pop("interval") or ()) == pytest.approx(interval, rel=1e-6, abs=1e-9)
        assert now == then


def test_a_stored_number_is_computed_again_from_the_stored_frames() -> None:
    stored = json.loads((ROOT / "results/vae.json").read_text())
    content = base64.b64decode(stored["pictures"]["decoders"])
    picture = imageio.imread(content)[1::3, 1::3]
    for i in range(6):  # a column for each world: truth, full, 50 % and 75 % decoder
        column = picture[:, 64 * i : 64 * i + 64]
        true = column[:64][None]
        for k, row in enumerate(PANES, 1):
            made = column[64 * k : 64 * k + 64][None]
            score = stored["raw"][f"{row}, 33 frames/last frame psnr"][i]
            assert float(psnr(made, true)) == score
