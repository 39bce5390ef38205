"""One command line for all programs: what a misspelt word meant, where things lie, how a program ends.

    from engine import cli

    def main(argv: list[str]) -> int | None:                 # the exit status; None is 0
        parser = cli.Parser("play.py", "Walk around inside.")
        parser.add_argument("--steps", type=int, default=3)  # all else is argparse's
        args = parser.parse_args(argv)
        ...

    if __name__ == "__main__":
        cli.run(main)

Whatever does not fit raises ValueError (so does the parser) or OSError, and ends as one line on
stderr and exit status 2; so does too little memory. A line says what came, what is allowed and what
to type. Every parser knows --debug, which shows the traceback instead.

Programs run from any folder. What nobody named lies beside the code: cli.beside("assets", "tiny");
what somebody typed is looked for here first, then beside the code: cli.find("assets/tiny").
Two processes that write into one folder ruin it: the first one claims it (cli.claim).
"""

import argparse
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, TextIO

ROOT = Path(__file__).resolve().parents[1]


def beside(*names: str) -> Path:
    """A place beside the code: assets, datasets, runs."""
    return ROOT.joinpath(*names)


def start_pictures() -> list[Path]:
    """As a link counts them, in play.py's page and in the one that export.py makes."""
    return [beside("assets", "start.png"), *sorted(beside("assets", "gallery").glob("*.png"))]


def find(typed: str | Path) -> Path:
    """What a typed path means: a place in the current folder, else one beside the code, else itself."""
    there = beside(str(typed))
    return there if there.exists() and not Path(typed).exists() else Path(typed)


def shown(path: Path) -> str:
    """A path as one would type it here: relative if it lies below the current folder."""
    absolute = Path(os.path.abspath(path))
    here = Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else path)


def claim(folder: Path) -> TextIO:
    """A folder for this process alone, until the file is closed or the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "a")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return lock  # a system without locks of this kind: nobody is refused
    except OSError as error:
        lock.close()
        raise ValueError(
            f"another process is at work in {shown(folder)}: wait for it, or choose another name"
        ) from error
    return lock


def printable(text: str, letters: int = 300) -> str:
    """What a stranger's file says, fit for a terminal: one line, no escape codes, not endless."""
    plain = re.sub(r"\x1b\[\d*m", "", text)
    return "".join(c if c.isprintable() else "?" for c in plain)[:letters]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not known."""
    near = difflib.get_close_matches(word, [*known], 1)
    return f"; did you mean {near[0]}?" if near else "; see --help"


class Parser(argparse.ArgumentParser):
    """argparse, but no abbreviations, and a mistake raises ValueError with what was probably meant."""

    def __init__(self, program: str, description: str, **options: object) -> None:
        super().__init__(program, description=description, allow_abbrev=False, **options)
        self.add_argument("--debug", action="store_true", help="mistakes with their tracebacks")

    def error(self, message: str) -> NoReturn:
        # argparse tells all its errors here as a text; two kinds of them are unknown words
        unknown = re.match(r"unrecognized arguments: ([^\s=]+)", message)
        if unknown:
            flags = [name for action in self._actions for name in action.option_strings]
            raise ValueError(f"unknown argument {unknown[1]}{did_you_mean(unknown[1], flags)}")
        choice = re.match(r".*invalid choice: '?([^\s')]*)'? \(choose from (.*)\)", message)
        if choice:
            allowed = re.findall(r"[\w.-]+", choice[2])
            message += did_you_mean(choice[1], allowed).replace("; see --help", "")
        raise ValueError(message)


def on_stop(handle: Callable[..., None]) -> None:
    """Call this at Ctrl-C, at kill, and where the terminal goes away, unless nohup says to go on."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # not every system has all three
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, handle)


def is_too_little_memory(error: BaseException) -> bool:
    """Whether less was to be had than was asked for: numpy, torch and GPUs say it differently."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text


def fall_silent() -> None:
    """Nobody reads what is printed from here on: `| head` has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """The last line of a program: its exit status, or its mistake in one line and 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no σ is told "?"
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:
        fall_silent()
        sys.exit(141)
    except (ValueError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if "--debug" in sys.argv or not is_too_little_memory(error):
            raise
        reason = (str(error).splitlines() or ["no more could be had"])[0]
        print(
            f"error: out of memory ({reason}): take less at once, by a smaller --batch, --size or "
            "--preset; README, Troubleshooting, has more",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
