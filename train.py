"""Every stage as a loop you can read.

Paper: §5.1 (settings), §3.1-3.3 (losses), §3.4 (light VAE), §3.5 (experts).  Released: no training code.

    stage       from    learns                                          loop
    vae         -       frames <-> latents                              train_vae
    lightvae    vae     the same latents through a thinner decoder      train_vae
    base        vae     v(x_σ, σ | past, memory, actions, cameras)      train_base       Eq. 1-6
    distill     base    the same in three steps, on its own outputs     train_distill    Eq. 8
    moe         base    a low-noise expert, a high-noise one per view   train_base on a part of σ

One step of `base`: the new latents alone become noisy, x_σ = (1 − σ)·x0 + σ·ε, and the network says
the velocity there. Past and memory are told noise level 0, but they are not perfect: errors that
the model itself made earlier are added (error_buffer.py). A fifth of the batches has no memory, and
of the past only the first latent, an image; 15 % of the others have their past, but no memory.

Departures. Learning rates: the paper's suit 5 B parameters. A shift of 1.5 where pictures are small
(flow.py), and each step draws whether it makes 10, 5 or 2 new latents; a base that begins from nothing
has a shift of 5 and 10 new ones. Muon on the matrices of blocks. Latents are encoded once and cached.
Revisits are drawn more often than they occur, and memories made older than they are. All that is drawn
in a step is a function of (seed, step) alone: resuming is exact, and N ranks compute the losses of one
process (vae: one rank only; distill: every rank draws noise of its own). Experts see the base's density
of σ, cut at the boundary; the paper does not say which.

The machinery is in engine/: flags.py (every setting), run.py (folder, ranks, log), clips.py (the batch of a
step), mistakes.py (what is injected), optim.py (precision, shards, averages), checkpoint.py, pictures.py.

Try it: python train.py --preset micro --vae assets/tiny/vae.safetensors  Tests: pytest tests/test_train.py
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import dmd
import flow
import lightvae
import moe
import vae
from context import Context
from engine import checkpoint, cli, optim, sizes, weights
from engine.clips import (
    VAES,
    Ahead,
    Clips,
    draw,
    draw_length,
    frame_batch,
    lens_of,
    load_clips,
    load_vae,
    read_videos,
    scene,
    seen_by,
)
from engine.flags import TrainConfig, network, parse
from engine.mistakes import inject, own_errors, start_errors, turn_of_own
from engine.parts import compile_blocks
from engine.pictures import look, look_at_vae, plot
from engine.run import Progress, Run, generator, restore, save, setup, share

MODEL = "diffusion_pytorch_model"  # its file in a checkpoint, as released


def dataset(run: Run) -> Path:
    """The dataset folder; the default one is rendered on first use."""
    if run.cfg.data:
        return cli.find(run.cfg.data)
    root = cli.beside("datasets", run.cfg.preset)
    if run.rank == 0:
        data.make_dataset(root, preset=run.cfg.preset)  # skips every finished episode
    if run.world > 1:
        dist.barrier()
    return root


def in_dtype(model: nn.Module, run: Run) -> Callable:
    """As the losses call a network: float32 outside, the run's precision inside."""

    def predict(x: Tensor, sigma: Tensor, context: Context) -> Tensor:
        return model(x.to(run.dtype), sigma, context.to(dtype=run.dtype)).float()

    return predict


def wants_samples(run: Run) -> bool:
    """Whether a sample is due; one expert of several draws nothing alone."""
    alone = run.cfg.stage == "moe" and run.cfg.expert != "dense"
    return (
        bool(run.cfg.sample_every)
        and run.world == 1
        and not alone
        and run.due(run.cfg.sample_every)
    )


# ---- stages: vae, lightvae ---------------------------------------------------------------------------------


