"""The machinery under the paper: weight files, optimisers, checkpoints, runs, clips, ranks."""
