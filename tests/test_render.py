"""What render.py promises."""

import numpy as np

from game import paint
from game.scene import make_scene


def test_the_same_seed_is_the_same_place():
    one, two = make_scene(11, "maze"), make_scene(11, "maze")
    assert (one.solid == two.solid).all() and all(
        np.array_equal(one.style[k], two.style[k]) for k in one.style
    )
    assert np.array_equal(paint.bake(one)[0], paint.bake(two)[0])
