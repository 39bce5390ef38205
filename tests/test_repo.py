"""The promises of the repository: its shape, its arrows, its demos, its README."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate

ROOT = Path(__file__).resolve().parent.parent
LEVEL = {  # who may import whom; a new edge is a decision, made here
    "dit": set(),
    "vae": set(),
    "memory": set(),
    "error_buffer": set(),
    "quant": set(),
    "moe": {"dit"},
    "dmd": {"dit", "memory"},
    "world": {"memory"},
    "data": {"world", "memory"},
    "train": {"dit", "vae", "memory", "error_buffer", "moe", "data", "dmd"},
    "realtime": {"dit", "vae", "memory", "moe", "data", "quant"},
    "play": {"realtime", "data", "world"},
    "evaluate": {
        "realtime",
        "data",
        "world",
        "dit",
        "vae",
        "memory",
        "error_buffer",
        "quant",
        "moe",
        "dmd",
        "train",
    },
}
TORCH_ONLY = {"dit", "vae", "memory", "error_buffer", "quant", "dmd"}
FORBIDDEN = {"einops", "timm", "diffusers", "hydra", "wandb", "cv2", "gradio", "flask"}
FILES = sorted(path for path in ROOT.glob("*.py"))
DEMOS = [path.name for path in FILES if path.stem not in ("train", "play", "evaluate")]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, top level names only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_there_is_no_file_outside_the_list() -> None:
    assert {path.stem for path in FILES} <= set(LEVEL), "no further module; see README"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_imports_point_one_way(path: Path) -> None:
    found = imports(path)
    assert found & set(LEVEL) <= LEVEL[path.stem]
    assert not found & FORBIDDEN
    if path.stem in TORCH_ONLY:
        assert not found & {"numpy", "safetensors", "imageio", "PIL"}, (
            "model files import torch only"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_begins_with_its_one_sentence(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_no_stub_is_left(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = [
                n
                for n in node.body
                if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
            ]
            assert body and not all(isinstance(n, ast.Pass) for n in body), (
                f"{path.name}:{node.lineno} {node.name} is empty"
            )
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno} bare except"
    assert not re.search(r"TODO|FIXME|NotImplementedError", path.read_text())


def test_importing_does_nothing(tmp_path: Path) -> None:
    names = ", ".join(path.stem for path in FILES)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", DEMOS)
def test_every_demo_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / name)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert any(character.isdigit() for character in done.stdout), (
        "a demo prints its claim as numbers"
    )
    assert not list(tmp_path.iterdir()), "a demo writes no file"


def test_the_readme_table_is_true() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)\.py` \|([^|]*)\|([^|]*)\| `tests/\w+\.py` \|$", readme, flags=re.M
    )
    assert {row[0] for row in rows} == {path.stem for path in FILES}
    for stem, _, sentence in rows:
        text = (ROOT / f"{stem}.py").read_text()
        assert sentence.strip() == ast.get_docstring(ast.parse(text)).splitlines()[0].strip(), stem


def test_every_command_of_the_readme_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "pip install -r requirements.txt && python play.py --image assets/start.png" in readme
    assert "pip install -r requirements.txt && pytest -q" in readme
    for script, rest in re.findall(r"python (\w+\.py)([^\n`#&|]*)", readme):
        assert (ROOT / script).exists(), script
        source = (ROOT / script).read_text()
        for flag in re.findall(r"(?<!\S)--([a-z0-9-]+)", rest):
            assert flag in source or flag.replace("-", "_") in source, f"{script} knows no --{flag}"


def test_the_project_speaks_of_itself_alone() -> None:
    tracked = [
        path
        for pattern in ("*.py", "*.md", "*.html", "*.toml", "tests/*.py", ".ci/run")
        for path in ROOT.glob(pattern)
    ]
    for path in tracked:
        text = path.read_text()
        if path.name != "test_repo.py":
            assert not re.search(r"/(work|root|farm)/", text), f"path of a machine in {path.name}"


def test_every_table_of_results_in_the_readme_is_what_the_json_say(tmp_path: Path) -> None:
    before = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(before)
    evaluate.report(ROOT / "results", tmp_path / "README.md", tmp_path / "figures")
    assert (tmp_path / "README.md").read_text() == before, "python evaluate.py report rewrites them"
    assert before.count("<!-- table:") >= 5