def train_vae(run: Run) -> None:
    """Frames to latents of unit variance and back (losses in lightvae.py)."""
    cfg = run.cfg
    light = cfg.stage == "lightvae"
    teacher = load_vae(cfg, run.device).to(run.dtype) if light else None
    videos = read_videos(dataset(run))
    torch.manual_seed(cfg.seed)
    both = start_vae(run, teacher)
    model, helper = both
    opts = optim.optimizers(both, cfg.lr, cfg.muon, cfg.decay, dtype=run.dtype)
    judge = start_judge(lightvae.Judge(), run)  # has a say with --adversarial alone
    ema = optim.average(both)
    models = {"training": both}
    every = list(opts)
    if cfg.adversarial:
        models["judge"] = judge.model
        every += judge.opts
    restore(run, models, ema, every)
    low = optim.low_precision_copy(both, run.dtype)
    progress = Progress(run)

    while run.step < cfg.steps and not run.stop:
        video = frame_batch(videos, cfg, run.step).to(run.device, run.dtype)  # (B, 3, F, H, W)

        # at last the decoder sees the very statistics that will be folded in
        helper.train(run.step < 0.9 * cfg.steps and not cfg.decoder_only)
        fast, fast_helper = optim.copy_weights_down(low, both)
        if light:
            loss, parts, x_hat = lightvae.light_loss(fast, teacher, fast_helper, video)
        else:
            g = generator(cfg, run.step, "noise")
            loss, parts, x_hat = lightvae.vae_loss(fast, video, helper, generator=g)
        if cfg.adversarial:
            loss = loss + cfg.adversarial * lightvae.adversarial_loss(judge.model, x_hat.float())
        optim.check_finite(loss, both, run.folder, video=video)
        loss.backward()
        optim.copy_gradients_up(low, both)
        rate = optim.lr_at(run.step, cfg.steps, cfg.warmup)
        norm = optim.update(opts, both, rate, cfg.clip, ema, cfg.ema)
        if cfg.adversarial:
            judge.forget()  # the decoder's loss went through it
            caught = lightvae.judge_loss(judge.model, x_hat.float(), video.float())
            judge.descend(caught, run, video)
            judge.update(cfg.clip, rate)
            parts["judge"] = caught.detach()

        run.step += 1
        progress(loss=loss.detach(), norm=norm, **parts)
        if run.stop or run.due(cfg.save_every):
            export_vae(run, both, ema, videos)  # first: a run that is complete has its file
            save(run, models, ema, every)


def start_vae(run: Run, teacher: vae.VAE | None) -> nn.ModuleList:
    """[VAE, helper]: a new one or that of --init, and what helps it to learn and is then thrown away."""
    cfg = run.cfg
    model = vae.VAE(vae.pruned(teacher.cfg, cfg.rate) if teacher else VAES[cfg.preset])
    if cfg.init:
        wanted = model.cfg
        model = weights.load_vae(cli.find(cfg.init)).float()
        if (model.cfg.dim, model.cfg.dec_dim) != (wanted.dim, wanted.dec_dim):
            raise ValueError(
                f"--init {cfg.init} has a decoder of width {model.cfg.dec_dim}, "
                f"this run {wanted.dec_dim}: see --preset and --rate"
            )
    model = model.to(run.device)

    # the thin decoder is led by the full one's features; the full VAE learns latents of unit variance
    if teacher:
        helper = lightvae.Projections(model.cfg, teacher.cfg)
    else:
        helper = lightvae.LatentNorm(model.cfg.z_dim)
    if cfg.decoder_only:  # the statistics stay, too; 1e-5 is what LatentNorm adds
        helper.mean = model.latent_mean.clone()
        helper.var = model.latent_std.square() - 1e-5
        nn.ModuleList((model.encoder, model.conv1)).requires_grad_(False)
    both = nn.ModuleList((model, helper.to(run.device)))
    both.cfg = model.cfg
    return both


def export_vae(run: Run, both: nn.ModuleList, ema: list[Tensor], videos: list[np.ndarray]) -> None:
    """The averaged weights with the latent statistics folded in: the one file that everything else
    loads, and a picture of what it does."""
    model, helper = optim.averaged(both, ema)
    if isinstance(helper, lightvae.LatentNorm):
        helper.fold(model)
    tensors = {name: t.bfloat16() for name, t in model.state_dict().items()}
    about = weights.vae_metadata(model) | {"stage": run.cfg.stage, "step": run.step}
    weights.write_weights(run.folder / "vae.safetensors", tensors, about)
    look_at_vae(run, model, model if model.cfg.dim else load_vae(run.cfg, run.device), videos)


# ---- stages: base, moe -------------------------------------------------------------------------------------


