"""What sizes.py promises: it counts what it knows, and says so of what it does not."""

import pytest

from engine import flags, sizes


@pytest.mark.parametrize("stage", flags.STAGES)
def test_a_stage_of_other_networks_is_not_counted_as_if_it_had_one(stage: str) -> None:
    cfg = flags.parse(["--stage", stage, "--preset", "micro", "--init", "x"])
    if stage in ("base", "moe"):
        assert "| total |" in sizes.memory_needed(cfg)
        return
    with pytest.raises(ValueError, match=f"{stage} trains others, which nobody has counted"):
        sizes.memory_needed(cfg)
