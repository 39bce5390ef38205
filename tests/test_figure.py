"""What figure.py promises."""

import math

import numpy as np
import pytest
from helpers import character_id

from game import figure


def test_more_than_1e8_characters():
    assert figure.N_CHARACTERS == math.prod(figure.SLOTS.values()) > 1e8
    for number in np.random.default_rng(0).integers(0, figure.N_CHARACTERS, 10_000).tolist():
        assert character_id(figure.character(number)) == number
    with pytest.raises(ValueError, match="a character is a number from 0"):
        figure.character(figure.N_CHARACTERS)