def train_base(run: Run) -> None:
    """Flow matching on the new latents, with memory, past and the model's own mistakes."""
    cfg = run.cfg
    decoder = load_vae(cfg, run.device)
    model = start_model(run)  # before data are drawn, for minutes: --init may be wrong
    root = dataset(run)
    clips = seen_by(run.view, run, decoder, root)
    held = load_clips(run, decoder, root, "tune")
    opts = optim.optimizers(model, cfg.lr, cfg.muon, cfg.decay, dtype=run.dtype)
    ema = optim.average(model)
    errors = start_errors(cfg)
    saved = restore(run, {MODEL: model}, ema, opts)
    errors.load_state_dict(saved.get("errors", errors.state_dict()))
    ahead = Ahead(clips, run)
    low = optim.low_precision_copy(model, run.dtype, cfg.checkpoint_activations)
    if cfg.compile:
        compile_blocks(low)
    progress = Progress(run)

    while run.step < cfg.steps and not run.stop:
        # which windows of which episodes, and how noisy
        cut, x0, context = ahead(run.step)  # x0 (B, C, N, h, w)
        g = generator(cfg, run.step, "noise")
        sigma = share(run, draw_sigma(cfg, g)).to(run.device)
        noise = share(run, torch.randn(cfg.batch, *x0.shape[1:], generator=g)).to(run.device)
        x_sigma = flow.add_noise(x0, noise, sigma)  # x_σ = (1 − σ)·x0 + σ·ε

        # the past and the memory are as imperfect as they will be in play         Eq. 2, 5
        predict = in_dtype(optim.copy_weights_down(low, model), run)
        own = own_errors(predict, clips, run, cut, g) if turn_of_own(run, cut, g) else None
        context = inject(errors, context, run, g, own)

        losses = []
        delta = torch.empty_like(x0)
        for rows in micro_batches(cfg):
            v_hat = predict(x_sigma[rows], sigma[rows], rows_of(context, rows))
            v = flow.velocity(x0[rows], noise[rows])  # v = ε − x0
            loss = (v_hat - v).square().mean()  # Eq. 3, 6
            optim.check_finite(loss, model, run.folder, x0=x0, noise=noise, sigma=sigma)
            (loss / cfg.accum).backward()
            optim.copy_gradients_up(low, model)
            losses.append(optim.gathered(loss.detach()[None]).mean())
            x0_hat = flow.x0_from_v(x_sigma[rows], v_hat.detach(), sigma[rows])
            delta[rows] = x0_hat - x0[rows]  # δ = x̂0 − x0      Eq. 1, 4
        errors.push(optim.gathered(delta), g)
        rate = optim.lr_at(run.step, cfg.steps, cfg.warmup)
        norm = optim.update(opts, model, rate, cfg.clip, ema, cfg.ema)

        run.step += 1
        progress(loss=sum(losses) / len(losses), norm=norm, errors=len(errors))
        if run.stop or run.due(cfg.save_every):
            save(run, {MODEL: model}, ema, opts, errors=errors.state_dict())
        if wants_samples(run):
            look(run, optim.averaged(model, ema), decoder, held)


def start_model(run: Run, init: str = "") -> nn.Module:
    """A fresh model of the preset, or weights (--init's), in float32 and sharded over the ranks."""
    cfg = run.cfg
    init = init or cfg.init
    torch.manual_seed(cfg.seed)
    if init:
        model, _ = weights.start_from(cli.find(init), network(cfg))
        model.train()
    else:
        model = moe.build(network(cfg))
    return optim.shard(model.to(run.device), run.dtype)


def draw_sigma(cfg: TrainConfig, g: torch.Generator) -> Tensor:  # (B,)
    """Noise levels; an expert's are those of the base that fall into its part of the axis.

    σ = shift(u) with u uniform. So its density between two levels is the shift of a u that is
    uniform between their inverse images, and shift(·, 1/s) is the inverse of shift(·, s).
    """
    sigma = flow.sample_sigma(cfg.batch, cfg.shift, g)
    if cfg.stage != "moe" or cfg.expert == "dense":
        return sigma
    lowest, highest = (0.0, cfg.boundary) if cfg.expert == "low" else (cfg.boundary, 1.0)
    first = flow.shift(lowest, 1 / cfg.shift)
    last = flow.shift(highest, 1 / cfg.shift)
    u = first + (last - first) * flow.shift(sigma, 1 / cfg.shift)
    return flow.shift(u, cfg.shift).clamp(lowest, highest)


