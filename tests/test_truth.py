"""What truth.py promises."""

import numpy as np
import torch

from lab import truth


def test_the_greedy_oracle_covers_at_least_as_much_as_any_choice() -> None:
    seen = torch.from_numpy(np.random.default_rng(0).random((9, 16, 16)) < 0.2)
    best = truth.coverage(seen, truth.greedy(seen, 2))
    assert truth.coverage(seen, range(9)) == 1
    assert all(best >= 0.63 * truth.coverage(seen, (i, j)) for i in range(9) for j in range(9))
    assert truth.coverage(seen, truth.greedy(seen, 1)) == max(
        truth.coverage(seen, [i]) for i in range(9)
    )
