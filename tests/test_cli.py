"""The command line that all programs share: one line that helps, exit status 2, and any current folder."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import cli


def parser() -> cli.Parser:
    p = cli.Parser("walk.py", "Walk.")
    p.add_argument("command", choices=("make", "check", "view"))
    p.add_argument("paths", nargs="*")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--data-folder", default="")
    return p


def ending(monkeypatch: pytest.MonkeyPatch, main: Callable, *argv: str) -> object:
    """What a program exits with."""
    monkeypatch.setattr(sys, "argv", ["walk.py", *argv])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code


def fail(error: BaseException) -> Callable:
    def main(argv: list[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    "typed, says",
    [
        (["make", "--stpes", "5"], "unknown argument --stpes; did you mean --steps?"),
        (["make", "--stpes=5"], "unknown argument --stpes; did you mean --steps?"),
        (["make", "--data", "x"], "unknown argument --data"),
        (["make", "--qqq"], "unknown argument --qqq; see --help"),
        (["mkae"], "did you mean make?"),
        (["frobnicate"], r"choose from '?make'?, '?check'?, '?view'?\)$"),
        (["make", "--steps", "many"], "--steps: invalid int value: 'many'"),
        ([], "required: command"),
    ],
)
def test_a_wrong_word_is_named_with_what_was_probably_meant(typed: list, says: str) -> None:
    for parse in (parser().parse_args, parser().parse_intermixed_args):
        with pytest.raises(ValueError, match=says):
            parse(typed)


def test_right_words_are_argparse_as_ever() -> None:
    args = parser().parse_args(["check", "a", "b", "--steps", "5"])
    assert (args.command, args.paths, args.steps) == ("check", ["a", "b"], 5)
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["--help"])
    assert end.value.code == 0


@pytest.mark.parametrize(
    "error", [ValueError("--steps must be 1 or more, got 0"), PermissionError(13, "denied", "x")]
)
def test_a_mistake_is_one_line_and_exit_status_2(error, monkeypatch, capsys) -> None:
    assert ending(monkeypatch, fail(error)) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_too_little_memory_is_one_line_that_says_what_to_take_less_of(error, monkeypatch, capsys):
    assert ending(monkeypatch, fail(error)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory" in said and "a smaller --batch" in said


def test_debug_shows_the_traceback_and_other_errors_are_never_hidden(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["walk.py", "--debug"])
    with pytest.raises(ValueError, match="wrong"):
        cli.run(fail(ValueError("wrong")))
    monkeypatch.setattr(sys, "argv", ["walk.py"])
    with pytest.raises(KeyError):
        cli.run(fail(KeyError("a bug")))


def test_a_program_ends_with_what_main_returns(monkeypatch) -> None:
    assert ending(monkeypatch, len, "a", "b") == 2
    assert ending(monkeypatch, fail(KeyboardInterrupt())) == 130


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_lost_terminal_stops_a_program_unless_nohup_started_it(before) -> None:
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in stops]
    try:
        signal.signal(signal.SIGHUP, before)
        cli.on_stop(fail)
        handled = [signal.getsignal(number) is fail for number in stops]
        assert handled == [True, True, before == signal.SIG_DFL]
    finally:
        for number, handler in zip(stops, handlers, strict=True):
            signal.signal(number, handler)


def test_places_nobody_named_lie_beside_the_code(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.beside("assets", "start.png").exists()
    assert cli.find("assets/start.png") == cli.ROOT / "assets/start.png"
    assert cli.find("nowhere") == Path("nowhere")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/start.png").touch()
    assert cli.find("assets/start.png") == Path("assets/start.png"), (
        "the current folder comes first"
    )
    assert cli.shown(tmp_path / "runs/a") == "runs/a" == cli.shown(Path("runs/a"))
    assert cli.shown(cli.ROOT / "runs") == str(cli.ROOT / "runs")


def test_a_reader_who_has_seen_enough_ends_a_program_in_silence() -> None:
    code = "from engine import cli; cli.run(lambda argv: [print(k) for k in range(10**5)] and 0)"
    command = f"{sys.executable} -c '{code}' | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=cli.ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")


def test_a_terminal_that_knows_few_letters_is_no_error() -> None:
    code = "from engine import cli; cli.run(lambda argv: print('±1 dB'))"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cli.ROOT, env=env, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"?1 dB\n")
