"""What outside.py and guests.py promise: a model of anybody's, by frames alone; one line for a mistake."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from game import scene
from lab import guests, outside, walks, worlds
from lab.claims import CLAIMS
from lab.outside import Guest
from lab.run import Run

TUNE = scene.SPLITS["tune"].start
COPYCAT = "lab.guests:Copycat"


def put_model(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    """A file of somebody's own, in the current folder."""
    (folder / "somebody.py").write_text(f"import numpy as np\n\n\nclass Mine:\n{body}\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "somebody", raising=False)
    return "somebody:Mine"


class Notes:
    """A model that notes what it is asked, and draws grey."""

    def __init__(self) -> None:
        self.asked = []

    def reset(self, image: np.ndarray, prompt: str) -> None:
        self.asked.append((image.shape, str(image.dtype), prompt))

    def step(self, keyboard: np.ndarray, mouse: np.ndarray) -> np.ndarray:
        self.asked.append((len(keyboard), float(np.abs(keyboard).sum() + np.abs(mouse).sum())))
        return np.full((len(mouse), 64, 64, 3), 128, np.uint8)


# ---- the door --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, says",
    [
        ("foo", "takes MODULE:CLASS, such as lab.guests:Copycat; got 'foo'"),
        ("foo:", "takes MODULE:CLASS"),
        (":Foo", "takes MODULE:CLASS"),
        ("no_such_module:Foo", "No module named 'no_such_module'"),
        ("no_such_module.py:Foo", "No module named 'no_such_module'"),
        ("lab.guests:Copycta", "has no class Copycta; did you mean Copycat"),
        ("lab.worlds:Script", "the class must take no arguments"),
        ("pathlib:PurePath", r"no method reset\(image, prompt\)"),
    ],
)
def test_what_is_no_model_is_told_in_a_line_before_anything_is_measured(
    name: str, says: str, tmp_path: Path
) -> None:
    pytest.importorskip("scipy", reason="intervals need scipy; pip install scipy")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=says):
        evaluate.main(["action", "--model", name, "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(
    "body, says",
    [
        ("    raise SystemExit(0)", "raised SystemExit 0 .*somebody.py:"),
        ("    def __init__(self): raise KeyError('k')", "raised KeyError 'k' .*somebody.py:"),
        ("    def broken(", "raised SyntaxError"),
    ],
)
def test_whatever_a_model_raises_is_one_line_that_says_where(
    body: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=says):
        outside.load(put_model(tmp_path, monkeypatch, body))


def test_a_model_that_breaks_while_it_draws_is_named() -> None:
    class Broken(Notes):
        def step(self, keyboard: np.ndarray, mouse: np.ndarray) -> np.ndarray:
            return {}["frames"]

    still = torch.zeros(4, 6), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="mine: step raised KeyError 'frames'"):
        outside.Guest("mine", Broken()).step(*still)


