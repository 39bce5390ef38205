"""What pictures.py promises: the arms of a look differ in what they are told, and in nothing else."""

from pathlib import Path

import pytest
import torch

import flow
from dataset import film
from engine import flags, pictures, run


class Told:
    """A context of which every change is itself."""

    past = None

    def drop_memory(self) -> "Told":
        return self

    def to(self, dtype: torch.dtype) -> "Told":
        return self


def test_all_arms_of_a_look_have_the_same_noise_between_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x0 = torch.zeros(2, 1, 10, 2, 2)
    told = Told()
    added = []

    def sample(*given: object, generator: torch.Generator) -> torch.Tensor:
        added.append(torch.randn(3, generator=generator))
        return x0

    monkeypatch.setattr(flow, "sample", sample)
    monkeypatch.setattr(pictures, "draw", lambda clips, here, step: (x0, told))
    monkeypatch.setattr(pictures, "actions_of_the_next", lambda context: context)
    monkeypatch.setattr(pictures, "decoded", lambda vae, past, new: torch.zeros(2, 40, 4, 4, 3))
    monkeypatch.setattr(pictures, "record", lambda here, line: None)
    for name in ("write_png", "write_mp4"):
        monkeypatch.setattr(film, name, lambda path, shown: None)
    cfg = flags.parse(["--preset", "micro"])
    here = run.Run(tmp_path, cfg, torch.device("cpu"), torch.float32)
    pictures.look(here, None, None, None, method="renoise")
    assert len(added) == 3
    assert torch.equal(added[0], added[1]) and torch.equal(added[0], added[2])
