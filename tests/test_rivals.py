"""What rivals.py promises, with a random network: what stands in the memory slots, and what is stored."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import random_cameras

from context import Window, query_offsets
from game import scene
from lab import players, revisits, rivals, worlds
from lab.claims import CLAIMS, judge
from lab.players import How, Player
from lab.revisits import OLD, Return
from lab.run import Run
from memory import MemoryBank

TUNE = scene.SPLITS["tune"].start
ARMS = [
    "none",
    "last frames",
    "pooled",
    "retrieval",
    "warp cache",
    "frame copied",
    "frames warped",
]


@pytest.fixture(scope="module")
def back(dreamer: Player) -> Return:
    return revisits.come_back(dreamer, worlds.revisit(TUNE, 0.0))


def test_pooled_is_the_mean_of_five_groups_under_the_camera_of_the_middle_one() -> None:
    bank = MemoryBank()
    latents = torch.arange(30.0).view(1, 30, 1, 1).expand(2, 30, 3, 3)
    cameras = random_cameras(30)[:, None].expand(-1, 4, -1, -1).float()
    bank.append(latents, cameras, torch.arange(30))
    found = rivals.pooled(SimpleNamespace(bank=bank), cameras[:5, 0], 26)
    # 1 .. 25 may answer: groups 1-5, 6-10, ..
    assert found.latents.shape == (1, 2, 5, 3, 3)
    assert found.latents[0, 0, :, 0, 0].tolist() == [3.0, 8.0, 13.0, 18.0, 23.0]
    assert found.times.tolist() == [[3, 8, 13, 18, 23]]
    assert torch.equal(found.cameras[0], cameras[[3, 8, 13, 18, 23]])


def caught(
    monkeypatch: pytest.MonkeyPatch,
    p: Player,
    back: Return,
    shown: torch.Tensor,
) -> list[tuple]:
    """What the warp cache was asked, encoded and answered, segment by segment."""
    calls = []

    def encode(p: Player, frames: np.ndarray) -> torch.Tensor:
        calls.append([frames])
        return torch.arange(len(frames) // 4 + 1.0).view(1, 1, -1, 1, 1).expand(1, 48, -1, 8, 8)

    def recall(*asked: object) -> object:
        found = rivals.warp_cache(p, back, shown, *asked)
        calls[-1] += [*asked, found]
        width = asked[0].now.past.shape[1]
        return found.__class__(found.latents[:, :width], found.times, found.cameras)

    monkeypatch.setattr(players, "encode", encode)
    players.rollout(p, back.script, back.latents, 2, How(recall=recall))
    return calls


def test_the_warp_cache_shows_the_coming_views_as_old_frames_did(
    dreamer: Player, back: Return, monkeypatch: pytest.MonkeyPatch
) -> None:
    # old frames that are true, so that a warp of the very pose is the true frame
    true = torch.from_numpy(back.views.frames[OLD]) / 255
    calls = caught(monkeypatch, dreamer, back, true)
    assert [len(frames) for frames, *_ in calls] == [41, 41]
    assert [before for *_, before, _ in calls] == [41, 51]
    for frames, _, asking, _, found in calls:
        # every slot stands under the camera that asks, with the latent of that view
        assert torch.allclose(found.cameras[0, :, -1], asking.float(), atol=1e-5)
        newest = len(frames) // 4
        expected = [newest - offset for offset in query_offsets(Window.new, 5)]
        assert found.latents[0, 0, :, 0, 0].tolist() == expected
        assert int(found.times.min()) >= 1
    # the player ends where he began: the last warped frame is the first true one
    last = calls[-1][0][-1].astype(float)
    assert np.abs(last - back.views.frames[-1]).mean() < 3


def test_another_memory_makes_another_film(dreamer: Player, back: Return) -> None:
    films = {
        name: players.rollout(dreamer, back.script, back.latents, 1, how)[0]
        for name, how in {"ours": How(), "pooled": How(recall=rivals.pooled)}.items()
    }
    assert not torch.equal(films["ours"], films["pooled"])
    assert torch.equal(films["ours"][:, :, :4], films["pooled"][:, :, :4])


@pytest.mark.long
def test_a_run_scores_every_arm_at_every_place_and_no_claim_asks_for_more(
    dreamer: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "player", property(lambda self: dreamer))
    monkeypatch.setattr(rivals, "PLACES", {"exact": 0.0, "0.4 m": 0.4})
    run = Run([TUNE], False, "none", tmp_path)
    rivals.rivals(run)
    assert list(run.facts["rivals"]) == ARMS
    for arm, fact in run.facts["rivals"].items():
        assert list(fact["scores"]) == ["all", "bank-only"]
        assert fact["scores"]["all"]["exact"]["mean"] == run.raw[f"exact, {arm}/psnr"][0]
        assert fact["scores"]["all"]["exact"]["interval"] is None, "one world has no interval"
        assert fact["ms"] > 0
        assert len(run.raw[f"{arm}/ms"]) == 1, "one world, whatever places it was asked at"
    kept = {arm: fact["numbers kept"] for arm, fact in run.facts["rivals"].items()}
    assert kept["none"] == 0 < kept["last frames"] < kept["retrieval"] < kept["warp cache"]
    # at the very pose there is nothing to move
    exact = run.raw["exact, frames warped/psnr"][0]
    assert exact == pytest.approx(run.raw["exact, frame copied/psnr"][0], abs=0.5)

    near = [
        claim
        for claim in CLAIMS["rivals"]
        if "85 m" not in claim.name and "1.9 m" not in claim.name
    ]
    verdicts = {judge(claim, run.raw, {})["verdict"] for claim in near}
    assert len(near) >= 4 and "not measured" not in verdicts
