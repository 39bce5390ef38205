"""Training: the same numbers however it is interrupted or divided, every stage from nothing, and errors
that tell the way."""

import dataclasses
import functools
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import torch
import torch.distributed as dist
from torch import Tensor, nn

import block
import data
import dit
import error_buffer
import flow
import moe
import train
from context import Window
from dataset import episode
from engine import cli, flags, mistakes, optim, run, weights
from engine.clips import Clips, batch, draw, draw_cut, load_clips, load_vae, seen_by
from engine.flags import TrainConfig, parse
from engine.run import Progress, Run, generator

ROOT = Path(__file__).resolve().parent.parent
MICRO = ["--preset", "micro", "--dtype", "float32", "--device", "cpu", "--log-every", "1"]
EARLY = functools.partial(
    error_buffer.ErrorConfig, warmup=3
)  # errors are injected from the fourth step, not the 51st

# What another process runs: train.py with the same early errors, in the current folder, and, if STOP
# says so, a signal to itself once that step is logged.
LAUNCH = f"""
import functools, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from types import SimpleNamespace
import error_buffer, train
from engine import cli
from engine.run import Progress
cli.ROOT = Path.cwd()
error_buffer.ErrorConfig = functools.partial(error_buffer.ErrorConfig, warmup=3)
step, number = map(int, os.environ.get("STOP", "-1 0").split())
plain = Progress.__call__
def progress(self, **numbers):
    plain(self, **numbers)
    if self.run.step == step and self.run.rank == 0:
        os.kill(os.getpid(), number)
Progress.__call__ = progress
cli.run(train.main)
"""


@pytest.fixture(autouse=True)
def place(studio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test in a folder of its own, with early errors, and the handlers of signals put back."""
    for name in ("assets", "datasets"):
        (tmp_path / name).symlink_to(studio / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setattr(error_buffer, "ErrorConfig", EARLY)
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in stops}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def reference(studio: Path) -> Path:
    """Eight steps of base without a break: what everything else is compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(studio)
        patch.setattr(cli, "ROOT", studio)
        patch.setattr(error_buffer, "ErrorConfig", EARLY)
        assert start("--steps", "8", "--save-every", "4") == 0
    return studio / "runs/base-micro"


def start(*argv: str) -> int:
    return train.main([*MICRO, *argv])


def script(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """`python train.py ...` in this process: its exit status."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return end.value.code


def launch(*argv: str, ranks: int = 1, stop: str = "-1 0") -> list[int]:
    """The same in processes of their own, with the environment that torchrun gives; their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"STOP": stop, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if ranks > 1:
        env |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *MICRO, *argv],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    try:
        return [job.wait(timeout=300) for job in jobs]
    finally:
        for job in jobs:
            job.kill()


def newest(run: Path | str) -> Path:
    return Path(run) / "ckpt" / (Path(run) / "latest").read_text()


def state(run: Path | str) -> dict:
    """All that a run is at its newest checkpoint: weights, averages, optimisers, error buffer, step."""
    files = {
        file.stem: weights.read_weights(file)[0]
        for file in sorted(newest(run).glob("*.safetensors"))
    }
    return files | torch.load(newest(run) / "train_state.pt", weights_only=True)


def log(run: Path | str) -> list[dict]:
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "it_s"} for line in lines]


def losses(run: Path | str) -> Tensor:
    return torch.tensor([line["loss"] for line in log(run)])


def same(a: object, b: object) -> bool:
    """Equal to the last bit, however deep."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, then: Callable[[], None]) -> None:
    """Call `then` once the line of a step is in the log."""
    plain = run.record

    def record(run: Run, line: dict) -> None:
        plain(run, line)
        if line["step"] == step:
            then()

    monkeypatch.setattr(run, "record", record)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def clips(studio: Path) -> tuple[Clips, Run]:
    cfg = parse([*MICRO, "--batch", "4"])
    run = Run(Path("runs/none"), cfg, torch.device("cpu"), torch.float32)
    return load_clips(run, load_vae(cfg, run.device), Path("datasets/micro"), "train"), run


def test_a_stop_before_the_first_step_ends_at_once(
    studio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing and encoding may take an hour, and lose nothing."""
    monkeypatch.setattr(train, "load_clips", lambda *_: interrupt())
    with pytest.raises(KeyboardInterrupt):
        start("--steps", "6", "--run", "never")


# ---- identity: interrupted or not, the same run


def test_resuming_continues_exactly(reference):
    start("--steps", "6")
    assert len(log("runs/base-micro")) == 6
    assert len(state("runs/base-micro")["errors"]["entries"]) > 0
    start("--steps", "8", "--save-every", "4")
    assert log("runs/base-micro") == log(reference)
    assert same(state("runs/base-micro"), state(reference))


def test_a_run_that_needs_too_much_memory_goes_on_with_less_to_the_same_bits(reference):
    start("--steps", "6")
    start("--steps", "8", "--save-every", "4", "--checkpoint-activations")
    assert log("runs/base-micro") == log(reference)
    assert same(state("runs/base-micro"), state(reference))


@pytest.mark.long
def test_resuming_after_kill_9_between_saves_continues_exactly(reference):
    assert launch("--steps", "8", "--save-every", "4", stop=f"6 {signal.SIGKILL}") == [
        -signal.SIGKILL
    ]
    assert newest("runs/base-micro").name == "000004"
    assert len(log("runs/base-micro")) == 6
    start("--steps", "8", "--save-every", "4")
    assert same(state("runs/base-micro"), state(reference))
    assert log("runs/base-micro") == log(reference)  # the two steps that were lost stand in it once


def test_ctrl_c_saves_exits_130_and_the_rest_resumes(reference, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 5, interrupt)
        assert start("--steps", "8", "--save-every", "4") == 130
    assert newest("runs/base-micro").name in ("000005", "000006")
    assert "the same command resumes it" in capsys.readouterr().out
    assert start("--steps", "8", "--save-every", "4") == 0
    assert same(state("runs/base-micro"), state(reference))


def test_ctrl_c_while_a_sample_is_drawn_loses_nothing(monkeypatch):
    monkeypatch.setattr(train, "look", lambda *_, **__: interrupt())
    assert start("--steps", "9", "--save-every", "100", "--sample-every", "3") == 130
    assert newest("runs/base-micro").name in ("000003", "000004")


def test_a_flag_that_says_the_default_is_no_mistake():
    assert parse(["--stage", "vae", "--accum", "1", "--no-checkpoint-activations"]).accum == 1


DISTILL = ["--segments", "1", "--cold-start", "1", "--ratio", "1"]


