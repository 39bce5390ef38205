"""What every test file shares: one thread, no network, no leftovers."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # waiting threads sleep: spinning ones starve a busy machine

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import make_studio, shaken  # noqa: E402
from walking import IMAGE, OPTIONS, walk  # noqa: E402

import dit  # noqa: E402
import moe  # noqa: E402
import realtime  # noqa: E402
from engine import parts  # noqa: E402
from lab.players import Player  # noqa: E402

torch.set_num_threads(1)  # small tensors: a second thread costs more than it gives
_connect = socket.socket.connect


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the network: a connection that leaves the machine is an error, not a wait."""

    def connect(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "unix"
        if host not in ("127.0.0.1", "localhost", "::1", "unix"):
            raise OSError(f"tests may only connect to this machine, not to {host}")
        return _connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a micro model can be trained."""
    folder = tmp_path_factory.mktemp("studio")
    make_studio(folder)
    return folder


@pytest.fixture
def experts() -> moe.Experts:
    torch.manual_seed(0)
    return shaken(moe.build("micro-moe"))


@pytest.fixture
def scene() -> SimpleNamespace:
    """What a micro network is asked: a context and noise."""
    torch.manual_seed(1)
    c = dit.PRESETS["micro"]
    return SimpleNamespace(context=dit.random_context(c), x=torch.randn(1, c.in_dim, 10, 8, 8))


@pytest.fixture(scope="module")
def session() -> realtime.Session:
    """A micro session of random weights, in one process."""
    return realtime.Session(OPTIONS)


@pytest.fixture(scope="module")
def three(session: realtime.Session) -> list[realtime.Chunk]:
    """Its first three segments; whoever wants to go on resets it."""
    session.reset(IMAGE)
    return walk(session, 3)


@pytest.fixture(scope="module")
def dreamer() -> Player:
    """A micro model with random weights that walks as the laboratory's models do."""
    torch.manual_seed(0)
    choice = parts.Options(preset="micro", weights="random", steps=1, dtype="float32", device="cpu")
    nets, meta = parts.load_parts(parts.resolve(choice), "dit", "encoder", "decoder")
    return Player("random", choice, meta, nets)
