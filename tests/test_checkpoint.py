"""checkpoint.py: what is saved comes back to the bit; what is damaged is named."""

from pathlib import Path

import pytest
import torch

import moe
from engine import checkpoint, optim, weights


class Run:
    """A few steps of training, without a trainer."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.model = moe.build("micro")
        self.ema = optim.average(self.model)
        self.opts = optim.optimizers(self.model, 1e-3, muon=1e-2, dtype=torch.float32)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            g = torch.Generator().manual_seed(self.step)
            for p in self.model.parameters():
                p.grad = torch.randn(p.shape, generator=g)
            optim.update(self.opts, self.model, 1.0, 1.0, self.ema, 0.9)
            self.step += 1

    def save(self, folder: Path) -> None:
        said = {"step": self.step, "stage": "base", "note": "σ"}
        models = {"diffusion_pytorch_model": self.model}
        checkpoint.save(folder, said, models, self.ema, self.opts, extra=torch.ones(2))

    def restore(self, folder: Path) -> dict:
        models = {"diffusion_pytorch_model": self.model}
        state = checkpoint.restore(folder, models, self.ema, self.opts)
        self.step = state["step"]
        return state


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run = Run(seed=0)
    run.train(2)
    run.save(tmp_path)
    return tmp_path


def test_a_restored_run_goes_on_as_if_nothing_had_happened(saved: Path) -> None:
    whole = Run(seed=0)
    whole.train(4)

    other = Run(seed=1)
    state = other.restore(saved)
    assert state["step"] == 2 and torch.equal(state["extra"], torch.ones(2))
    other.train(2)

    for a, b in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.ema, other.ema, strict=True):
        assert torch.equal(a, b)


def test_a_folder_without_a_checkpoint_restores_nothing(tmp_path: Path) -> None:
    run = Run(seed=0)
    assert checkpoint.restore(tmp_path, {"m": run.model}, run.ema, run.opts) == {}


def test_the_checkpoint_just_written_is_kept_whatever_its_number(saved: Path) -> None:
    for step in (7, 9):
        run = Run(seed=0)
        run.step = step
        run.save(saved)
    (saved / "latest").write_text("000007")
    again = Run(seed=0)
    again.restore(saved)
    for step in (8, 3, 4):  # also where the older numbers are all greater
        again.step = step
        again.save(saved)
        assert again.restore(saved)["step"] == step
    assert {path.name for path in (saved / "ckpt").iterdir()} == {"000003", "000004"}


def test_two_exports_of_one_run_are_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    contents = set()
    for i in range(4):
        file = tmp_path / f"export{i}.safetensors"
        checkpoint.export(str(saved), file=str(file))
        contents.add(file.read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("differs", [{"new": "10"}, {"p_memory_off": 1.0}, {"boundary": 0.8}])
def test_experts_that_were_trained_otherwise_are_not_joined(tmp_path: Path, differs: dict) -> None:
    about = {"stage": "moe", "step": 1, "boundary": 0.9, "new": "10 5 2", "p_memory_off": 0.15}
    experts = {"high-first": about, "low": about | differs}
    for name, words in experts.items():
        file = tmp_path / f"{name}.safetensors"
        weights.write_weights(file, {"a": torch.ones(1)}, words | {"expert": name})
    runs = [str(tmp_path / f"{name}.safetensors") for name in experts]
    with pytest.raises(ValueError, match=f"got first, low, which differ in {next(iter(differs))}"):
        checkpoint.export(*runs, file=str(tmp_path / "moe.safetensors"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def replace_with_a_list(file: Path) -> None:
    torch.save([1, 2], file)


def forget_the_optimisers(file: Path) -> None:
    torch.save({"step": 2}, file)


def swap_the_optimisers(file: Path) -> None:
    torch.save({"step": 2, "optimizers": [3, 4]}, file)


@pytest.mark.parametrize(
    "damage",
    [cut, replace_with_a_list, forget_the_optimisers, swap_the_optimisers, Path.unlink],
)
def test_a_damaged_state_is_one_line_that_names_the_file(saved: Path, damage) -> None:
    damage(saved / "ckpt/000002/train_state.pt")
    with pytest.raises(ValueError, match="train_state.pt (is damaged|cannot be read): ") as error:
        Run(seed=1).restore(saved)
    assert len(str(error.value).splitlines()) == 1


def test_weights_that_lack_a_tensor_are_named(saved: Path) -> None:
    weights.write_weights(saved / "ckpt/000002/ema.safetensors", {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="ema.safetensors is damaged: KeyError"):
        Run(seed=1).restore(saved)


@pytest.mark.parametrize("name", ["000009", "", "../../elsewhere", "\x00"])
def test_a_latest_that_points_nowhere_is_named(saved: Path, name: str) -> None:
    (saved / "latest").write_text(name)
    with pytest.raises(ValueError, match="latest is damaged: "):
        Run(seed=1).restore(saved)