@pytest.mark.long
@pytest.mark.parametrize("stage", ["vae", "vae with a judge", "distill"])
def test_the_other_stages_resume_exactly_too(stage, reference, capsys):
    stage, _, judge = stage.partition(" ")
    how = ["--stage", stage, "--batch", "1", "--warmup", "9"]
    how += ["--adversarial", "0.1"] if judge else []
    how += ["--init", str(reference), *DISTILL] if stage == "distill" else []
    start(*how, "--steps", "4", "--run", "whole")
    start(*how, "--steps", "2", "--run", "parts")
    assert newest("runs/parts").name == "000002"
    assert len(log("runs/parts")) == 2
    capsys.readouterr()
    start(*how, "--steps", "4", "--run", "parts")
    # a run from the start would end in the same state: only its messages and its log tell
    assert "resuming runs/parts at step 2" in capsys.readouterr().out
    assert log("runs/parts") == log("runs/whole")
    assert same(state("runs/parts"), state("runs/whole"))


def test_a_length_that_is_named_twice_is_drawn_more_often_and_said_once(reference):
    cfg = TrainConfig(new="10 2 2 2")
    some = SimpleNamespace(cfg=cfg)
    drawn = [train.draw_length(some, step)[0] for step in range(400)]
    assert set(drawn) == {10, 2}
    assert 0.68 < drawn.count(2) / 400 < 0.82
    start("--steps", "1", "--new", "10 2 2 2", "--run", "twice", "--init", str(reference))
    _, about = weights.read_weights(newest("runs/twice") / "ema.safetensors")
    assert about["new"] == "10 2"


def test_activation_checkpointing_changes_nothing(reference):
    start("--steps", "8", "--checkpoint-activations")
    assert same(state("runs/base-micro"), state(reference))


def test_torchrun_has_a_run_of_its_own_so_ours_has_another_name():
    assert parse(["--name", "mine"]) == parse(["--run", "mine"])


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no device cuda: this machine has none"):
        flags.check(TrainConfig(device="cuda"), 1)


@pytest.mark.long
def test_a_compiled_training_learns_the_same_weights(reference, monkeypatch):
    compiled = []
    traced = functools.partial(
        nn.Module.compile, backend="eager"
    )  # a graph of it, but no compiler needed
    monkeypatch.setattr(
        nn.Module, "compile", lambda module: (compiled.append(module), traced(module))
    )
    start("--steps", "8", "--compile")
    assert {type(module) for module in compiled} == {block.Block}
    assert same(state("runs/base-micro"), state(reference))


def test_the_average_of_a_recomputing_model_computes_with_the_averaged_weights():
    torch.manual_seed(0)
    model = moe.build("micro")
    ema = [torch.randn_like(p) * 0.1 for p in model.parameters()]
    plain = optim.averaged(model, ema)
    context = dit.random_context(model.cfg)
    x = torch.randn(1, 16, 10, 8, 8)
    sigma = torch.tensor([0.5])
    optim.low_precision_copy(model, torch.float32, recompute=True)
    with torch.no_grad():
        again = optim.averaged(model, ema)
        assert torch.equal(again(x, sigma, context), plain(x, sigma, context))


def test_micro_batches_add_up_to_the_batch():
    start("--steps", "5", "--accum", "2")
    start("--steps", "5", "--run", "whole")
    torch.testing.assert_close(losses("runs/base-micro"), losses("runs/whole"), atol=2e-5, rtol=0)
    parts, whole = (state(run)["errors"] for run in ("runs/base-micro", "runs/whole"))
    assert len(parts["entries"]) == len(whole["entries"])
    assert parts["pushes"] == whole["pushes"]
    torch.testing.assert_close(parts["entries"], whole["entries"], atol=2e-2, rtol=0)


@pytest.mark.long
def test_two_ranks_compute_the_losses_of_one_process():
    how = ["--steps", "3", "--muon", "0", "--run"]
    start(*how, "one")
    assert launch(*how, "two", ranks=2) == [0, 0]
    torch.testing.assert_close(
        losses("runs/two"), losses("runs/one"), atol=2e-5, rtol=0
    )  # 1e-5 each way: rounded in the log
    one, two = state("runs/one"), state("runs/two")
    assert len(one["errors"]["entries"]) == len(two["errors"]["entries"])
    torch.testing.assert_close(
        one["errors"]["entries"], two["errors"]["entries"], atol=2e-2, rtol=0
    )
    assert weights.load("runs/two")[0].cfg == dit.PRESETS["micro"]  # saved whole, not in shards


@pytest.mark.slow
def test_two_ranks_of_a_saved_run_resume_exactly():
    how = ["--muon", "0", "--run"]
    assert (
        launch(*how, "whole", "--steps", "4", ranks=2)
        == launch(*how, "parts", "--steps", "2", ranks=2)
        == [0, 0]
    )
    assert launch(*how, "parts", "--steps", "4", ranks=2) == [0, 0]
    assert same(state("runs/whole"), state("runs/parts"))


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_and_saves_all():
    how = ["--steps", "400", "--muon", "0", "--save-every", "1000"]
    assert launch(*how, ranks=2, stop=f"4 {signal.SIGTERM}") == [130, 130]
    assert newest("runs/base-micro").name in ("000004", "000005", "000006")


@pytest.mark.slow
def test_a_rank_that_is_gone_is_one_line_and_the_same_command_goes_on(
    capfd: pytest.CaptureFixture,
) -> None:
    how = ["--steps", "6", "--muon", "0", "--save-every", "2"]
    assert launch(*how, ranks=2, stop=f"5 {signal.SIGKILL}") == [-signal.SIGKILL, 2]
    said = capfd.readouterr().err
    assert "rank 1 stops at step" in said and "another rank is gone. The same command" in said
    assert "Traceback" not in said
    assert newest("runs/base-micro").name == "000004"
    assert launch(*how, ranks=2) == [0, 0]
    assert newest("runs/base-micro").name == "000006"


@pytest.mark.slow
def test_distillation_runs_on_two_ranks(reference):
    how = [
        "--stage",
        "distill",
        "--init",
        str(reference),
        "--segments",
        "1",
        "--cold-start",
        "1",
        "--steps",
        "3",
        "--batch",
        "2",
    ]
    assert launch(*how, ranks=2) == [0, 0]
    assert weights.load("runs/distill-micro")[0].cfg == dit.PRESETS["micro"]


# ---- every stage from nothing


def test_base_leaves_a_run_that_loads_and_draws(reference):
    model, said = weights.load(reference)
    assert said["step"] == 8
    assert said["stage"] == "base"
    assert said["path"].endswith("ema.safetensors")
    x = flow.sample(
        model, dit.random_context(model.cfg), flow.sigma_grid(2), torch.randn(1, 16, 10, 8, 8)
    )
    assert x.isfinite().all()
    assert {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "ema.safetensors",
        "train_state.pt",
    } == {file.name for file in newest(reference).iterdir()}


@pytest.mark.long
def test_the_vae_stages_leave_vaes_that_encode_and_decode():
    video = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    start("--stage", "vae", "--steps", "2", "--batch", "1")
    full = weights.vae_from_weights(*weights.read_weights("runs/vae-micro/vae.safetensors")).float()
    start("--stage", "lightvae", "--rate", ".5", "--steps", "2", "--batch", "1")
    light = weights.vae_from_weights(
        *weights.read_weights("runs/lightvae-micro/vae.safetensors")
    ).float()
    with torch.no_grad():
        z = full.encode(video)
        assert full.decode(z).shape == light.decode(z).shape == video.shape
    assert light.cfg.dec_dim == full.cfg.dec_dim // 2
    assert list(Path("runs/lightvae-micro/samples").glob("*.png"))


