"""What report.py, summary.py and figures.py promise."""

import json
from pathlib import Path

import pytest

from lab import metrics, report, summary
from lab.claims import CLAIMS, judge

PROVENANCE = ("command", "split", "machine", "date", "threads")
SLOPES = {
    "none-1": -1.0,
    "none-2": -2.0,
    "none-3": -3.0,
    "both-1": -0.9,
    "both-2": -1.7,
    "both-3": -2.5,
}
LONG = ("dB per 100 frames", "sharpness after 640")
SCORE = {"mean": 20.04, "interval": [19.0, 21.5]}
FACTS = {
    "none": {
        "scores": {"all": {"exact": SCORE}, "bank-only": {"exact": SCORE | {"interval": None}}},
        "ms": 70.25,
        "numbers kept": 0,
    },
    "frame copied": {
        "scores": {"all": {"exact": SCORE}, "bank-only": {"exact": SCORE}},
        "ms": 5.0,
        "numbers kept": 46080,
    },
}


def result(**more: object) -> dict:
    """What a run stores, of a run that measured nothing."""
    said = dict.fromkeys(PROVENANCE, "x")
    return said | {"worlds": [1], "versions": {"torch": "t"}, "claims": [], "raw": {}} | more


def store(path: Path, stored: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored))


def test_numbers_are_short() -> None:
    assert report.number(None) == "-"
    assert report.number(float("nan")) == "nan"
    assert report.number(1234.56) == "1235"
    assert report.number(0.123456) == "0.1235"


def test_nothing_is_reported_while_a_measure_ranks_fakes_wrongly(tmp_path: Path) -> None:
    raw = {f"ranks fakes as expected/{name}": [1.0] for name in metrics.METRICS}
    store(tmp_path / "sanity.json", result(raw=raw))
    report.report(tmp_path, tmp_path / "none.md", tmp_path / "figures")

    raw["ranks fakes as expected/ssim"] = [0.0]
    store(tmp_path / "sanity.json", result(raw=raw))
    with pytest.raises(ValueError, match="ssim: ranks fakes wrongly"):
        report.report(tmp_path, tmp_path / "none.md", tmp_path / "figures")


def test_arms_are_compared_by_seed_with_a_t_interval(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="intervals need scipy; pip install scipy")
    absent = {"*": "only this claim is measured"}
    for name, slope in SLOPES.items():
        raw = {"in place, camera/dB per 100 frames": [slope]}
        claim = judge(CLAIMS["drift"][0], raw, absent)
        store(tmp_path / "buffer" / name / "drift.json", result(claims=[claim]))

    contrast = report.contrast(tmp_path / "buffer", "none")
    header, _, none, both, *_ = contrast["table"]
    assert "each seed" in header
    assert none.endswith("| -1, -2, -3 | -2 | - |")
    # .1, .3, .5: .3 ± 4.303·.2/√3
    assert both.endswith("| -0.9, -1.7, -2.5 | -1.7 | +0.3 [-0.197, +0.797] |")

    store(tmp_path / "compare-buffer.json", contrast)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:compare-buffer -->\n<!-- /table -->")
    report.report(tmp_path, readme, tmp_path / "figures")
    assert both in readme.read_text()


def test_a_summary_of_what_nobody_measured_stays_and_a_misspelt_table_is_named(
    tmp_path: Path,
) -> None:
    readme = tmp_path / "README.md"
    for name in ("summary", "sumary"):
        page = f"# x\n<!-- table:{name} -->\nold\n<!-- /table -->\nkept\n"
        readme.write_text(page)
        if name == "summary":
            report.report(tmp_path, readme, tmp_path / "figures")
        else:
            with pytest.raises(ValueError, match="sumary is no table; there are summary"):
                report.report(tmp_path, readme, tmp_path / "figures")
        assert readme.read_text() == page


