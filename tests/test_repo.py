"""The promises of the repository: its rooms, its arrows, its pages, its demos, its README."""

import ast
import io
import re
import runpy
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import law
import numpy as np
import pytest
import torch

from lab import report

ROOT = Path(__file__).resolve().parent.parent
PAPER = {
    "flow",
    "attention",
    "actions",
    "block",
    "dit",
    "camera",
    "released",
    "context",
    "memory",
    "error_buffer",
    "dmd",
    "vae",
    "vae_blocks",
    "lightvae",
    "quant",
    "moe",
    "realtime",
}
ROOMS = {  # the files of every folder; a new one is a decision, made here
    "engine": {
        "cli",
        "configs",
        "weights",
        "optim",
        "checkpoint",
        "flags",
        "run",
        "clips",
        "mistakes",
        "pictures",
        "ranks",
        "meeting",
        "spawned",
        "parts",
        "actors",
        "sizes",
        "walked",
        "exported",
    },
    "game": {"scene", "paint", "render", "figure", "explore", "walks"},
    "dataset": {"episode", "film", "chords", "wsad", "readers", "recorder", "prompt"},
    "page": {
        "server",
        "screen",
        "controls",
        "commands",
        "player",
        "opening",
        "start",
        "game",
        "recording",
        "folder",
        "film",
        "panels",
        "link",
        "wayback",
    },
    "lab": {
        "metrics",
        "truth",
        "registration",
        "stats",
        "claims",
        "worlds",
        "players",
        "run",
        "sanity",
        "revisits",
        "rivals",
        "outside",
        "guests",
        "retrieval",
        "walks",
        "models",
        "costs",
        "bench",
        "plain",
        "gpu",
        "failures",
        "report",
        "summary",
        "figures",
    },
}
ARROWS = {  # who may import whom; the name of a folder stands for all that is in it
    "flow": set(),
    "attention": set(),
    "actions": {"attention"},
    "block": {"attention", "actions"},
    "dit": {"attention", "actions", "block"},
    "camera": set(),
    "released": {"camera"},
    "context": {"camera", "released"},
    "memory": {"camera", "context", "released"},
    "error_buffer": set(),
    "dmd": {"flow", "camera", "context", "memory"},
    "vae": {"vae_blocks"},
    "vae_blocks": set(),
    "lightvae": {"vae", "vae_blocks"},
    "quant": set(),
    "moe": {"dit"},
    "realtime": PAPER - {"realtime", "dmd", "error_buffer"} | {"engine", "dataset"},
    "world": {"camera", "game"},
    "data": {"camera", "dataset", "world", "engine.cli"},
    "engine": PAPER - {"realtime"} | {"engine", "dataset"},
    "game": {"camera", "game"},
    "dataset": {"camera", "dataset", "world"},
    "page": PAPER | {"page", "dataset", "engine", "world"},
    "lab": PAPER | {"lab", "engine", "dataset", "world"},
    "train": PAPER | {"engine", "dataset", "data"},
    "play": PAPER | {"page", "dataset", "engine", "world"},
    "evaluate": PAPER | {"engine", "dataset", "world", "lab"},
    "export": PAPER | {"engine", "dataset", "world"},
}
PROGRAMS = {"train", "play", "evaluate", "export"}
TORCH_ONLY = PAPER - {"moe", "realtime"}
FORBIDDEN = {"einops", "timm", "diffusers", "hydra", "wandb", "cv2", "gradio", "flask"}
TOP = sorted(ROOT.glob("*.py"))
FILES = TOP + sorted(path for room in ROOMS for path in (ROOT / room).glob("*.py"))
HOUSE = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
DEMOS = [path.name for path in TOP if path.stem not in PROGRAMS]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Every module that a file imports: of the house with its folder, others by their first name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            found |= {name if name in HOUSE else name.split(".")[0] for name in names}
        else:
            inside = {f"{node.module}.{name}" for name in names} & set(HOUSE)
            module = node.module if node.module in HOUSE else node.module.split(".")[0]
            found |= inside or {module}
    return found


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


# ---- the house ---------------------------------------------------------------------------------


