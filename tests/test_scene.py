"""What scene.py promises."""

import time
from itertools import pairwise

import numpy as np
import pytest

from game.scene import KINDS, SPLITS, flood, make_scene


def test_a_thousand_seeds_are_a_thousand_worlds():
    began, worlds = time.process_time(), set()
    for seed in range(1000):
        scene = make_scene(seed)
        worlds.add((scene.solid.tobytes(), scene.region.tobytes(), scene.style["wall"].tobytes()))
        assert (~scene.solid).sum() >= 100 and scene.kind == KINDS[seed % 4]
        assert scene.solid[[0, -1]].all() and scene.solid[:, [0, -1]].all()
    assert len(worlds) == 1000
    assert (time.process_time() - began) / 1000 < 0.005


@pytest.mark.parametrize("kind", KINDS)
def test_free_space_is_connected(kind):
    for seed in range(100):
        free = ~make_scene(seed, kind).solid
        assert ((flood(free, tuple(np.argwhere(free)[0])) >= 0) == free).all()


def test_no_scene_is_in_two_splits():
    ranges = list(SPLITS.values())
    assert all(not set(a[:: len(a) - 1]) & set(b) and a[-1] < b[0] for a, b in pairwise(ranges))
    assert len(SPLITS["train"]) > 1000  # the paper: more than a thousand scenes