@pytest.mark.long
def test_a_decoder_trained_alone_leaves_the_latents_as_they_are():
    video = torch.rand(1, 3, 9, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    start("--stage", "vae", "--steps", "4", "--batch", "1", "--run", "whole")
    start(
        *(
            "--stage vae --steps 4 --batch 1 --run decoder --init runs/whole/vae.safetensors "
            "--decoder-only"
        ).split()
    )
    before, after = (
        weights.vae_from_weights(*weights.read_weights(f"runs/{run}/vae.safetensors")).float()
        for run in ("whole", "decoder")
    )
    with torch.no_grad():
        assert torch.allclose(before.encode(video), after.encode(video), atol=1e-5)
        assert (
            before.decode(before.encode(video)) - after.decode(before.encode(video))
        ).abs().max() > 1e-4

    def caches() -> list[str]:
        return sorted(path.name for path in Path("datasets/micro").glob("latents-*"))

    start("--steps", "1", "--run", "a", "--vae", "runs/whole/vae.safetensors")
    known = caches()
    start("--steps", "1", "--run", "b", "--vae", "runs/decoder/vae.safetensors")
    assert caches() == known, "what was encoded stays encoded"


def test_distill_starts_from_the_shipped_base_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(cli, "ROOT", ROOT)
    assert flags.parse(["--stage", "distill"]).init == "assets/tiny/base.safetensors"
    assert flags.parse(["--stage", "distill", "--init", "runs/mine"]).init == "runs/mine"
    assert (
        flags.parse(["--stage", "distill", "--preset", "micro"]).init == flags.parse([]).init == ""
    )


def test_distill_makes_a_student_of_a_base(reference):
    start(
        *(
            f"--stage distill --init {reference} --segments 1 --steps 4 --cold-start 2 "
            "--batch 2 --ratio 1 --ratio-cold 1"
        ).split()
    )
    student, base = weights.load("runs/distill-micro")[0], weights.load(reference)[0]
    moved = [
        not torch.equal(a, b) for a, b in zip(student.parameters(), base.parameters(), strict=True)
    ]
    assert any(moved)
    assert all("critic" in line for line in log("runs/distill-micro"))


def test_a_base_from_nothing_begins_with_layout_and_one_that_goes_on_with_detail() -> None:
    def settings(*argv: str) -> tuple[float, str]:
        cfg = flags.parse([*argv])
        return cfg.shift, cfg.new

    assert settings() == (5.0, "10")
    assert settings("--init", "runs/mine") == settings("--stage", "distill") == (1.5, "10 5 2")
    assert settings("--new", "5", "--shift", "2") == (2.0, "5")
    assert settings("--preset", "5b", "--init", "x") == (5.0, "10")


@pytest.mark.parametrize("preset", ["micro", "tiny"])
def test_every_rollout_that_distill_draws_by_default_fits_into_an_episode(preset):
    cfg = flags.parse(["--stage", "distill", "--preset", preset])
    assert Window().frames(cfg.segments) <= data.PRESETS[preset].frames


@pytest.mark.long
def test_experts_are_trained_one_by_one_and_joined(monkeypatch):
    levels, plain = [], flow.add_noise
    monkeypatch.setattr(
        flow, "add_noise", lambda x0, noise, sigma: levels.append(sigma) or plain(x0, noise, sigma)
    )
    seen = {}
    for expert, view in (("high-first", "first"), ("high-third", "third"), ("low", "low")):
        levels.clear()
        start(*f"--stage moe --expert {expert} --run {expert} --steps 2 --boundary .8".split())
        seen[view] = torch.cat(levels)
    assert (seen["first"] >= 0.8).all()
    assert (seen["third"] >= 0.8).all()
    assert (seen["low"] <= 0.8).all()
    assert (
        train.main(
            [
                "--export",
                *(f"runs/{name}" for name in ("high-first", "high-third", "low")),
                "moe.safetensors",
            ]
        )
        == 0
    )
    joined, said = weights.load("moe.safetensors", dtype=torch.float32)
    assert set(joined.high) == {"first", "third"}
    assert joined.boundary == 0.8
    assert said["view"] == "both"
    with pytest.raises(ValueError, match="joined runs must be different experts"):
        train.main(["--export", "runs/low", "runs/low", "moe.safetensors"])
    with pytest.raises(ValueError, match="--export RUN ... FILE takes runs"):
        train.main(["--export", "runs/low"])
    low, _ = weights.load("runs/low")
    torch.testing.assert_close(
        joined.low.state_dict(), low.state_dict(), rtol=4e-3, atol=1e-6
    )  # bfloat16


@pytest.mark.parametrize("expert, lowest, highest", [("high-first", 0.9, 1.0), ("low", 0.0, 0.9)])
def test_an_expert_sees_the_levels_of_the_base_between_its_borders(expert, lowest, highest):
    """Quartiles of what it draws are those of the base's draws that fall there: .958 in the middle
    of the high one, where squeezing the whole density into the part would give .983."""
    cfg = TrainConfig(stage="moe", expert=expert, boundary=0.9, batch=200_000, shift=5.0)
    drawn = train.draw_sigma(cfg, torch.Generator().manual_seed(0))
    every = flow.sample_sigma(400_000, cfg.shift, torch.Generator().manual_seed(1))
    expected = every[(every >= lowest) & (every <= highest)]
    at = torch.tensor([0.25, 0.5, 0.75])
    assert drawn.min() >= lowest
    assert drawn.max() <= highest
    torch.testing.assert_close(drawn.quantile(at), expected.quantile(at), atol=4e-3, rtol=0)
    if expert == "high-first":
        assert drawn.median() == pytest.approx(0.958, abs=2e-3)


def test_a_dense_model_draws_what_the_base_draws():
    dense = TrainConfig(stage="moe", expert="dense", batch=100)
    levels = [
        train.draw_sigma(cfg, torch.Generator().manual_seed(0))
        for cfg in (dense, TrainConfig(batch=100))
    ]
    assert torch.equal(*levels)


@pytest.mark.parametrize("preset", ["tiny", "small", "5b", "14b"])
@pytest.mark.parametrize("stage", ["base", "distill"])
def test_the_average_that_is_shipped_is_not_mostly_its_start(stage, preset):
    cfg = flags.parse(["--stage", stage, "--preset", preset, "--init", "x"])
    updates = cfg.steps
    if stage == "distill":
        updates = cfg.cold_start // cfg.ratio_cold + (cfg.steps - cfg.cold_start) // cfg.ratio
    assert cfg.ema**updates < 0.02


def test_both_views_are_drawn_equally_often_and_high_experts_want_true_keys(clips, monkeypatch):
    run = dataclasses.replace(
        clips[1], cfg=dataclasses.replace(clips[1].cfg, stage="moe", expert="dense")
    )
    decoder, root = load_vae(run.cfg, run.device), Path(run.cfg.data or "datasets/micro")
    one, three, both = (seen_by(view, run, decoder, root) for view in ("first", "third", "both"))
    assert (run.view, len(one.latents), len(three.latents), len(both.latents)) == ("both", 4, 1, 8)
    assert all(torch.equal(row, three.latents[0]) for row in both.latents[4:])
    high = dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, expert="high-first"))
    read = episode.read_episode
    monkeypatch.setattr(
        "engine.clips.read_episode",
        lambda path: (e := read(path), e.meta.update(action_source="inferred"))[0],
    )
    with pytest.raises(ValueError, match="no episodes in .*/train that --stage moe can learn from"):
        load_clips(high, decoder, root, "train")


