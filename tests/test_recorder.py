"""What recorder.py promises."""

import queue
from pathlib import Path

import numpy as np

import world
from dataset import recorder
from dataset.episode import problems, psnr, read_episode
from game import explore
from game.scene import make_scene


def test_each_recording_layer_runs_alone(tmp_path: Path) -> None:
    scene = make_scene(7)
    keys, states, screen, segments = (queue.Queue() for _ in range(4))
    game = world.World(scene, size=64)
    for _ in range(20):
        keys.put(((1, 0, 0, 0, 0, 0), (0.0, 0.1)))
    keys.put(None)
    recorder.game_layer(game, keys, states, screen)  # no agent, no recorder
    kinds = [kind for kind, _, _ in list(screen.queue)]
    assert (
        kinds.count("frame") == states.qsize() == 20 and kinds.count("state") == 75
    )  # 60 Hz for 20/16 s
    states.put(None)
    recorder.agent_layer(explore.NavMesh(scene), np.random.default_rng(0), states, keys)
    assert keys.qsize() == 20
    recorder.capture_layer(screen, segments, [], 1, 17)
    segments.put(None)
    written = []
    recorder.output_layer(segments, tmp_path, scene, written)
    e = read_episode(written[0])
    assert len(e.video) == 17 and e.meta["action_source"] == "inferred"
    assert (e.keyboard[:-1, 0] == 1)[e.valid[:-1]].all() and e.valid[:-1].mean() > 0.9


def test_recorded_frames_get_the_pose_of_their_time(tmp_path: Path) -> None:
    closed, (screen, segments, keys, states) = [], (queue.Queue() for _ in range(4))
    scene = make_scene(7)
    game = world.World(scene, size=64)
    for t in range(60):
        keys.put(((1, 0, 0, 0, 0, 0), (0.0, 0.2 if t % 24 < 12 else -0.2)))
    keys.put(None)
    recorder.game_layer(game, keys, states, screen)
    recorder.capture_layer(screen, segments, closed, 1, 49, jitter=0.008)
    e = recorder.align(closed[0], scene)
    true = np.array([c2w for c2w in world.true_frames(e.meta, e.c2w, 64, 64)])
    assert psnr(true, e.video).median() > 30
    stamps, at = (
        np.array([s for s, _, _ in closed[0]["frame"]]),
        np.array([t for _, t, _ in closed[0]["frame"]]),
    )
    offset = np.median([stamp - time for stamp, time, _ in closed[0]["state"]])
    fitted = np.polyval(np.polyfit(np.arange(len(at)), stamps, 1), np.arange(len(at))) - offset
    assert (
        np.abs(fitted - at).max() < 0.5 / 16 and np.abs(fitted - at).max() < 0.008
    )  # half a frame; in fact within the jitter


def test_a_crashed_layer_closes_its_segment_and_the_next_one_is_valid() -> None:
    scene, closed, (keys, states, screen, segments) = (
        make_scene(7),
        [],
        (queue.Queue() for _ in range(4)),
    )

    class Faulty(world.World):
        """A game that crashes once, at its 20th tick."""

        crashed = False

        def tick(self, *action: tuple) -> dict:
            if self.time == 20 and not self.crashed:
                self.crashed = True
                raise RuntimeError("out of video memory")
            return super().tick(*action)

    game = Faulty(scene, size=64)
    states.put(game.pose)
    layers = (
        (recorder.game_layer, game, keys, states, screen),
        (recorder.capture_layer, screen, segments, closed, 2, 33),
        (recorder.agent_layer, explore.NavMesh(scene), np.random.default_rng(0), states, keys),
    )
    threads = [recorder.supervise(screen, *layer) for layer in layers]
    threads[1].join(timeout=20)
    keys.put(None)
    states.put(None)
    assert [len(segment["frame"]) for segment in closed] == [20, 34]
    assert closed[0]["crash"][0][2] == "game_layer: out of video memory" and not closed[1]["crash"]
    assert [len(recorder.align(segment, scene).video) for segment in closed] == [17, 33]
    assert all(problems(recorder.align(segment, scene)) == [] for segment in closed)