def micro_batches(cfg: TrainConfig) -> list[slice]:
    return [slice(start, None, cfg.accum) for start in range(cfg.accum)]


def rows_of(context: Context, rows: slice) -> Context:
    """The context of some samples of the batch."""
    names = [field.name for field in dataclasses.fields(Context)]
    return Context(**{name: getattr(context, name)[rows] for name in names})


# ---- stage: distill ----------------------------------------------------------------------------------------


def train_distill(run: Run) -> None:
    """Teacher, critic and student start as one base; the student learns on its own rollouts."""
    cfg = run.cfg
    decoder = load_vae(cfg, run.device)
    how = dmd_config(cfg)

    # the teacher is asked; the student learns to draw, the critic what the student draws
    real = optim.low_precision_copy(start_model(run), run.dtype).requires_grad_(False)
    student = Learner.start(run, cfg.lr, cfg.student)
    critic = Learner.start(run, cfg.lr_critic, recompute=False)
    root = dataset(run)
    clips = load_clips(run, decoder, root, "train")
    held = load_clips(run, decoder, root, "tune")
    judge = start_judge(dmd.Judge(network(cfg).dim), run)
    ema = optim.average(student.model)
    learners = {MODEL: student, "critic": critic} | ({"judge": judge} if cfg.adversarial else {})
    models = {name: learner.model for name, learner in learners.items()}
    opts = [optimizer for learner in learners.values() for optimizer in learner.opts]
    restore(run, models, ema, opts)
    progress = Progress(run)

    while run.step < cfg.steps and not run.stop:
        draws = generator(cfg, run.step + 1_000_000 * run.rank, "rank")  # every rank has its own
        ratio = cfg.ratio_cold if run.step < cfg.cold_start else cfg.ratio
        critics_turn, students_turn = dmd.turns(run.step, ratio)
        teacher = in_dtype(real, run)
        fake = in_dtype(critic.fast(), run)
        opinion = opinion_of(critic.low, judge.model, run)
        numbers = {}

        with torch.set_grad_enabled(students_turn):
            x0, context, true = students_work(run, clips, in_dtype(student.fast(), run), how, draws)
        if students_turn:
            loss = dmd.generator_loss(x0, context, teacher, fake, how, draws)  # Eq. 8
            if cfg.adversarial:
                taken_for_true = dmd.adversarial_loss(x0, context, opinion, how, draws)
                loss = loss + cfg.adversarial * taken_for_true
            student.descend(loss, run, x0)
            critic.forget()  # with --adversarial the student's loss went through both
            judge.forget()
            rate = optim.lr_at(run.step, cfg.steps, cfg.warmup)
            numbers["norm"] = student.update(cfg.clip, rate, ema, cfg.ema)
        if critics_turn:
            loss = dmd.critic_loss(x0.detach(), context, fake, how, draws)
            numbers["critic"] = loss.detach()
            if cfg.adversarial:
                caught = dmd.judge_loss(x0, true, context, opinion, how, draws)
                numbers["judge"] = caught.detach()
                loss = loss + caught
            critic.descend(loss, run, x0)
            critic.update(cfg.clip)
            if cfg.adversarial:
                judge.update(cfg.clip)

        run.step += 1
        progress(**numbers, latent_std=x0.detach().std())
        if run.stop or run.due(cfg.save_every):
            save(run, models, ema, opts)
        if wants_samples(run):
            look(run, optim.averaged(student.model, ema), decoder, held, how.steps, "renoise")


@dataclass
class Learner:
    """A network in training: its float32 weights, the copy that computes, its optimisers."""

    model: nn.Module
    low: nn.Module
    opts: list

    @classmethod
    def start(cls, run: Run, rate: float, init: str = "", recompute: bool = True) -> "Learner":
        """Another copy of the base, or of other weights."""
        cfg = run.cfg
        model = start_model(run, init)
        recompute = recompute and cfg.checkpoint_activations
        opts = optim.optimizers(model, rate, cfg.muon, cfg.decay, (0.0, 0.95), run.dtype)
        return cls(model, optim.low_precision_copy(model, run.dtype, recompute), opts)

    def fast(self) -> nn.Module:
        """The copy, with the newest weights."""
        return optim.copy_weights_down(self.low, self.model)

    def descend(self, loss: Tensor, run: Run, x0: Tensor) -> None:
        """The gradient of a loss, on the float32 weights."""
        optim.check_finite(loss, self.model, run.folder, x0=x0)
        loss.backward()
        optim.copy_gradients_up(self.low, self.model)

    def forget(self) -> None:
        """Drop the gradient of a loss that was somebody else's."""
        self.low.zero_grad(set_to_none=True)

    def update(
        self, clip: float, rate: float = 1.0, ema: list[Tensor] = (), decay: float = 0.0
    ) -> float:
        """One step along the gradient; returns its norm."""
        return optim.update(self.opts, self.model, rate, clip, ema, decay)