@pytest.mark.long
def test_samples_and_held_out_scores_appear_while_training():
    start("--steps", "2", "--sample-every", "2")
    assert {file.suffix for file in Path("runs/base-micro/samples").iterdir()} == {".png", ".mp4"}
    assert {"psnr model", "psnr no memory", "psnr wrong actions"} < log("runs/base-micro")[
        -1
    ].keys()


@pytest.mark.long
def test_a_folder_without_a_vae_says_which_command_makes_one_and_it_does(monkeypatch, capsys):
    Path("assets").unlink()
    with pytest.raises(ValueError, match="python train.py --stage vae --preset micro"):
        start("--steps", "1")
    start("--stage", "vae", "--steps", "1", "--batch", "1")
    assert start("--steps", "1") == 0


# ---- behaviour: what is learned, and from what


@pytest.mark.long
def test_loss_falls_on_one_clip():
    start(*("--steps 60 --overfit 1 --lr 3e-3 --warmup 5 --p-error 0 --p-null 0 --p-i2v 0").split())
    curve = losses("runs/base-micro")
    assert curve[:5].mean() > 1.5
    assert curve[-10:].mean() < 0.75 * curve[:5].mean()


def test_only_new_latents_carry_loss(clips, monkeypatch):
    targets, plain = [], flow.velocity
    monkeypatch.setattr(
        flow, "velocity", lambda x0, noise: targets.append((x0, noise)) or plain(x0, noise)
    )
    start("--steps", "1")
    x0, noise = targets[0]
    drawn, context = draw(*clips, 0)
    assert torch.equal(x0, drawn)
    new = context.times[:, -x0.shape[2] :]  # the newest latents of the window, no past, no memory
    assert (new.diff(dim=1) == 1).all()
    assert (context.times[:, : -x0.shape[2]].amax(1) < new[:, 0]).all()
    expected = plain(x0, noise).square().mean()  # a fresh network says 0
    torch.testing.assert_close(losses("runs/base-micro")[0], expected, atol=1e-5, rtol=0)


@pytest.mark.long
def test_errors_perturb_past_and_memory_but_never_the_target(clips, monkeypatch):
    given = []
    targets = []
    inject = mistakes.inject
    velocity = flow.velocity
    monkeypatch.setattr(train, "inject", lambda *args: given.append(inject(*args)) or given[-1])
    monkeypatch.setattr(
        flow, "velocity", lambda x0, noise: targets.append(x0) or velocity(x0, noise)
    )
    start("--steps", "10", "--p-error", "1", "--p-i2v", "0", "--p-memory-off", "0")
    for step, (context, target) in enumerate(zip(given, targets, strict=True)):
        x0, clean = draw(*with_flags(clips, p_i2v=0.0, p_memory_off=0.0), step)
        assert torch.equal(target, x0)
        changed = [
            not torch.equal(getattr(context, name), getattr(clean, name))
            for name in ("past", "memory")
        ]
        assert changed == [step >= 3] * 2  # warmup=3: nothing before the fourth step
        assert all(
            same(getattr(context, k), getattr(clean, k))
            for k in ("times", "rays", "mouse", "keyboard", "text")
        )


@pytest.mark.parametrize("where", ["past", "memory"])
def test_errors_go_only_where_they_are_asked_to_go(where, clips):
    clips, run = with_flags(clips, p_i2v=0.0, p_memory_off=0.0, inject=where)
    clean = draw(clips, run, 0)[1]
    dirty = mistakes.inject(filled("real"), clean, run, torch.Generator().manual_seed(0))
    assert [not torch.equal(getattr(dirty, k), getattr(clean, k)) for k in ("past", "memory")] == [
        where == "past",
        where == "memory",
    ]


def test_errors_of_the_same_scene_are_what_the_network_makes_of_these_latents(clips):
    clips, run = with_flags(clips, p_i2v=0.0, p_memory_off=0.0, p_own=1.0, p_later=0.0)
    cut = draw_cut(clips, run, 0)
    clean = batch(clips, run, cut)[1]
    seen = []

    def network(x_sigma, sigma, context):
        seen.append((x_sigma, sigma, context))
        return torch.ones_like(x_sigma)  # v = 1 everywhere: x̂0 − x0 = σ·(noise − x0 − 1)

    own = mistakes.own_errors(network, clips, run, cut, torch.Generator().manual_seed(0))
    x_sigma, sigma, context = seen[0]
    P = cut.n_past
    M = clean.memory.shape[2]
    x0 = torch.cat([clean.memory, clean.past], 2)
    expected = x_sigma - sigma.view(-1, 1, 1, 1, 1) - x0
    torch.testing.assert_close(torch.cat([own["memory"], own["past"]], 2), expected)

    # it is told one latent, the one before the past, and asked for these memories and this past
    assert context.past.shape[2] == 1
    assert context.memory.shape[2] == 0
    assert torch.equal(context.times[:, 0], cut.start - P - 1)
    assert torch.equal(context.times[:, 1:], clean.times[:, : M + P])

    buffer = filled("real")
    buffer.cfg = dataclasses.replace(buffer.cfg, probability=1.0, jitter=0.0)
    dirty = mistakes.inject(buffer, clean, run, torch.Generator().manual_seed(0), own)
    torch.testing.assert_close(dirty.past, clean.past + own["past"])
    torch.testing.assert_close(dirty.memory, clean.memory + own["memory"])


@pytest.mark.long
def test_errors_of_the_same_scene_train_and_resume_exactly():
    start("--steps", "12", "--p-own", "0.5", "--save-every", "6", "--run", "whole")
    start("--steps", "6", "--p-own", "0.5", "--save-every", "6", "--run", "part")
    start("--steps", "12", "--p-own", "0.5", "--save-every", "6", "--run", "part")
    assert torch.equal(losses("runs/whole"), losses("runs/part"))
    start("--steps", "12", "--run", "foreign")
    assert not torch.equal(losses("runs/whole"), losses("runs/foreign"))


