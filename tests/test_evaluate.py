"""What evaluate.py promises: predictions before runs, provenance, honest gaps, one line for a mistake."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

import evaluate
from engine.parts import Options
from lab import bench, report, stats
from lab.run import Run


def arguments(out: Path, **more: object) -> Namespace:
    given = {
        "full": False,
        "final": False,
        "tune": False,
        "worlds": 2,
        "weights": str(out / "none"),
        "model": "",
        "out": str(out),
    }
    return Namespace(**given | more)


def test_a_run_without_weights_says_what_makes_them(tmp_path: Path) -> None:
    result = evaluate.measure("drift", arguments(tmp_path))
    assert {claim["verdict"] for claim in result["claims"]} == {"not measured"}
    table = report.claim_table(result)
    assert "not measured" in table
    assert "python train.py --stage base" in table
    assert [path.name for path in tmp_path.glob("*.json")] == ["drift.json"]


def test_predictions_are_stored_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(run: Run) -> None:
        raise RuntimeError("power cut")

    (tmp_path / "memory.json").write_text("the last result")
    monkeypatch.setitem(evaluate.COMMANDS, "memory", dies)
    with pytest.raises(RuntimeError):
        evaluate.measure("memory", arguments(tmp_path))
    assert (tmp_path / "memory.json").read_text() == "the last result"
    stored = json.loads((tmp_path / "memory.pending.json").read_text())
    assert stored["raw"] == {}
    assert {claim["verdict"] for claim in stored["claims"]} == {"not measured"}
    assert ">= 6" in {claim["predicted"] for claim in stored["claims"]}


def test_a_claim_without_its_row_is_an_error_and_what_was_found_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(run: Run) -> None:
        run.put("camera, uniform", {"coverage@4": 1.0})

    monkeypatch.setitem(evaluate.COMMANDS, "retrieval", forgets)
    with pytest.raises(ValueError, match="nearest is 'coverage@4'"):
        evaluate.measure("retrieval", arguments(tmp_path))
    stored = json.loads((tmp_path / "retrieval.json").read_text())
    assert stored["raw"] == {"camera, uniform/coverage@4": [1.0]}


def test_a_memory_of_another_world_needs_another_world(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--worlds must be 2 or more"):
        evaluate.measure("memory", arguments(tmp_path, worlds=1))


def test_one_formula_gives_25_79_fps_from_1_551_s_and_905_tf() -> None:
    released = bench.segment_flops(Options(preset="5b"))[1]
    assert round(40 / 1.551, 2) == 25.79
    assert released / 1e12 == pytest.approx(905.5, abs=0.3)


def test_retrieval_is_measured_without_a_model_and_the_oracle_is_1(tmp_path: Path) -> None:
    raw = evaluate.measure("retrieval", arguments(tmp_path, worlds=1))["raw"]
    assert np.allclose(raw["greedy oracle/coverage@5"], 1)
    shares = [x for key, x in raw.items() if key.endswith("coverage@5")]
    assert 0 <= np.min(shares) <= np.max(shares) <= 1.3
    assert len(raw["recent/coverage@5"]) == 1
    assert raw["camera, uniform/ms"]


def test_tables_are_rebuilt_from_the_json_alone_and_name_hardware_and_command(
    tmp_path: Path,
) -> None:
    out = tmp_path / "results"
    readme = tmp_path / "README.md"
    readme.write_text("# x\n<!-- table:moe -->\nold\n<!-- /table -->\nkept\n")
    evaluate.measure("moe", arguments(out))
    report.report(out, readme, tmp_path / "figures")
    first = readme.read_text()
    assert "old" not in first
    assert "kept" in first
    assert "`python evaluate.py moe --quick --worlds " in first
    assert "cores" in first
    report.report(out, readme, tmp_path / "figures")
    assert readme.read_text() == first


def test_the_last_worlds_have_a_folder_of_their_own(tmp_path: Path) -> None:
    evaluate.measure("moe", arguments(tmp_path))
    evaluate.measure("moe", arguments(tmp_path, final=True))
    stored = json.loads((tmp_path / "final/moe.json").read_text())
    assert "--final" in stored["command"]
    readme = tmp_path / "README.md"
    marks = [f"<!-- table:{name} -->\n<!-- /table -->\n" for name in ("moe", "final-moe")]
    readme.write_text("".join(marks))
    report.report(tmp_path, readme, tmp_path / "figures")
    assert "2 final worlds" in readme.read_text()
    assert "2 test worlds" in readme.read_text()


def test_arms_are_compared_and_stored_beside_their_folder(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="intervals need scipy; pip install scipy")
    for arm, value in (("none-0", 1.0), ("real-0", 3.0)):
        (tmp_path / "buffer" / arm).mkdir(parents=True)
        measured = evaluate.measure("moe", arguments(tmp_path / "buffer" / arm))
        measured["claims"][0] |= {"value": value}
        (tmp_path / "buffer" / arm / "moe.json").write_text(json.dumps(measured))
    evaluate.main(["compare", "--out", str(tmp_path / "buffer")])
    stored = json.loads((tmp_path / "compare-buffer.json").read_text())
    assert "--against none" in stored["table"][-1]
    row = next(line for line in stored["table"] if "| real |" in line)
    assert "+2" in row


def test_a_missing_scipy_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ValueError("intervals need scipy; type: pip install scipy")

    monkeypatch.setattr(stats, "scipy_stats", missing)
    with pytest.raises(ValueError, match="pip install scipy"):
        evaluate.main(["memory", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--worlds -1", "--worlds must not be negative, got -1"),
        ("--weights nowhere", "--weights nowhere does not exist"),
        ("--final --tune", "--final and --tune contradict each other"),
        ("--quick --full", "--full and --quick contradict each other"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_measured(
    flags: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(evaluate.COMMANDS, "moe", lambda run: pytest.fail("measured"))
    with pytest.raises(ValueError, match=says):
        evaluate.main(["moe", "--out", str(tmp_path / "out"), *flags.split()])
    assert not (tmp_path / "out").exists()


def test_results_elsewhere_change_no_page_of_ours(tmp_path: Path) -> None:
    ours = (evaluate.cli.beside("README.md"), evaluate.cli.beside("results", "README.md"))
    before = [page.read_bytes() for page in ours]
    with pytest.raises(ValueError, match="no folder"):
        evaluate.main(["report", "--out", str(tmp_path / "nothing")])
    evaluate.main(["report", "--out", str(tmp_path)])
    assert [page.read_bytes() for page in ours] == before


def test_a_folder_without_arms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no measured arms below"):
        evaluate.main(["compare", "--out", str(tmp_path / "nothing")])
    assert not list(tmp_path.iterdir())


def test_a_misspelt_command_is_guessed() -> None:
    with pytest.raises(ValueError, match="did you mean memory"):
        evaluate.main(["memroy"])