def start_judge(model: nn.Module, run: Run) -> Learner:
    """Small, always float32, and AdamW's alone."""
    model = model.to(run.device)
    opts = optim.optimizers(model, run.cfg.lr_critic, 0.0, run.cfg.decay, (0.0, 0.95))
    return Learner(model, model, opts)


def opinion_of(critic: nn.Module, judge: nn.Module, run: Run) -> Callable:
    """What the judge says of noisy latents, by the features of the critic's last block."""

    def opinion(x: Tensor, sigma: Tensor, context: Context) -> Tensor:
        told = context.to(dtype=run.dtype)
        return judge(critic(x.to(run.dtype), sigma, told, return_features=True))

    return opinion


def dmd_config(cfg: TrainConfig) -> dmd.DMDConfig:
    return dmd.DMDConfig(
        shift=cfg.shift,
        guidance=cfg.guidance,
        segments=cfg.segments,
        p_mask=cfg.p_i2v,
        lens=lens_of(cfg),
        sink=cfg.sink,
    )


def students_work(
    run: Run, clips: Clips, student: Callable, how: dmd.DMDConfig, draws: torch.Generator
) -> tuple[Tensor, Context, Tensor]:
    """What the student makes, what it was told, and what the world shows in that place."""
    cfg = run.cfg
    g = generator(cfg, run.step, "rollout")  # the same on every rank
    exit_step = dmd.draw_exit(how, g) if cfg.exit == "random" else None
    if run.step < cfg.cold_start:  # one segment of true data, drawn as for the base
        true, context = draw(clips, run, run.step)
        noise = flow.noise_like(true, draws)
        x0 = dmd.few_step(student, context, noise, exit_step, how, draws)
        return x0, context, true

    # segment after segment on its own outputs
    new, _ = draw_length(run, run.step)
    clip = scene(clips, run, run.step)
    k = dmd.draw_segments(how, g, new, clip.c2w.shape[1])
    x0, context = dmd.rollout(student, clip, k, exit_step, how, draws, new)
    return x0, context, clip.latents[:, :, context.times[0, -x0.shape[2] :]]


# ---- main --------------------------------------------------------------------------------------------------

LOOPS = {
    "vae": train_vae,
    "lightvae": train_vae,
    "base": train_base,
    "moe": train_base,
    "distill": train_distill,
}


def main(argv: list[str]) -> int:
    """Train, or do one of the things that are no training."""
    argv = [word for word in argv if word != "--debug"]  # cli.run reads it
    if argv[:1] == ["--plot"] and len(argv) > 1:
        plot(argv[1:])
        return 0
    if argv[:1] == ["--export"] and len(argv) > 2:
        checkpoint.export(*(str(cli.find(run)) for run in argv[1:-1]), file=argv[-1])
        return 0
    if argv[:1] in (["--plot"], ["--export"]):
        raise ValueError(
            "--plot takes runs or their logs, --export RUN ... FILE takes runs and the file to write"
        )

    cfg = parse(argv)
    if cfg.dry_run:
        print(f"{cfg.preset}:", sizes.memory_needed(cfg))
        return 0
    with setup(cfg) as run:
        where = cli.shown(run.folder)
        if run.rank == 0:
            about = [f"stage {cfg.stage}", f"preset {cfg.preset}", run.device, run.dtype]
            print(*about, f"{run.world} rank(s)", where, sep=" · ", flush=True)
        LOOPS[cfg.stage](run)
    if run.rank == 0:
        stopped = f"stopped at step {run.step}; the same command resumes it"
        print(stopped if run.stop else f"done: {where} at step {run.step}")
    return 130 if run.stop else 0


if __name__ == "__main__":
    cli.run(main)