def test_every_step_draws_one_of_the_lengths_and_stays_inside_the_clip(clips):
    clips, run = with_flags(clips, p_i2v=0.0, new="10 5 2")
    cuts = [draw_cut(clips, run, step) for step in range(60)]
    assert {cut.n_new for cut in cuts} == {10, 5, 2}
    last = clips.latents.shape[2]
    assert all(int(cut.start.max()) + cut.n_new <= last for cut in cuts)
    assert any(int(cut.start.max()) + 10 > last for cut in cuts if cut.n_new == 2)

    # ten at once draws what it drew before there were lengths: the same windows, the same memory
    clips, ten = with_flags((clips, run), p_i2v=0.0, new="10")
    for step, cut in enumerate(cuts):
        same_step = draw_cut(clips, ten, step)
        assert torch.equal(same_step.rows, cut.rows)
        assert same_step.n_new == 10
        assert (cut.start >= same_step.start).all()


def test_short_segments_ask_for_memory_as_play_does(clips):
    clips, run = with_flags(clips, p_i2v=0.0, p_memory_off=0.0, new="2")
    x0, context = draw(clips, run, 0)
    assert x0.shape[2] == 2
    assert context.memory.shape[2] == 5
    assert context.past.shape[2] == 4


@pytest.mark.parametrize("said", ["3", "", "10,5", "ten"])
def test_lengths_that_nobody_plays_are_refused(said, capsys):
    with pytest.raises(ValueError, match="'10 5 2'"):
        flags.lengths(TrainConfig(new=said))


def test_a_lone_image_is_real_data_and_stays(clips):
    clips, run = with_flags(clips, p_i2v=1.0)
    clean = draw(clips, run, 0)[1]
    assert torch.equal(
        mistakes.inject(filled("real"), clean, run, torch.Generator()).past, clean.past
    )


def test_the_gaussian_control_has_the_variance_of_the_real_errors(clips):
    clips, run = with_flags(clips, batch=16, p_i2v=0.0, p_memory_off=0.0)
    clean, size = draw(clips, run, 0)[1], {}
    for kind in ("real", "gaussian"):
        dirty = mistakes.inject(filled(kind), clean, run, torch.Generator().manual_seed(0))
        size[kind] = torch.stack(
            [(getattr(dirty, k) - getattr(clean, k)).std() for k in ("past", "memory")]
        )
    assert (size["real"] > 0.1).all()
    torch.testing.assert_close(size["gaussian"], size["real"], atol=0, rtol=0.05)


def filled(kind: str) -> error_buffer.ErrorBuffer:
    """A buffer of errors that are flat within a channel, nothing like noise."""
    buffer = error_buffer.ErrorBuffer(EARLY(warmup=0, probability=1.0, kind=kind))
    g = torch.Generator().manual_seed(1)
    for _ in range(4):
        flat = torch.randn(4, 16, 4, 1, 1, generator=g).expand(-1, -1, -1, 8, 8)
        buffer.push(0.3 * (flat - flat.mean((1, 3, 4), keepdim=True)), g)
    return buffer


def with_flags(clips: tuple[Clips, Run], **flags: object) -> tuple[Clips, Run]:
    return clips[0], dataclasses.replace(clips[1], cfg=dataclasses.replace(clips[1].cfg, **flags))


# ---- what a batch is


@pytest.mark.long
def test_shares_of_batches_are_what_was_asked_for(clips):
    shares = dict(p_i2v=0.3, p_memory_off=0.4, p_null=0.2)
    clips = with_flags(clips, **shares)
    batches = [draw(*clips, step)[1] for step in range(300)]
    image = [c.past.shape[2] == 1 for c in batches]
    off = [c.memory.shape[2] == 0 for c, i in zip(batches, image, strict=True) if not i]
    null = torch.cat(
        [
            (c.keyboard == -1).flatten(1).all(1)
            & (c.mouse == 1).flatten(1).all(1)
            & (c.text == 0).flatten(1).all(1)
            for c in batches
        ]
    )
    for name, found in zip(shares, (image, off, null.tolist()), strict=True):
        spread = 4 * (shares[name] * (1 - shares[name]) / len(found)) ** 0.5
        assert abs(sum(found) / len(found) - shares[name]) < spread, name


def test_image_to_video_has_one_past_latent_and_no_memory(clips):
    x0, context = draw(*with_flags(clips, p_i2v=1.0), 0)
    assert (context.past.shape[2], context.memory.shape[2], x0.shape[2]) == (1, 0, 14)
    assert context.times.tolist() == [list(range(15))] * 4


def test_memory_is_always_older_than_the_past(clips):
    clips = with_flags(clips, p_i2v=0.0, p_memory_off=0.0)
    for step in range(40):
        x0, context = draw(*clips, step)
        M, P = context.memory.shape[2], context.past.shape[2]
        assert (M, P) == (5, 4) and x0.shape[2] in (10, 5, 2)
        assert (context.times[:, :M].amax(1) < context.times[:, M]).all()


def test_without_a_sink_the_oldest_latent_is_remembered_only_where_it_is_asked_for(clips):
    sure = dict(p_i2v=0.0, p_memory_off=0.0)
    last = [
        [
            draw(*with_flags(clips, **sure, sink=sink), step)[1].times[:, 4].tolist()
            for step in range(10)
        ]
        for sink in (True, False)
    ]
    assert all(t <= 1 for row in last[0] for t in row)
    assert any(t > 1 for row in last[1] for t in row)


@pytest.mark.long
def test_some_memories_are_from_long_ago_and_nothing_else_changes(clips):
    sure = dict(p_i2v=0.0, p_memory_off=0.0)
    waits = []
    for step in range(40):
        (x0, then), (other, now) = (
            draw(*with_flags(clips, **sure, p_later=p), step) for p in (1.0, 0.0)
        )
        wait = then.times - now.times
        assert torch.equal(x0, other)
        assert torch.equal(then.rays, now.rays)
        assert torch.equal(then.memory, now.memory)
        assert (wait[:, :5] == 0).all()
        assert (wait[:, 5:] == wait[:, 5:6]).all()
        waits += wait[:, 5].tolist()
    assert min(waits) >= 1
    assert max(waits) <= 2000
    assert 20 < sorted(waits)[80] < 100  # evenly in their logarithm


def test_revisits_are_drawn_as_often_as_asked(clips):
    clips, run = clips
    worth = {}
    for share in (0.0, 1.0):
        sure = with_flags((clips, run), revisit=share, p_i2v=0.0, p_later=0.0, new="10")
        starts = [(draw(*sure, step)[1].times[:, -10]) for step in range(40)]
        rows = [
            torch.randint(len(clips.latents), (4,), generator=generator(run.cfg, step))
            for step in range(40)
        ]
        scores = clips.revisit[:]
        worth[share] = torch.cat([scores[r, s] for r, s in zip(rows, starts, strict=True)]).mean()
    assert worth[1.0] > 1.2 * worth[0.0] > 0


def test_a_student_may_go_on_from_another_one():
    assert start("--steps", "1", "--run", "teacher") == 0
    assert start("--steps", "1", "--run", "earlier", "--seed", "5") == 0
    flags_of_both = ["--stage", "distill", "--init", "runs/teacher"]
    cfg = parse([*MICRO, *flags_of_both, "--student", "runs/earlier"])
    here = Run(Path("runs/none"), cfg, torch.device("cpu"), torch.float32)
    student = train.Learner.start(here, cfg.lr, cfg.student).model
    critic = train.Learner.start(here, cfg.lr_critic).model
    for model, name in ((student, "earlier"), (critic, "teacher")):
        started_as = weights.load(f"runs/{name}")[0]
        assert same(model.state_dict(), started_as.state_dict())