def test_there_is_no_file_outside_the_list() -> None:
    assert {path.stem for path in TOP} <= set(ARROWS) - set(ROOMS), "no further module; see README"
    for room, names in ROOMS.items():
        found = {path.stem for path in (ROOT / room).glob("*.py")}
        assert found <= names | {"__init__"}, room
        folders = {path.name for path in (ROOT / room).iterdir() if path.is_dir()}
        assert folders <= {"__pycache__"}, f"a folder within {room}/"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    found = imports(path)
    room = path.parent.name if path.parent != ROOT else path.stem
    for other in found & set(HOUSE):
        allowed = other in ARROWS[room] or other.split(".")[0] in ARROWS[room]
        assert allowed, f"{name_of(path)} imports {other}"
    assert not found & PROGRAMS, "a program is run, never imported"
    assert not found & FORBIDDEN
    if path.parent == ROOT and path.stem in TORCH_ONLY:
        others = found & {"numpy", "safetensors", "imageio", "PIL"}
        assert not others, "model files import torch only"
    if room == "game":
        assert "torch" not in found, "the game never meets a network"


def test_nothing_imports_in_a_circle() -> None:
    edges = {name: imports(path) & set(HOUSE) for name, path in HOUSE.items()}
    while leaves := {name for name, found in edges.items() if not found & set(edges)}:
        edges = {name: found for name, found in edges.items() if name not in leaves}
    assert not edges, f"in a circle, or above one: {sorted(edges)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_begins_with_its_one_sentence(path: Path) -> None:
    tree = ast.parse(path.read_text())
    first, *rest = ast.get_docstring(tree).splitlines()
    assert first.endswith(".") and len(first) <= 100
    if path.name == "__init__.py":
        assert not rest and len(tree.body) == 1, "a folder says what it is for, and defines nothing"


# ---- its pages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", law.tracked(), ids=name_of)
def test_a_page_keeps_the_law(path: Path) -> None:
    broken = law.breaches(path)
    assert not broken, "\n".join(broken)


def promised_lines(path: Path) -> set[str]:
    """The n of the lines `formula (n)` or `(n) formula` in a file's docstring."""
    numbers = set()
    for line in ast.get_docstring(ast.parse(path.read_text())).splitlines():
        found = re.search(r"^\s+\((\d{1,2})\)\s|\s\((\d{1,2})\)$", line)
        if found:
            numbers.add(found[1] or found[2])
    return numbers


def computed_lines(path: Path) -> set[str]:
    """The n of the comments `# (n)`; one may name several."""
    numbers = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT and re.match(r"# \(\d", token.string):
            numbers |= set(re.findall(r"\((\d{1,2})\)", token.string))
    return numbers


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_numbered_lines_stand_beside_the_code_that_computes_them(path: Path) -> None:
    promised = promised_lines(path)
    computed = computed_lines(path)
    assert promised == computed, "a formula without code, or code without its formula"


@pytest.mark.parametrize("path", [ROOT / f"{name}.py" for name in sorted(PAPER)], ids=name_of)
def test_a_chapter_s_docstring_is_a_page(path: Path) -> None:
    lines = ast.get_docstring(ast.parse(path.read_text())).splitlines()
    assert len(lines) <= 60
    assert "tests/test_" in "".join(lines), "where are its tests?"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_stub_is_left(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            statements = [child for child in node.body if not is_text(child)]
            empty = all(isinstance(child, ast.Pass) for child in statements)
            assert not empty, f"{where} {node.name} is empty"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where} bare except"
    assert not re.search(r"TODO|FIXME|NotImplementedError", path.read_text())


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


# ---- what runs ---------------------------------------------------------------------------------


def test_importing_does_nothing(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(HOUSE)}"
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())


@pytest.fixture
def as_before() -> Iterator[None]:
    """What a program sets in its process is put back."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng([]), torch.set_grad_enabled(torch.is_grad_enabled()):
        yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("name", DEMOS)
def test_every_demo_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In this process: that a file can be run from any folder is asked of two others."""
    if 'if __name__ == "__main__"' not in (ROOT / name).read_text():
        pytest.skip("no demo of its own")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
    assert re.search(r"\d", capsys.readouterr().out), "a demo prints its claim as numbers"
    assert not list(tmp_path.iterdir()), "a demo writes no file"


