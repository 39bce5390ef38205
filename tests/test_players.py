"""What players.py promises: rollouts of a random network."""

import json
from pathlib import Path

import pytest
import torch

import camera
import moe
from engine import parts
from game import scene
from lab import players, worlds
from lab.players import How, Player

TEST = scene.SPLITS["test"].start


def noise(p: Player, latents: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(1, p.nets["dit"].cfg.in_dim, latents, 8, 8, generator=g)


def test_a_run_of_its_stage_is_as_good_as_a_folder_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(options: parts.Options, *names: str) -> tuple[dict, dict]:
        return {}, {"from": options.weights}

    monkeypatch.setattr(parts, "resolve", lambda options: options)
    monkeypatch.setattr(parts, "load_parts", loaded)
    (tmp_path / "latest").write_text("000010")
    (tmp_path / "config.json").write_text(json.dumps({"stage": "distill"}))
    run = str(tmp_path)
    assert players.player(run, "student").options.weights == run
    assert players.player(run, "base") is None
    assert players.player(str(tmp_path / "none"), "student") is None


def test_a_rollout_is_deterministic_and_begins_with_the_truth(dreamer: Player) -> None:
    script = worlds.revisit(TEST, 0.0)
    z = noise(dreamer, 65)
    once, again = (players.rollout(dreamer, script, z, 1)[0] for _ in range(2))
    assert torch.equal(once, again)
    assert once.shape[2] == 14
    assert torch.equal(once[:, :, :4], z[:, :, 41:45])


def test_a_rollout_depends_on_what_the_bank_holds_and_on_the_noise(dreamer: Player) -> None:
    script = worlds.revisit(TEST, 0.0)
    z = noise(dreamer, 65)
    made = players.rollout(dreamer, script, z, 1)[0]
    others = {
        "no memory": How(policy="none"),
        "an empty bank": How(bank=torch.zeros_like(z)),
        "wrong poses": How(shuffle=True),
        "long ago": How(later=200),
        "other noise": How(seed=1),
    }
    for name, how in others.items():
        other = players.rollout(dreamer, script, z, 1, how)[0]
        assert not torch.equal(made, other), name


def test_the_walk_of_a_rollout_is_the_walk_of_the_script(dreamer: Player) -> None:
    script = worlds.revisit(TEST, 0.4)
    z = torch.zeros_like(noise(dreamer, 65))
    info = players.rollout(dreamer, script, z, 2)[1]
    poses = torch.tensor(info["poses"], dtype=torch.float64)
    assert torch.allclose(poses, script.poses[217:], atol=1e-4)
    apart = (script.poses[-1] - script.poses[0])[[0, 2]].norm()
    steps = round(0.4 / camera.STEP)
    assert float(apart) == pytest.approx(camera.STEP * steps, abs=1e-6)


def test_a_rollout_from_one_frame_begins_with_the_longer_segment(dreamer: Player) -> None:
    script = worlds.place(TEST, "l2:40 w:4 -:12 a:4 d:4 -:12 s:4 j2:40 -:16", 0)
    script = script._replace(known=1)
    z = noise(dreamer, 35)
    latents, info = players.rollout(dreamer, script, z, 3)
    assert latents.shape[2] == 1 + 14 + 10 + 10
    assert torch.equal(latents[:, :, :1], z[:, :, :1])
    poses = torch.tensor(info["poses"], dtype=torch.float64)
    assert torch.allclose(poses, script.poses[97:], atol=1e-4)


def test_experts_that_are_one_network_are_that_network_and_cameras_follow_the_view(
    dreamer: Player,
) -> None:
    net = dreamer.nets["dit"]
    experts = moe.Experts({"first": net, "third": net}, net, 0.9)
    twins = dreamer._replace(nets=dreamer.nets | {"dit": experts})
    z = noise(dreamer, 65)
    made = {}
    for view in ("first", "third"):
        script = worlds.revisit(TEST, 0.0)._replace(view=view)
        made[view] = players.rollout(dreamer, script, z, 1)[0]
        assert torch.equal(made[view], players.rollout(twins, script, z, 1)[0])
        assert experts.view == view
    assert not torch.equal(made["first"], made["third"])