def test_ranks_share_a_batch_without_loss(clips):
    whole = draw(*clips, 7)[0]
    parts = [
        draw(clips[0], dataclasses.replace(clips[1], rank=rank, world=2), 7)[0] for rank in range(2)
    ]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


# ---- bad input: what, why, what to type; exit 2, nothing lost


@pytest.mark.parametrize("name", ["", "../../victim", "..", ".", "/victim", "a/b", "-x", "runs\\x"])
def test_fresh_deletes_nothing_outside_runs(name, tmp_path, monkeypatch):
    """A name that leads out of runs/ is refused before anything is touched."""
    place = tmp_path / "w"
    victim = tmp_path / "victim"
    for folder in (place / "runs", victim):
        folder.mkdir(parents=True)
    (victim / "precious").write_text("kept")
    monkeypatch.setattr(cli, "ROOT", place)
    with pytest.raises(ValueError, match="--run takes a name under runs/"):
        run.setup(flags.parse(["--preset", "micro", f"--run={name}", "--fresh"]))
    assert (victim / "precious").read_text() == "kept"
    assert (place / "runs").is_dir()


@pytest.mark.parametrize(
    "wrong", [["--data", "typo"], ["--vae", "typo.safetensors"], ["--init", "runs/typo"]]
)
def test_fresh_deletes_nothing_for_a_line_that_cannot_be_trained(wrong, reference):
    shutil.copytree(reference, "runs/base-micro")
    with pytest.raises(ValueError, match="typo"):
        start("--fresh", "--steps", "8", *wrong)
    assert newest("runs/base-micro").name == "000008"


