"""What player.py promises."""

import torch

from page.player import explain


def test_memory_and_device_errors_say_the_way_out() -> None:
    assert (
        "out of memory, peak 0.0 GB; the session is saved. Options, cheapest first: --vae light75"
        in explain(torch.OutOfMemoryError("CUDA"))
    )
    said = explain(
        NotImplementedError("The operator 'aten::x' is not implemented for the MPS device")
    )
    assert "run with PYTORCH_ENABLE_MPS_FALLBACK=1 or --device cpu" in said
