"""What every test file shares: one thread, no network, no leftovers."""

import os
import socket

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # waiting threads sleep: spinning ones starve a busy machine

import pytest  # noqa: E402
import torch  # noqa: E402

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