@pytest.mark.long
def test_a_run_goes_on_with_the_vae_and_the_teacher_it_began_with(reference):
    shutil.copy(Path("assets/micro/vae.safetensors"), "mine.safetensors")
    shutil.copytree(reference, "runs/teacher")
    how = ["--stage", "distill", "--vae", "mine.safetensors", "--init", "runs/teacher"]
    how += ["--batch", "2", "--cold-start", "9", "--ratio-cold", "1", "--segments", "1"]
    assert start(*how, "--steps", "1") == 0
    Path("runs/teacher/latest").write_text("000004")
    with pytest.raises(ValueError, match="made with another --init: the file has changed"):
        start(*how, "--steps", "2")
    Path("runs/teacher/latest").write_text("000008")
    with open("mine.safetensors", "ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match="made with another --vae: the file has changed"):
        start(*how, "--steps", "2")


@pytest.mark.long
def test_a_vae_whose_file_could_not_be_written_is_not_done(monkeypatch):
    how = ["--stage", "vae", "--steps", "2", "--save-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "export_vae", full)
        with pytest.raises(safetensors.SafetensorError, match="No space left"):
            start(*how)
    assert start(*how) == 0
    assert Path("runs/vae-micro/vae.safetensors").exists()


@pytest.mark.parametrize(
    "log",
    [
        '{"step": 1, "loss": 2}\n{"step": 2, "lo',
        '[1]\nnull\n\n{"step": 1, "loss": 2}\n{"loss": 3}\n',
    ],
)
def test_a_damaged_line_of_a_log_is_left_out(log, tmp_path):
    (tmp_path / "log.jsonl").write_text(log)
    assert run.lines_of(tmp_path / "log.jsonl") == [{"step": 1, "loss": 2}]


@pytest.mark.parametrize("config", ["[]", "{", '{"stage": "base"}'])
def test_a_damaged_config_of_a_run_is_named(config, reference):
    shutil.copytree(reference, "runs/base-micro")
    Path("runs/base-micro/config.json").write_text(config)
    with pytest.raises(ValueError, match="config.json is damaged"):
        start("--steps", "9")


def test_a_damaged_checkpoint_says_how_to_go_on_from_another(reference):
    shutil.copytree(reference, "runs/base-micro")
    (newest("runs/base-micro") / "train_state.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="echo 000004 > .*latest"):
        start("--steps", "9")
    Path("runs/base-micro/latest").write_text("000004")
    assert start("--steps", "5") == 0


def test_a_damaged_cache_of_latents_is_made_anew(tmp_path):
    others = shutil.ignore_patterns("latents-*")  # made by another process
    shutil.copytree(Path("datasets/micro"), tmp_path / "mine", ignore=others)
    run_of = Run(
        tmp_path, TrainConfig(preset="micro", data=str(tmp_path / "mine")), "cpu", torch.float32
    )
    vae = load_vae(run_of.cfg, "cpu")
    load_clips(run_of, vae, tmp_path / "mine", "train")
    file = next((tmp_path / "mine").glob("latents-train-*/*.safetensors"))
    before = file.read_bytes()
    file.write_bytes(before[:3000])
    load_clips(run_of, vae, tmp_path / "mine", "train")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("file", "says"),
    [("notes.md", "writes a .safetensors file, got notes.md"), ("x.pt", "got x.pt")],
)
def test_an_export_overwrites_no_other_kind_of_file(file, says, reference):
    with pytest.raises(ValueError, match=says):
        train.main(["--export", str(reference), file])


def test_fresh_deletes_only_what_train_py_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notes = tmp_path / "runs/notes"
    notes.mkdir(parents=True)
    (notes / "thesis.txt").write_text("kept")
    with pytest.raises(ValueError, match="no config.json"):
        run.start_over(Path("runs/notes"))
    assert (notes / "thesis.txt").exists()
    (tmp_path / "runs/link").symlink_to(notes)
    (notes / "config.json").write_text('{"name": "of another program"}')
    with pytest.raises(ValueError, match="no config.json"):
        run.start_over(Path("runs/notes"))
    (notes / "config.json").write_text(json.dumps(dataclasses.asdict(TrainConfig())))
    with pytest.raises(ValueError, match="deletes runs"):
        run.start_over(Path("runs/link"))
    run.start_over(Path("runs/notes"))
    assert not notes.exists()


def test_two_processes_never_train_one_run(monkeypatch, capsys):
    """The second one is refused before it writes a line, also with --fresh, and the first goes on."""
    busy = cli.claim(Path("runs/base-micro"))
    for flags_of_second in ([], ["--fresh"]):
        if flags_of_second:
            config = json.dumps(dataclasses.asdict(TrainConfig()))
            Path("runs/base-micro/config.json").write_text(config)
        assert script(monkeypatch, *MICRO, "--steps", "1", *flags_of_second) == 2
        assert "another process is at work in runs/base-micro" in capsys.readouterr().err
        assert not Path("runs/base-micro/log.jsonl").exists()
    busy.close()
    assert start("--steps", "1", "--fresh") == 0
    assert len(log("runs/base-micro")) == 1


def test_a_run_is_found_and_goes_on_from_any_folder(tmp_path, monkeypatch):
    start("--steps", "2")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert start("--steps", "4") == 0
    assert [line["step"] for line in log(tmp_path / "runs/base-micro")] == [1, 2, 3, 4]
    assert not list(elsewhere.iterdir())
    how = [*MICRO, "--stage", "distill", "--init", "runs/base-micro", *DISTILL, "--batch", "1"]
    assert train.main([*how, "--steps", "1"]) == 0
    assert (tmp_path / "runs/distill-micro/latest").exists()


def test_what_the_system_refuses_is_one_line_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert script(monkeypatch, *MICRO, "--steps", "1") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_an_unknown_flag_suggests_the_nearest_name(monkeypatch, capsys):
    assert script(monkeypatch, "--stpes", "5") == 2
    assert "did you mean --steps?" in capsys.readouterr().err


def test_help_gives_the_defaults_and_the_values_of_the_paper(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.split()[:1] == ["--lr"])
    assert "default 0.001" in line
    assert "paper: 2e-5, §5.1" in line
    assert "error buffer:" in text


def test_a_run_with_another_configuration_is_refused_with_a_table(monkeypatch, capsys):
    start("--steps", "1")
    before = state("runs/base-micro")
    assert script(monkeypatch, *MICRO, "--steps", "2", "--lr", "0.5", "--batch", "8") == 2
    rows = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["lr", "0.001", "0.5"] in rows
    assert ["batch", "4", "8"] in rows
    assert "--fresh" in sum(rows, [])
    assert same(state("runs/base-micro"), before)
    assert start("--steps", "1", "--lr", "0.5", "--fresh") == 0
    assert len(log("runs/base-micro")) == 1


def test_a_run_from_before_a_flag_existed_resumes_with_its_default(monkeypatch):
    start("--steps", "1")
    said = json.loads(Path("runs/base-micro/config.json").read_text())
    Path("runs/base-micro/config.json").write_text(
        json.dumps({k: v for k, v in said.items() if k not in ("sink", "net")})
    )
    assert start("--steps", "2") == 0
    assert script(monkeypatch, *MICRO, "--steps", "3", "--no-sink") == 2


def test_another_network_is_trained_and_its_run_says_what_it_is():
    assert (
        start(
            "--steps",
            "1",
            "--net",
            "layers=1 sigma_theta=0.1 dim=48",
            "--no-sink",
            "--encoding",
            "absolute",
            "--p-memory-off",
            "1",
        )
        == 0
    )
    model, said = weights.load("runs/base-micro")
    assert (model.cfg.layers, model.cfg.sigma_theta, model.cfg.dim, model.cfg.heads) == (
        1,
        0.1,
        48,
        2,
    )
    assert (said["sink"], said["encoding"], said["p_memory_off"]) == (False, "absolute", 1.0)


def test_distill_without_base_says_what_to_do_and_then_works(reference, monkeypatch, capsys):
    assert script(monkeypatch, *MICRO, "--stage", "distill") == 2
    assert (
        "needs --init <base run>; make one with: python train.py --stage base"
        in capsys.readouterr().err
    )
    assert (
        start(*f"--stage distill --init {reference} --segments 1 --steps 1 --batch 1".split()) == 0
    )


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--data", "nowhere"], "make one with: python data.py make --preset micro --out nowhere"),
        (["--vae", "nowhere"], "python train.py --stage vae --preset micro"),
        (["--init", "nowhere"], "No weights at nowhere"),
        (
            ["--stage", "vae", "--decoder-only"],
            "--stage vae --decoder-only --init assets/tiny/vae.safetensors",
        ),
        (
            ["--stage", "lightvae", "--decoder-only", "--init", "x"],
            "--stage vae --decoder-only --init assets/tiny/vae.safetensors",
        ),
        (
            ["--stage", "lightvae", "--init", "assets/micro/vae.safetensors"],
            "has a decoder of width 8, this run 2: see --preset and --rate",
        ),
        (
            ["--net", "width=128"],
            "--net takes fields of dit.DiTConfig, as in 'dim=128 sigma_theta=0', got 'width=128'",
        ),
        (["--net", "dim"], "got 'dim'"),
        (["--net", "heads=0"], "no network has heads = 0"),
        (["--net", "layers=2.5"], "no network has layers = 2.5"),
        (["--net", "patch=5"], "no network has patch = 5"),
        (["--net", 'dim="x"'], "no network has dim = x"),
        (["--ema", "1.5"], "--ema must be 0 to 0.999999, got 1.5"),
        (["--shift", "0"], "--shift must be 1e-06 or more, got 0"),
        (["--p-i2v", "7"], "--p-i2v must be 0 to 1, got 7"),
        (["--gamma", "nan"], "--gamma must be 0 or more, got nan"),
        (["--seed", "9" * 20], "--seed must be 0 to"),
        (["--data", "nowhere"], "--data nowhere is no folder; make one with"),
        (["--init", "runs/nope"], "there is no run runs/nope; runs with weights: "),
        (["--vae", "nope.safetensors"], "no VAE at nope.safetensors"),
        (["--rate", "1.5"], "--rate is a share between 0 and 1, got 1.5"),
        (
            ["--net", "dim=100 heads=3"],
            "dim must be a multiple of twice heads, got 100 and 3",
        ),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--accum", "0"], "--accum must be 1 or more, got 0"),
        (["--accum", "0", "--dry-run"], "--accum must be 1 or more, got 0"),
        (
            ["--stage", "vae", "--accum", "4"],
            "--accum is for --stage base, moe; vae needs less memory with a smaller --batch",
        ),
        (
            ["--stage", "vae", "--checkpoint-activations"],
            "--checkpoint-activations is for --stage base, moe, distill; vae needs less memory",
        ),
        (["--steps", "-3"], "--steps must be 1 or more, got -3"),
        (["--segments", "0"], "--segments must be 1 or more, got 0"),
        (["--ratio", "0"], "--ratio must be 1 or more, got 0"),
        (["--ratio-cold", "0"], "--ratio-cold must be 1 or more, got 0"),
        (["--overfit", "-1"], "--overfit must be 0 or more, got -1"),
        (["--stage", "bse"], "did you mean base?"),
        (["--dtype", "float31"], "did you mean float32?"),
        (
            ["--batch", "3", "--accum", "2"],
            "--batch 3 does not divide among 1 ranks x 2 micro-batches; use a multiple of 2",
        ),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(flags, says, monkeypatch, capsys):
    assert script(monkeypatch, *MICRO, *flags) == 2
    assert says in capsys.readouterr().err


def test_several_ranks_refuse_muon_and_odd_batches(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="add --muon 0"):
        start()
    with pytest.raises(ValueError, match="use a multiple of 2"):
        start("--muon", "0", "--batch", "5")


def test_a_full_disk_leaves_the_old_checkpoint_intact(reference, monkeypatch, capsys):
    start("--steps", "4")
    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", full)
        assert script(patch, *MICRO, "--steps", "8", "--save-every", "4") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert newest("runs/base-micro").name == "000004"
    assert weights.load("runs/base-micro")[1]["step"] == 4
    start("--steps", "8", "--save-every", "4")
    assert same(state("runs/base-micro"), state(reference))


def test_a_full_disk_while_episodes_are_encoded_leaves_no_half_cache(monkeypatch, capsys):
    data.make_dataset("own", "micro", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", full)
        assert script(patch, *MICRO, "--steps", "1", "--data", "own") == 2
    told = capsys.readouterr().err
    assert "error: cannot write own/latents-train-" in told
    assert "No space left on device" in told
    assert not list(Path("own").glob("latents-*/*"))


def full(*_: object) -> None:
    raise safetensors.SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


def test_a_loss_that_is_no_number_stops_with_a_dump_and_names_the_weight(monkeypatch, capsys):
    start("--steps", "2")
    file = newest("runs/base-micro") / "diffusion_pytorch_model.safetensors"
    tensors, said = weights.read_weights(file)
    name = next(n for n in tensors if "blocks.1." in n and tensors[n].ndim == 2)
    tensors = {n: t.clone() for n, t in tensors.items()}
    tensors[name][0, 0] = float("nan")
    weights.write_weights(file, tensors, said)
    assert script(monkeypatch, *MICRO, "--steps", "4") == 2
    told = capsys.readouterr().err
    assert "loss is nan" in told
    assert "runs/base-micro/nan_dump.safetensors" in told
    assert f"first bad weight: {name}" in told
    assert weights.read_weights("runs/base-micro/nan_dump.safetensors")[0]["x0"].isfinite().all()


@pytest.mark.parametrize(
    "stage, file",
    [("vae", "training"), ("distill", "diffusion_pytorch_model"), ("distill", "critic")],
)
def test_the_other_stages_stop_at_it_too(stage, file, reference):
    how = ["--stage", stage, "--batch", "1"]
    how += ["--init", str(reference), *DISTILL] if stage == "distill" else []
    start(*how, "--steps", "1")
    path = newest(f"runs/{stage}-micro") / f"{file}.safetensors"
    tensors, said = weights.read_weights(path)
    name = next(n for n in tensors if tensors[n].ndim >= 2 and n.endswith("weight"))
    weights.write_weights(path, tensors | {name: torch.full_like(tensors[name], torch.nan)}, said)
    with pytest.raises(ValueError, match=f"loss is nan.*first bad weight: {name}"):
        start(*how, "--steps", "2")
    assert newest(f"runs/{stage}-micro").name == "000001"


def test_old_checkpoints_are_removed_and_the_newest_kept():
    start("--steps", "6", "--save-every", "2", "--keep", "2")
    assert sorted(file.name for file in Path("runs/base-micro/ckpt").iterdir()) == [
        "000004",
        "000006",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_keeps_the_numbers_of_steps_that_were_logged(rank, tmp_path):
    cfg = flags.parse([*MICRO, "--log-every", "2"])
    run = Run(tmp_path, cfg, torch.device("cpu"), torch.float32, rank=rank)
    progress = Progress(run)
    for run.step in range(1, 6):
        progress(loss=float(run.step))
    assert progress.sums == {"loss": [5.0]}
    lines = log(tmp_path) if rank == 0 else []
    assert [line["loss"] for line in lines] == ([1.5, 3.5] if rank == 0 else [])


# ---- sizes that do not fit here


@pytest.mark.parametrize("preset, billions", [("5b", (5, 8)), ("14b", (14, 21))])
def test_dry_run_says_what_a_step_needs_without_allocating_it(preset, billions, capsys):
    assert train.main(["--preset", preset, "--dry-run"]) == 0
    text = capsys.readouterr().out
    millions = float(text.split(": ")[1].split(" M")[0])
    assert billions[0] * 1000 < millions < billions[1] * 1000
    assert all(row in text for row in ("| optimiser |", "| activations |", "| total |"))
    assert not Path("runs").exists()


@pytest.mark.parametrize("preset", ["5b", "14b"])
def test_a_batch_of_the_big_presets_has_the_released_rays(preset, clips):
    clips, cfg = (
        clips[0],
        flags.parse(["--preset", preset, "--batch", "2", "--p-i2v", "0", "--p-memory-off", "0"]),
    )
    clips = dataclasses.replace(
        clips, latents=clips.latents[:][:, :1, :, :4, :4].expand(-1, 48, -1, -1, -1)
    )
    x0, context = draw(clips, Run(Path("runs/none"), cfg, torch.device("cpu"), torch.float32), 0)
    assert x0.shape == (2, 48, 10, 4, 4)
    assert context.rays.shape == (
        2,
        dit.PRESETS[preset].ray_channels,
        19,
        4,
        4,
    )


@pytest.mark.long
@pytest.mark.parametrize("preset", ["5b", "14b"])
def test_big_presets_build_in_shards_on_meta(preset):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        model = optim.shard(moe.build(preset, "meta"), torch.bfloat16)
        local = sum(p.to_local().numel() for p in model.parameters())
        whole = sum(p.numel() for p in model.parameters())
        assert abs(local / whole - 1 / 8) < 0.001
        assert {type(block).__name__ for block in model.blocks} != {
            "Block"
        }  # each block a unit of its own
    finally:
        dist.destroy_process_group()


# ---- curves


def test_plot_draws_the_curves_of_runs(reference):
    pytest.importorskip("matplotlib").use("agg")
    shutil.copytree(reference, "runs/a", ignore=shutil.ignore_patterns("ckpt"))
    (Path("runs/b")).mkdir()
    Path("runs/b/log.jsonl").write_text(
        '{"step": 5, "critic": 0.5, "latent_std": 1.0}\n'
    )  # distill has no "loss"
    assert train.main(["--plot", "runs/a", "runs/b"]) == 0
    assert Path("runs/a/loss.png").stat().st_size > 1000
    assert train.main(["--plot", "runs/b/log.jsonl"]) == 0
    assert Path("runs/b/loss.png").exists()


def test_plot_says_how_to_get_matplotlib_and_what_a_run_is(monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert script(monkeypatch, "--plot", "runs/none") == 2
    assert "runs/none" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert script(monkeypatch, "--plot", "runs/none") == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["base", "distill"])
def test_weights_of_another_kind_are_refused_before_data_are_drawn(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "dataset", lambda _: pytest.fail("data were drawn"))
    vae = str(ROOT / "assets/tiny/vae.safetensors")
    with pytest.raises(ValueError, match="is not a Matrix-Game 3 DiT.* It is a VAE, which train"):
        train.main(["--stage", stage, "--vae", vae, "--init", vae, "--run", "other"])


def test_a_log_that_nobody_reads_any_more_stops_a_training_which_is_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    silent = []
    monkeypatch.setattr(run, "print", gone, raising=False)
    monkeypatch.setattr(cli, "fall_silent", lambda: silent.append(1))
    here = SimpleNamespace(asked=False, folder=Path(), cfg=TrainConfig(), step=1)
    monkeypatch.setattr(run, "record", lambda *_: None)
    progress = SimpleNamespace(
        run=here, sums={}, first=0, start=0.0, bar=SimpleNamespace(disable=True)
    )
    Progress.write(progress)
    assert here.asked and silent
