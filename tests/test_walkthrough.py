"""WALKTHROUGH.md says what its own code prints.

The python blocks of the document are run in order, in one namespace, with the shipped weights. Words and
whole numbers must stand in the document exactly (they are shapes, frames and latents), numbers with a point
nearly, and of a picture, whose lines begin with a bar, nearly every character within one shade.

    python tests/test_walkthrough.py      write down anew what the blocks print, after other weights
"""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "WALKTHROUGH.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.S)
NUMBER = re.compile(r"-?\d+\.\d+")
SHADES = " .:-=+*#%@"  # of the document's own pictures, dark to bright
NEAR = 0.03  # of a number with a point: of itself, or of one
ALIKE = 0.97  # of a picture's characters


def run_blocks(text: str) -> list[str]:
    """What every block prints; the files that it names lie beside the document."""
    printed = []
    namespace = {"__name__": "walkthrough"}
    # the document switches gradients off; whoever comes next in this process wants them on
    with torch.enable_grad(), contextlib.chdir(ROOT):
        for found in BLOCK.finditer(text):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(found[1], str(DOCUMENT), "exec"), namespace)
            printed.append(out.getvalue())
    return printed


def is_picture(line: str) -> bool:
    return line.startswith("|")


def compare_line(printed: str, written: str) -> None:
    assert NUMBER.sub("0.0", printed) == NUMBER.sub("0.0", written)
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(written), strict=True)
    for now, then in pairs:
        assert abs(float(now) - float(then)) <= NEAR * max(1.0, abs(float(then))), printed


def compare_pictures(printed: str, written: str) -> None:
    assert len(printed) == len(written)
    steps = []
    for now, then in zip(printed, written, strict=True):
        if now in SHADES and then in SHADES:
            steps.append(abs(SHADES.index(now) - SHADES.index(then)))
        else:
            assert now == then
    alike = sum(step <= 1 for step in steps)
    assert alike >= ALIKE * len(steps), "the pictures are others"


@pytest.mark.long
def test_the_walkthrough_prints_what_it_says() -> None:
    text = DOCUMENT.read_text()
    written = [found[2] or "" for found in BLOCK.finditer(text)]
    printed = run_blocks(text)
    assert len(printed) >= 8
    for now, then in zip(printed, written, strict=True):
        now_lines = now.splitlines()
        then_lines = then.splitlines()
        assert len(now_lines) == len(then_lines), now
        for a, b in zip(now_lines, then_lines, strict=True):
            if not is_picture(a):
                compare_line(a, b)
        pictures_now = "".join(filter(is_picture, now_lines))
        pictures_then = "".join(filter(is_picture, then_lines))
        compare_pictures(pictures_now, pictures_then)


def test_the_walkthrough_is_short() -> None:
    lines = DOCUMENT.read_text().splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 110


def rewrite() -> None:
    """The document again, with what its blocks print now."""
    text = DOCUMENT.read_text()
    printed = iter(run_blocks(text))

    def with_output(found: re.Match) -> str:
        output = next(printed)
        shown = f"```text\n{output}```\n" if output else ""
        return f"```python\n{found[1]}```\n{shown}"

    DOCUMENT.write_text(BLOCK.sub(with_output, text))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    rewrite()