@pytest.mark.long
def test_the_bench_runs_from_any_folder(tmp_path: Path) -> None:
    words = ["--suite", "model", "--preset", "micro", "--out", tmp_path]
    done = run(ROOT / "lab/bench.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| what | paper |" in done.stdout


# ---- what is written about it ------------------------------------------------------------------


def test_the_map_in_the_readme_is_true() -> None:
    """Every top-level file and every folder, with its first sentence; the chapters are numbered."""
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| *(\d*) *\| `([\w.]+)/?` \|[^|]*\|([^|]*)\|$", readme, flags=re.M)
    assert {name for _, name, _ in rows} == {path.name for path in TOP} | set(ROOMS)
    numbers = [int(number) for number, _, _ in rows if number]
    assert numbers == list(range(1, len(numbers) + 1))
    for _, name, sentence in rows:
        path = ROOT / name
        page = path / "__init__.py" if path.is_dir() else path
        doc = ast.get_docstring(ast.parse(page.read_text()))
        assert sentence.strip() == doc.splitlines()[0].strip(), name


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 220
    prose = [line for line in lines if not line.startswith("|")]
    assert max(map(len, prose)) <= 110


def test_the_readme_s_own_data_becomes_an_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    walk = np.tile(np.eye(4), (9, 1, 1))
    walk[:, 2, 3] = 0.1235 * np.arange(9)  # metres, straight on
    np.save("c2w.npy", walk)
    np.save("frames.npy", np.full((9, 64, 64, 3), 128, np.uint8))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (names["keys"].keyboard[:8, 0] == 1).all(), "walking straight on is W"
    done = run(ROOT / "data.py", "view", "datasets/mine/train/garden_000000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_command_of_the_readme_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "pip install -r requirements.txt && python play.py --image assets/start.png" in readme
    assert "pip install -r requirements.txt && pytest -q" in readme
    for script, rest in re.findall(r"python ((?:\w+/)?\w+\.py)([^\n`#&|]*)", readme):
        assert (ROOT / script).exists(), script
        pages = (
            [ROOT / script, ROOT / "engine/flags.py"] if script == "train.py" else [ROOT / script]
        )
        source = "".join(path.read_text() for path in pages)
        for flag in re.findall(r"(?<!\S)--([a-z0-9-]+)", rest):
            field = rf"^ +{flag.replace('-', '_')}: \w+ = opt\("  # of engine/flags.py
            known = re.search(rf'"(--)?{flag}"|{field}', source, re.M)
            assert known, f"{script} knows no --{flag}"


def test_the_project_speaks_of_itself_alone() -> None:
    patterns = ("*.py", "*.md", "*.html", "*.toml", "*/*.py", "*/*.html", ".ci/run")
    for path in [path for pattern in patterns for path in ROOT.glob(pattern)]:
        text = path.read_text()
        if path.name != "test_repo.py":
            assert not re.search(r"/(work|root|farm)/", text), f"path of a machine in {path.name}"


def test_every_test_that_a_page_names_exists() -> None:
    for path in [*law.tracked(), *ROOT.glob("*.md"), *ROOT.glob("results/*.md")]:
        for name in re.findall(r"tests/test_\w+\.py", path.read_text()):
            assert (ROOT / name).exists(), f"{name_of(path)} names {name}"


def test_the_tables_of_the_readme_and_of_results_are_what_the_json_say(tmp_path: Path) -> None:
    results = shutil.copytree(ROOT / "results", tmp_path / "results")
    readme = Path(shutil.copy(ROOT / "README.md", tmp_path))
    report.report(results, readme, tmp_path / "figures")
    again = "python evaluate.py report writes both anew"
    assert readme.read_text() == (ROOT / "README.md").read_text(), again
    assert (results / "README.md").read_text() == (ROOT / "results/README.md").read_text(), again
    assert readme.read_text().count("<!-- table:") == 1