@pytest.mark.parametrize(
    "body, says",
    [
        ("    def reset(self, image, prompt): ...", r"no method step\(keyboard, mouse\)"),
        (
            "    def reset(self, image): ...\n    def step(self, keyboard, mouse): ...",
            r"reset must take \(image, prompt\)",
        ),
    ],
)
def test_a_lacking_method_is_named(
    body: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = put_model(tmp_path, monkeypatch, body)
    with pytest.raises(ValueError, match=says):
        outside.load(name)


@pytest.mark.parametrize(
    "drawn, says",
    [
        ("None", "got NoneType"),
        ("np.zeros((len(mouse), 64, 64, 3))", r"got \(56, 64, 64, 3\) float64"),
        ("np.zeros((len(mouse), 32, 32, 3), np.uint8)", r"got \(56, 32, 32, 3\) uint8"),
        ("np.zeros((1, 64, 64, 3), np.uint8)", r"got \(1, 64, 64, 3\) uint8"),
    ],
)
def test_frames_of_another_kind_are_refused(
    drawn: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"    def reset(self, image, prompt): ...\n    def step(self, keyboard, mouse): return {drawn}"
    guest = outside.load(put_model(tmp_path, monkeypatch, body))
    image = np.zeros((64, 64, 3), np.uint8)
    wanted = r"somebody:Mine: step must return \(56, 64, 64, 3\) uint8 for 56 actions.*"
    with pytest.raises(ValueError, match=wanted + says):
        guest.walk(image, worlds.scene(TUNE), (torch.zeros(40, 6), torch.zeros(40, 2)))


def test_a_walk_is_cut_as_promised_and_its_end_is_filled_with_standing_still() -> None:
    model = Notes()
    image = np.zeros((64, 64, 3), np.uint8)
    film = Guest("x", model).walk(
        image, worlds.scene(TUNE), (torch.ones(100, 6), torch.ones(100, 2))
    )
    assert film.shape == (100, 64, 64, 3)
    assert 0 <= float(film.min()) and float(film.max()) <= 1
    (shape, dtype, prompt), *steps = model.asked
    assert (shape, dtype) == ((64, 64, 3), "uint8") and prompt
    assert steps == [(56, 56 * 8), (40, 40 * 8), (40, 4 * 8)]


def test_torch_frames_are_as_good(tmp_path: Path) -> None:
    class Torch(Notes):
        def step(self, keyboard: np.ndarray, mouse: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(super().step(keyboard, mouse))

    pairs = (torch.zeros(56, 6), torch.zeros(56, 2))
    image = np.zeros((64, 64, 3), np.uint8)
    films = [
        Guest("x", model).walk(image, worlds.scene(TUNE), pairs) for model in (Notes(), Torch())
    ]
    assert torch.equal(*films)


def test_a_model_brings_its_own_weights_and_is_no_report() -> None:
    for words in (["report"], ["compare"], ["action", "--weights", "runs/mine"]):
        with pytest.raises(ValueError, match="--model brings its own weights"):
            evaluate.main([*words, "--model", COPYCAT])


# ---- what is measured ------------------------------------------------------------------------------


def test_every_command_is_scored_or_says_why_not() -> None:
    assert set(outside.COMMANDS) | set(outside.LEFT_OUT) == set(evaluate.COMMANDS)
    assert not set(outside.COMMANDS) & set(outside.LEFT_OUT)


def test_the_copycat_turns_exactly_and_comes_back() -> None:
    script = worlds.place(TUNE, "l2:4 -:4 j2:4 -:44")
    true = worlds.draw(script).frames
    actions = (script.keyboard, script.mouse)
    film = Guest(COPYCAT, guests.Copycat()).walk(true[0], script.scene, actions)
    assert torch.equal(film[-1], torch.from_numpy(true[0]) / 255)
    # turned by 12 degrees: what was in the picture is where it is to be seen
    kept = film[6][:, :48].numpy() - true[7][:, :48] / 255
    frozen = (true[0][:, :48].astype(float) - true[7][:, :48]) / 255
    assert np.square(kept).mean() < 0.2 * np.square(frozen).mean()


def test_coming_back_is_worth_more_to_who_remembers(tmp_path: Path) -> None:
    script = worlds.revisit(TUNE, 0.0)
    true = worlds.draw(script, [0]).frames[0]
    made = outside.come_back(Guest(COPYCAT, guests.Copycat()), script, true)
    away = {
        arm: float((image * 255 - torch.from_numpy(true)).abs().mean())
        for arm, image in made.items()
    }
    assert away["remembering"] < 1e-3
    assert away["forgetting"] > 10


@pytest.mark.long
def test_a_model_has_a_file_of_its_own_in_which_commands_keep_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy", reason="intervals need scipy; pip install scipy")
    monkeypatch.setattr(walks, "LONG", 16)
    monkeypatch.setattr(walks, "SCORED_AT", (56, 256))
    words = ["--tune", "--worlds", "1", "--model", COPYCAT, "--out", str(tmp_path)]
    evaluate.main(["explore", *words])
    evaluate.main(["int8", *words])
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "lock",
        "outside-lab.guests-Copycat.json",
    ]
    assert "outside-lab.guests-Copycat" not in CLAIMS
    stored = json.loads((tmp_path / "outside-lab.guests-Copycat.json").read_text())
    assert list(stored) == ["explore", "int8"]
    assert stored["int8"]["absent"]["*"] == outside.LEFT_OUT["int8"]
    raw = stored["explore"]["raw"]
    assert stored["explore"]["command"].endswith(f"--worlds 1 --model {COPYCAT}")
    assert 0 < raw["explored/sharpness after 256"][0] < 2
    assert raw["explored/ms per 40 frames"][0] > 0
    assert f"{outside.WHOLE}/sharpness after 256" not in raw, "it would be after 272"
    assert all(len(values) == 1 for values in raw.values())


def test_memory_rows_are_of_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside.revisits, "PLACES", {"exact": 0.0})
    run = Run([TUNE], False, "", tmp_path)
    outside.memory(run, Guest(COPYCAT, guests.Copycat()))
    held = run.raw["exact, first picture held/psnr first picture"]
    assert run.raw["exact, remembering/psnr first picture"] == held
    assert held[0] > run.raw["exact, forgetting/psnr first picture"][0] + 5
