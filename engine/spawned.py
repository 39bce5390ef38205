"""A rank that rank 0 has started on its own host: it ends with its parent, from its first moment on.

It is told who it is and what to build in one line on its standard input, which stays open for as
long as rank 0 lives: the end of that input is the end of both. Watching begins before torch is
imported, which takes longer on a busy machine than an orphan may live.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start(place: tuple, options: dict) -> subprocess.Popen:
    """A rank; its key travels where nobody else can read it."""
    *facts, key, apart = place
    line = json.dumps({"place": [*facts, key.hex(), apart], "options": options})
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE)
    process.stdin.write(f"{line}\n".encode())
    process.stdin.flush()
    return process


def end_with_parent() -> None:
    os.read(0, 1)  # returns once the other end is closed
    os._exit(1)


def main() -> int:
    """The life of the process."""
    told = json.loads(sys.stdin.buffer.raw.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.path.insert(0, str(ROOT))
    from engine.actors import serve
    from engine.meeting import Place
    from engine.parts import Options

    *facts, key, apart = told["place"]
    return serve(Place(*facts, bytes.fromhex(key), apart), Options(**told["options"]))


if __name__ == "__main__":
    sys.exit(main())
