"""Two experts behind one door, and the door itself."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import dit
import flow
import moe
from engine import configs

MICRO = dit.PRESETS["micro"]


# ---- the switch


def test_one_expert_runs_per_step(experts, scene, monkeypatch):
    calls = []
    for name, expert in {**experts.high, "low": experts.low}.items():

        def forward(*args, name=name, answer=expert.forward, **more):
            calls.append(name)
            return answer(*args, **more)

        monkeypatch.setattr(expert, "forward", forward)
    flow.sample(experts.look("third"), scene.context, flow.sigma_grid(8), scene.x)
    assert len(calls) == 8
    assert calls == sorted(calls, reverse=True)  # third, third, …, low: one change
    assert set(calls) == {"third", "low"}


def test_the_boundary_belongs_to_the_high_noise_expert(experts):
    assert experts.which(torch.tensor([0.9])) == "first"
    assert experts.which(torch.tensor([0.8999])) == "low"
    assert experts.which(torch.full((3,), 1.0)) == "first"


def test_two_equal_experts_equal_one_dense_model(experts, scene):
    dense = experts.low
    twins = moe.Experts({"first": dense}, dense)
    for method in ("euler", "unipc"):
        how = (scene.context, flow.sigma_grid(4), scene.x, method)
        assert torch.equal(flow.sample(twins, *how), flow.sample(dense, *how))


def test_each_view_has_its_own_high_expert_and_all_share_the_low_one(experts, scene):
    def answers(sigma):
        sigma = torch.tensor([sigma])
        views = ("first", "third")
        return [experts.look(view)(scene.x, sigma, scene.context) for view in views]

    first, third = answers(0.95)
    assert not torch.equal(first, third)
    first, third = answers(0.5)
    assert torch.equal(first, third)


def test_preparing_changes_nothing_and_only_the_working_expert_is_prepared(experts, scene):
    prepared = experts.prepare(scene.context)
    for sigma in (0.95, 0.92, 0.5, 0.2):
        sigma = torch.tensor([sigma])
        fast = experts(scene.x, sigma, scene.context, prepared)
        slow = experts(scene.x, sigma, scene.context)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-6)
        assert set(prepared) == {"inputs", experts.which(sigma)}


def test_offload_moves_the_idle_experts_away_and_gives_the_same_answer(experts, scene, monkeypatch):
    moves = []
    for name, expert in {**experts.high, "low": experts.low}.items():
        monkeypatch.setattr(expert, "to", lambda device, n=name: moves.append((n, str(device))))
    frugal = moe.Experts(dict(experts.high), experts.low, offload=True)
    sigma = torch.tensor([0.95])
    answer = frugal(scene.x, sigma, scene.context)
    assert torch.equal(answer, experts(scene.x, sigma, scene.context))
    # the working one last, to its input
    assert moves == [("third", "cpu"), ("low", "cpu"), ("first", "cpu")]
    moves.clear()
    experts(scene.x, sigma, scene.context)
    assert not moves


def test_a_batch_on_both_sides_of_the_boundary_is_refused(experts, scene):
    with pytest.raises(ValueError, match="both sides of 0.9"):
        both = scene.x.expand(2, -1, -1, -1, -1)
        sigmas = torch.tensor([0.95, 0.5])
        experts(both, sigmas, scene.context)
    with pytest.raises(ValueError, match="first, third"):
        experts.look("second")


def test_the_28b_preset_is_two_14b_networks_per_view_on_meta():
    model = moe.build("28b-moe", "meta")
    for expert in (*model.high.values(), model.low):
        cfg = expert.cfg
        assert cfg.dim == 5120
        assert cfg.heads == 40
        assert cfg.layers == 40
        assert cfg.ffn == 13824
        old = [p.numel() for n, p in expert.named_parameters() if not configs.is_new(n)]
        assert abs(sum(old) - 14.29e9) < 0.01e9  # Wan2.2-A14B, one expert
        assert expert.patch_embedding.weight.is_meta
    assert list(model.high) == ["first", "third"] and model.boundary == 0.9


def test_what_stands_above_the_noise_is_decided_first():
    assert abs(moe.decided(0.9, 81) - 0.5) < 1e-9  # at the boundary, of 81 times the mean power
    for sigma in (0.99, 0.9, 0.5, 0.1):
        assert moe.decided(sigma, 81) > moe.decided(sigma, 1)
    assert moe.decided(0.99, 1) < 1e-3 and moe.decided(0.01, 1) > 0.999


# ---- the door: what opens


@pytest.mark.parametrize("preset", ["micro", "tiny", "5b", "micro-moe"])
def test_every_preset_builds_without_memory(preset):
    assert all(p.is_meta for p in moe.build(preset, "meta").parameters())


# ---- the door: what does not open, and the sentence it says


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="28b-moe"):
        moe.build("7b")
    assert moe.build(replace(MICRO, layers=1)).cfg.layers == 1
    cfg = moe.MoEConfig(MICRO, 0.8, ("first",))
    network = moe.build(cfg)
    assert isinstance(network.high, nn.ModuleDict)
