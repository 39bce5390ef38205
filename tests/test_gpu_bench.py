"""What a rented hour on a GPU will run, walked on a machine without one."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from lab import gpu, report

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_the_script_ends_in_one_line() -> None:
    done = subprocess.run(
        ["bash", ROOT / "tests/gpu.sh"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no CUDA device here") and done.stdout.count("\n") == 1


@pytest.mark.long
@pytest.mark.parametrize("part", ["parity", "decoders", "segment"])
def test_every_part_can_be_walked(part: str, tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--preset", "micro", "--out", str(tmp_path), "--parts", part]
    assert gpu.main(flags) == 0
    assert not (tmp_path / f"gpu-{part}.json").exists(), "it is the place of what a GPU said"
    stored = json.loads((tmp_path / f"gpu-{part}-micro-cpu.json").read_text())
    assert f"`python lab/gpu.py --parts {part} --preset micro --device cpu`" in stored["table"][-1]
    assert stored["rows"] and stored["claims"] == {}, "only the released size answers a claim"
    if part == "parity":
        float32, bfloat16, int8, _ = (row[4] for row in stored["rows"])
        assert float32 < 1e-5 < bfloat16 < 0.1 and int8 < 0.2


def test_a_part_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--out", str(tmp_path), "--parts", "parity segmnt"]
    with pytest.raises(ValueError, match="got 'segmnt'; did you mean segment?"):
        gpu.main(flags)
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device must be auto, cpu, .* got 'banana'"):
        gpu.main(["--device", "banana", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_a_part_that_cannot_run_is_one_line_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(options: object) -> None:
        raise RuntimeError("out of memory\nand a trace")

    monkeypatch.setitem(gpu.PARTS, "segment", broken)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--parts", "segment"]) == 1
    assert capsys.readouterr().out == "segment: not measured (out of memory)\n"
    assert not list(tmp_path.iterdir())


def test_a_claim_that_needs_a_gpu_is_filled_from_what_the_gpu_said(tmp_path: Path) -> None:
    empty = {"value": None, "measure": "needs a GPU", "n": 0, "verdict": "not measured"}
    claims = [empty | {"name": "decode"}, empty | {"name": "other"}]
    stored = {"table": ["x"], "claims": {"decode": 0.7}}
    (tmp_path / "gpu-decoders.json").write_text(json.dumps(stored))
    result = dict.fromkeys(report.ALL_SAY) | {"claims": claims}
    (tmp_path / "vae.json").write_text(json.dumps(result))
    first, second = report.results(tmp_path)["vae"]["claims"]
    assert (first["value"], first["n"], first["verdict"]) == (0.7, 1, "reported")
    assert second["value"] is None
