"""The law of the page: how much may stand on it, so that a stranger can read it.

    python tests/law.py     what breaks the law, a line each; exit 1 if anything does

One statement says one idea: few tokens on a line, no three assignments in one, no function that hides
its name. A page has an end: long functions and long files hold two ideas. And somebody has to say why:
a share of the lines is prose, docstrings or comments on lines of their own. The limits were read off
code that people learn from: nanoGPT has 9 tokens on a line, nanochat 8.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AT_MOST = {
    "lines": 500,
    "columns of the widest line": 110,
    "columns that 95 % of the lines keep to": 100,
    "tokens per line of code": 12.0,
    "% of crowded lines": 3.0,
    "assignments of three values at once": 0,
    "lambdas with a name": 0,
    "lines of the longest function": 60,
}
CROWDED = 30  # tokens on a line
PROSE = 12.0  # % of all lines, at least
CHAPTER = 20.0  # of a chapter of the paper, which argues what it computes
NO_CHAPTERS = {"world", "data", "train", "play", "evaluate", "export"}  # at the top level
SHORT = 40  # lines of a file that needs none
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
HAS_DOCSTRING = ast.Module | ast.ClassDef | FUNCTION


def tracked() -> list[Path]:
    """Every file of Python that git knows, or that lies where it will."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in sorted(listed.stdout.split())]
    return [path for path in paths if path.exists()]


def prose_lines(tree: ast.Module, lines: list[str]) -> set[int]:
    """The numbers of the lines that are docstring or comment."""
    numbers = {n for n, line in enumerate(lines, 1) if line.lstrip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, HAS_DOCSTRING) and ast.get_docstring(node) is not None:
            first = node.body[0]
            numbers |= set(range(first.lineno, first.end_lineno + 1))
    return {n for n in numbers if lines[n - 1].strip()}


def packs_three(node: ast.AST) -> bool:
    """a, b, c = x, y, z"""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return isinstance(node.targets[0], ast.Tuple) and len(node.value.elts) >= 3


def names_a_lambda(node: ast.AST) -> bool:
    """f = lambda: ..., alone or among others"""
    if not isinstance(node, ast.Assign):
        return False
    values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
    return any(isinstance(value, ast.Lambda) for value in values)


def measure(source: str) -> tuple[dict[str, float], float]:
    """What AT_MOST names, and the share of prose in %.

    Blank lines count for the length of a file alone; a docstring is prose, and no code.
    """
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    lines = source.splitlines()
    written = [n for n, line in enumerate(lines, 1) if line.strip()]
    prose = prose_lines(tree, lines)
    code = [n for n in written if n not in prose]
    widths = sorted(len(lines[n - 1]) for n in written) or [0]

    stream = tokenize.generate_tokens(io.StringIO(source).readline)
    tokens = Counter(token.start[0] for token in stream if token.type not in LAYOUT)
    crowded = [n for n in code if tokens[n] > CROWDED]
    functions = [node for node in nodes if isinstance(node, FUNCTION)]
    lengths = [node.end_lineno - node.lineno + 1 for node in functions]
    values = (
        len(lines),
        widths[-1],
        widths[int(0.95 * (len(widths) - 1))],
        sum(tokens[n] for n in code) / max(1, len(code)),
        100 * len(crowded) / max(1, len(code)),
        sum(map(packs_three, nodes)),
        sum(map(names_a_lambda, nodes)),
        max(lengths, default=0),
    )
    figures = dict(zip(AT_MOST, values, strict=True))
    return figures, 100 * len(prose) / max(1, len(written))


def breaches(path: Path) -> list[str]:
    """What this file breaks. A test may be long, and says in its names what others say in prose."""
    figures, prose = measure(path.read_text())
    is_test = path.name.startswith(("test_", "conftest"))
    found = []
    for name, limit in AT_MOST.items():
        if round(figures[name], 1) > limit and not (is_test and name == "lines"):
            found.append(f"{figures[name]:.4g} {name}, at most {limit:g}")

    least = CHAPTER if path.parent == ROOT and path.stem not in NO_CHAPTERS else PROSE
    needs_prose = figures["lines"] >= SHORT and not is_test
    if needs_prose and round(prose) < least:
        found.append(f"{prose:.0f} % of prose, at least {least:g} %")
    return [f"{path.relative_to(ROOT)}: {words}" for words in found]


def main() -> int:
    found = {path: breaches(path) for path in tracked()}
    guilty = [words for words in found.values() if words]
    for words in guilty:
        print("\n".join(words))
    print(f"{len(guilty)} of {len(found)} files break the law of the page")
    return 1 if guilty else 0


if __name__ == "__main__":
    sys.exit(main())
