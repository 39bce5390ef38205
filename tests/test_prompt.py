"""What prompt.py promises."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import world
from dataset import prompt
from engine import parts
from game.scene import make_scene, scene_caption

ROOT = Path(__file__).resolve().parent.parent


def test_captions_name_the_kind_the_colours_and_the_motion() -> None:
    scene = make_scene(2, "maze")
    run = world.simulate(scene, 0, 121, "rl")
    levels = prompt.caption(
        scene_caption(scene), run["keyboard"], run["mouse"], run["player"], "maze"
    )["simple"]
    assert (
        levels["tag"] == "maze" and "maze" in levels["scene"] and levels["scene"].endswith("walls")
    )
    assert (
        levels["motion"].startswith("The camera walks")
        and levels["full"] == f"{levels['scene']}. {levels['motion']}"
    )


def test_umt5_matches_official() -> None:
    golden = load_file(ROOT / "tests/golden/umt5.safetensors")
    weights = {
        key.removeprefix("weights."): value.float()
        for key, value in golden.items()
        if key.startswith("weights.")
    }
    out = prompt.umt5(weights, golden["ids"], golden["mask"])
    assert (out[:, :23] - golden["out"]).abs().max() < 1e-5 and not out[:, 23:].any()


def test_a_cached_prompt_needs_neither_weights_nor_tokeniser(tmp_path: Path) -> None:
    name = hashlib.sha256(b"a street").hexdigest()[:16]
    save_file({"embedding": torch.ones(512, 8)}, tmp_path / f"umt5-{name}.safetensors")
    assert prompt.encode_umt5(
        "  a \n street", tmp_path, lambda: pytest.fail("weights were loaded"), tmp_path
    ).shape == (512, 8)


def test_a_released_size_hears_in_training_what_it_hears_in_play(tmp_path: Path) -> None:
    """umT5's vectors, whichever model of the released folder is named."""
    (tmp_path / "google/umt5-xxl").mkdir(parents=True)
    name = hashlib.sha256(b"a street").hexdigest()[:16]
    vectors = torch.randn(512, 4096)
    save_file({"embedding": vectors}, tmp_path / f"umt5-{name}.safetensors")
    for path in (tmp_path, tmp_path / "base_model"):
        played = parts.embed(parts.Options(preset="5b", weights=str(path)), "a street")
        assert torch.equal(played, vectors)
        assert torch.equal(parts.text_encoder("5b", str(path))("a street"), vectors)


def test_without_its_text_encoder_a_released_size_is_not_trained_on_other_words(
    tmp_path: Path,
) -> None:
    read = parts.text_encoder("5b", str(tmp_path / "nowhere" / "base_model"))
    with pytest.raises(ValueError, match="needs umT5, and .* does not exist: hf download Skywork"):
        read("a street")


def test_words_have_fixed_vectors() -> None:
    a, b = prompt.embed_prompt("A maze, red walls", 64, 16), prompt.embed_prompt("red maze", 64, 16)
    assert (
        a.shape == (16, 64)
        and torch.equal(a[1], b[1])
        and torch.equal(a[2], b[0])
        and not a[4:].any()
    )
    assert abs(prompt.embed_prompt("street", 4096, 1).std() - 1) < 0.05 and prompt.embed_prompt(
        "", 8, 4
    ).shape == (4, 8)
    assert abs(float(a[0] @ a[1]) / 64) < 0.4