def test_ways_to_remember_are_a_table_by_place_of_the_test_worlds_and_of_the_last(
    tmp_path: Path,
) -> None:
    store(tmp_path / "rivals.json", result(facts={"rivals": FACTS}))
    store(tmp_path / "final/rivals.json", result(facts={"rivals": {"none": FACTS["none"]}}))
    tables = report.all_tables(tmp_path, report.results(tmp_path))
    assert tables["rivals:places"].splitlines() == [
        "|  | pixels | exact | ms per segment | numbers kept |",
        "|---|---|---|---|---|",
        "| none | all | 20.0 [19.0, 21.5] | 70.25 | 0 |",
        "| none | bank-only | 20.0 |  |  |",
        "| frame copied | all | 20.0 [19.0, 21.5] | 5 | 46,080 |",
        "| frame copied | bank-only | 20.0 [19.0, 21.5] |  |  |",
    ]
    assert len(tables["final-rivals:places"].splitlines()) == 4


@pytest.mark.parametrize("key", LONG)
def test_a_run_too_short_for_the_table_of_the_readme_is_named(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quick run has eight segments, and no row says what it would be after sixteen."""
    arms = ("in place, camera", "in place, none", "exploring, camera", "exploring, none")
    raw = {f"{arm}/{column}": [1.0] for arm in arms for column in LONG if column != key}
    said = result(raw=raw, command="python evaluate.py drift --quick")
    monkeypatch.setattr(summary, "ROWS", [row for row in summary.ROWS if row.source == "drift"])
    with pytest.raises(ValueError, match=f"needs 'in place, .*/{key}'.*drift --quick"):
        summary.table({"drift": said})


def test_figures_are_drawn_from_the_json_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    facts = {
        "solid": [[True, False], [False, False]],
        "poses": [[1.0, 1.0, 0.0], [1.5, 1.0, 30.0], [1.5, 1.5, 60.0]],
        "bank": 2,
        "asks": [2],
        "chosen": [0],
    }
    store(tmp_path / "retrieval.json", result(facts=facts))
    memory = {f"exact, {arm}/psnr": [20.0, 21.0] for arm in ("camera", "none")}
    store(tmp_path / "memory.json", result(raw=memory))
    store(tmp_path / "rivals.json", result(facts={"rivals": FACTS}))
    drift = {f"segment 0{k}/in place, camera: psnr": [20.0 - k] for k in (1, 2)}
    store(tmp_path / "drift.json", result(raw=drift))
    rows = [
        [f"{name}: {ms} ms, IQR 1; times faster", None, None, 1.0, None]
        for name, ms in (("whole", 100.0), ("slower", 120.0), ("5 new", 50.0))
    ]
    store(tmp_path / "bench-tiny-ladder.json", {"rows": rows, "table": ["x"]})
    report.report(tmp_path, tmp_path / "none.md", tmp_path / "figures")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "figures").glob("*.png")}
    drawn = {"retrieval.png", "ladder.png", "memory.png", "drift.png", "rivals.png"}
    assert set(sizes) == drawn
    assert max(sizes.values()) < 200_000


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"claims": []}', "{", "3"])
def test_a_damaged_result_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text(text)
    with pytest.raises(ValueError, match="memory.json is damaged"):
        report.results(tmp_path)
    (tmp_path / "memory.json").rename(tmp_path / "bench-tiny-plain.json")
    with pytest.raises(ValueError, match="bench-tiny-plain.json is damaged"):
        report.all_tables(tmp_path, {})


@pytest.mark.parametrize("name", ["../../escaped", "a/b", ""])
def test_a_stranger_s_picture_stays_in_the_folder_of_pictures(tmp_path: Path, name: str) -> None:
    store(tmp_path / "up/rope.json", result(pictures={name: "aGk="}))
    with pytest.raises(ValueError, match="it may have letters alone"):
        report.report(tmp_path / "up", tmp_path / "none.md", tmp_path / "up/pictures")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("change", [{"claims": 5}, {"claims": [{}]}, {"raw": {"a/b": ["x"]}}])
def test_a_result_that_is_damaged_within_is_named(tmp_path: Path, change: dict) -> None:
    store(tmp_path / "rope.json", result(**change))
    with pytest.raises(ValueError, match="rope.json is damaged"):
        report.all_tables(tmp_path, report.results(tmp_path))
