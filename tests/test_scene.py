"""What scene.py promises."""

import time
from itertools import pairwise

import numpy as np
import pytest

from game import paint
from game.scene import KINDS, SPLITS, Scene, flood, make_scene


def looks(scene: Scene) -> tuple[bytes, ...]:
    parts = (scene.solid, scene.region, scene.style["wall"])
    return tuple(part.tobytes() for part in parts)


def test_the_same_seed_is_the_same_place():
    one, two = make_scene(11, "maze"), make_scene(11, "maze")
    assert (one.solid == two.solid).all() and all(
        np.array_equal(one.style[k], two.style[k]) for k in one.style
    )
    assert np.array_equal(paint.bake(one)[0], paint.bake(two)[0])


def test_a_thousand_seeds_are_a_thousand_worlds():
    worlds = set()
    began = time.process_time()
    for seed in range(1000):
        scene = make_scene(seed)
        solid = scene.solid
        worlds.add(looks(scene))
        assert (~solid).sum() >= 100
        assert scene.kind == KINDS[seed % 4]
        assert solid[[0, -1]].all()
        assert solid[:, [0, -1]].all()
    assert len(worlds) == 1000
    assert (time.process_time() - began) / 1000 < 0.005


@pytest.mark.parametrize("kind", KINDS)
def test_free_space_is_connected(kind):
    for seed in range(100):
        free = ~make_scene(seed, kind).solid
        start = tuple(np.argwhere(free)[0])
        reached = flood(free, start) >= 0
        assert (reached == free).all()


def test_no_scene_is_in_two_splits():
    for a, b in pairwise(SPLITS.values()):
        ends = {a[0], a[-1]}
        assert not ends & set(b)
        assert a[-1] < b[0]
    assert len(SPLITS["train"]) > 1000  # the paper: more than a thousand scenes
