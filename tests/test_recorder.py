"""What recorder.py promises."""

import queue
from pathlib import Path

import numpy as np
import pytest

import world
from dataset import recorder
from dataset.episode import problems, read_episode
from dataset.film import psnr
from game import explore
from game.scene import make_scene


def four_queues() -> list[queue.Queue]:
    return [queue.Queue() for _ in range(4)]


def press(keys: queue.Queue, turns: list[float]) -> None:
    """Forward, turning, one tick each; then the game is over."""
    for turn in turns:
        keys.put(((1, 0, 0, 0, 0, 0), (0.0, turn)))
    keys.put(None)


def test_each_recording_layer_runs_alone(tmp_path: Path) -> None:
    scene = make_scene(7)
    keys, states, screen, segments = four_queues()

    # the game, without agent or recorder: 60 states a second for 20/16 s
    press(keys, [0.1] * 20)
    recorder.game_layer(world.World(scene, size=64), keys, states, screen)
    kinds = [kind for kind, _, _ in list(screen.queue)]
    assert kinds.count("frame") == states.qsize() == 20
    assert kinds.count("state") == 75

    # the agent, without a game
    states.put(None)
    rng = np.random.default_rng(0)
    recorder.agent_layer(explore.NavMesh(scene), rng, states, keys)
    assert keys.qsize() == 20

    # the capture and the output, of what was shown before
    recorder.capture_layer(screen, segments, [], 1, 17)
    segments.put(None)
    written: list[Path] = []
    recorder.output_layer(segments, tmp_path, scene, written)
    e = read_episode(written[0])
    valid = e.valid[:-1]
    assert len(e.video) == 17
    assert e.meta["action_source"] == "inferred"
    assert (e.keyboard[:-1, 0] == 1)[valid].all()
    assert valid.mean() > 0.9


def test_recorded_frames_get_the_pose_of_their_time(tmp_path: Path) -> None:
    scene = make_scene(7)
    keys, states, screen, segments = four_queues()
    closed: list[dict] = []
    press(keys, [0.2 if t % 24 < 12 else -0.2 for t in range(60)])
    recorder.game_layer(world.World(scene, size=64), keys, states, screen)
    recorder.capture_layer(screen, segments, closed, 1, 49, jitter=0.008)
    segment = closed[0]

    e = recorder.align(segment, scene)
    true = world.true_frames(e.meta, e.c2w, 64, 64)
    assert psnr(true, e.video).median() > 30

    # half a frame is allowed; in fact within the jitter
    drawn = np.array([time for _, time, _ in segment["frame"]])
    late = np.abs(recorder.frame_times(segment) - drawn).max()
    assert late < 0.5 / 16
    assert late < 0.008


def test_a_segment_that_is_not_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(segment: dict, scene: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(recorder, "align", full)
    with pytest.raises(ValueError, match="0 of 1 segments are in .*: output_layer: no space left"):
        recorder.record(tmp_path, 7, count=1, frames=17)


class Faulty(world.World):
    """A game that crashes once, at its 20th tick."""

    crashed = False

    def tick(self, *action: tuple) -> dict:
        if self.time == 20 and not self.crashed:
            self.crashed = True
            raise RuntimeError("out of video memory")
        return super().tick(*action)


def test_a_crashed_layer_closes_its_segment_and_the_next_one_is_valid() -> None:
    scene = make_scene(7)
    keys, states, screen, segments = four_queues()
    closed: list[dict] = []
    game = Faulty(scene, size=64)
    mesh = explore.NavMesh(scene)
    rng = np.random.default_rng(0)
    states.put(game.pose)

    run = recorder.supervise
    run(screen, recorder.game_layer, game, keys, states, screen)
    capture = run(screen, recorder.capture_layer, screen, segments, closed, 2, 33)
    run(screen, recorder.agent_layer, mesh, rng, states, keys)
    capture.join(timeout=20)
    keys.put(None)
    states.put(None)

    assert [len(segment["frame"]) for segment in closed] == [20, 34]
    assert closed[0]["crash"][0][2] == "game_layer: out of video memory"
    assert not closed[1]["crash"]
    clips = [recorder.align(segment, scene) for segment in closed]
    assert [len(clip.video) for clip in clips] == [17, 33]
    assert all(problems(clip) == [] for clip in clips)
