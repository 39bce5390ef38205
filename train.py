"""Every stage as a loop you can read.

Paper: §5.1 (settings), §3.1-3.3 (losses), §3.4 (light VAE), §3.5 (experts).  Official training code: not released.

    stage       from    learns                                          loop
    vae         -       frames <-> latents                              train_vae
    lightvae    vae     the same latents through a thinner decoder      train_lightvae
    base        vae     v(x_σ, σ | past, memory, actions, cameras)      train_base       Eq. 1-6
    distill     base    the same in three steps, on its own outputs     train_distill    Eq. 8
    moe         base    one expert per noise range and view             train_base on a part of the σ axis

One step of `base`:  x_σ = (1 − σ)·x0 + σ·ε on the new latents only; past and memory are at t = 0, corrupted by residuals
the model itself made earlier (error_buffer.py); with p = 0.2 there is neither, and the model learns image-to-video.

Departures: learning rates (the paper's suit 5 B parameters), Muon on block matrices, latents encoded once and cached, revisits drawn
more often than they occur, memories made older than they are. All that is drawn in a step is a function of (seed, step) alone: resuming
is exact, and N ranks compute the losses of one process (vae: one rank only; distill: every rank draws noise of its own).

Run folder: config.json · log.jsonl · samples/ · latest · ckpt/000500/ (checkpoint.save).   Tests: pytest tests/test_train.py
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import dmd
import error_buffer
import flow
import lightvae
import moe
import vae
from context import Context
from dataset import episode
from engine import checkpoint, optim, sizes, weights
from engine.clips import (
    VAES,
    WINDOW,
    Clips,
    Cut,
    batch,
    draw,
    draw_cut,
    draw_length,
    frame_batch,
    lens_of,
    load_clips,
    load_vae,
    scene,
    seen_by,
    windows,
)
from engine.run import Progress, Run, generator, network, parse, record, restore, save, setup, share


def dataset(run: Run) -> Path:
    """The dataset folder; the default one is rendered on first use."""
    root = Path(run.cfg.data or f"datasets/{run.cfg.preset}")
    if run.cfg.data and not root.exists():
        raise ValueError(
            f"--data {root} does not exist; make one with: python data.py make --preset {run.cfg.preset} --out {root}"
        )
    if run.rank == 0 and not run.cfg.data:
        data.make_dataset(root, preset=run.cfg.preset)  # skips every finished episode
    dist.barrier() if run.world > 1 else None
    return root


@torch.no_grad()
def own_errors(
    model: Callable, clips: Clips, run: Run, cut: Cut, g: torch.Generator
) -> dict[str, Tensor]:
    """δ of these very past and memory latents: how the model errs on them in one step from a random σ.

    Stored errors come from other scenes. What a player sees drift is a blur of this one: noise the
    latents to σ ~ U(0, 1) and ask for the clean estimate x̂0, told only the latent before the past.
    """
    P = cut.n_past
    earlier = dataclasses.replace(cut, start=cut.start - P, n_new=P, n_past=1)
    past, context = windows(clips, run, earlier)
    M = context.memory.shape[2]

    # [memory | latent before | past]  ->  [latent before | memory, past]: all but one are asked for
    order = [M, *range(M), *range(M + 1, M + 1 + P)]
    x0 = torch.cat([context.memory, past], 2).to(run.device)
    context = dataclasses.replace(
        context,
        memory=context.memory[:, :, :0],
        times=context.times[:, order],
        rays=context.rays[:, :, order],
        mouse=context.mouse[:, order],
        keyboard=context.keyboard[:, order],
    ).to(run.device)

    sigma = share(run, torch.rand(run.cfg.batch, generator=g)).to(run.device)
    noise = share(run, torch.randn(run.cfg.batch, *x0.shape[1:], generator=g)).to(run.device)
    x_sigma = flow.add_noise(x0, noise, sigma)
    v = model(x_sigma.to(run.dtype), sigma, context.to(dtype=run.dtype)).float()
    delta = flow.x0_from_v(x_sigma, v, sigma) - x0
    return {"memory": delta[:, :, :M], "past": delta[:, :, M:]}


# ------------------------------------------------------------------------------------------------ stages: vae, lightvae


def train_vae(run: Run) -> None:
    """Frames to latents of unit variance and back (losses in lightvae.py)."""
    cfg, light, root = run.cfg, run.cfg.stage == "lightvae", dataset(run)
    videos = [
        np.array(episode.read_episode(p).video)
        for split in ("train", "third")
        for p in episode.list_episodes(root, split)
    ]
    torch.manual_seed(cfg.seed)
    teacher = load_vae(cfg, run.device).to(run.dtype) if light else None
    fresh = vae.VAE(vae.pruned(teacher.cfg, cfg.rate) if light else VAES[cfg.preset])
    model = (
        weights.vae_from_weights(*weights.read_weights(cfg.init)).float() if cfg.init else fresh
    ).to(run.device)
    if (model.cfg.dim, model.cfg.dec_dim) != (fresh.cfg.dim, fresh.cfg.dec_dim):
        raise ValueError(
            f"--init {cfg.init} has a decoder of width {model.cfg.dec_dim}, this run {fresh.cfg.dec_dim}: see --preset and --rate"
        )
    helper = (
        lightvae.Projections(model.cfg, teacher.cfg)
        if light
        else lightvae.LatentNorm(model.cfg.z_dim)
    )
    if cfg.decoder_only:  # the statistics stay, too; 1e-5 is what LatentNorm adds
        helper.mean, helper.var = model.latent_mean.clone(), model.latent_std.square() - 1e-5
        nn.ModuleList((model.encoder, model.conv1)).requires_grad_(False)
    both = nn.ModuleList((model, helper.to(run.device)))
    opts, ema = (
        optim.optimizers(both, cfg.lr, cfg.muon, cfg.decay, dtype=run.dtype),
        optim.average(both),
    )
    both.cfg = model.cfg
    restore(run, {"training": both}, ema, opts)
    low, progress = optim.low_precision_copy(both, run.dtype), Progress(run)
    while run.step < cfg.steps and not run.stop:
        video, g = (
            frame_batch(videos, cfg, run.step).to(run.device, run.dtype),
            generator(cfg, run.step),
        )
        helper.train(
            run.step < 0.9 * cfg.steps and not cfg.decoder_only
        )  # at last the decoder sees the very statistics that will be folded in
        fast, fast_helper = optim.copy_weights_down(low, both)
        loss, parts = (
            lightvae.light_loss(fast, teacher, fast_helper, video)
            if light
            else lightvae.vae_loss(fast, video, helper, generator=g)
        )
        optim.check_finite(loss, both, run.folder, video=video)
        loss.backward()
        optim.copy_gradients_up(low, both)
        norm = optim.update(
            opts, both, optim.lr_at(run.step, cfg.steps, cfg.warmup), cfg.clip, ema, cfg.ema
        )
        run.step += 1
        progress(loss=loss.detach(), norm=norm, **parts)
        if run.stop or run.due(cfg.save_every):
            save(run, {"training": both}, ema, opts)
            export_vae(run, both, ema, videos)


@torch.no_grad()
def export_vae(run: Run, both: nn.ModuleList, ema: list[Tensor], videos: list[np.ndarray]) -> None:
    """The averaged weights with the latent statistics folded in, as the one file that everything else loads, and a picture of it."""
    model, helper = optim.averaged(both, ema)
    if isinstance(helper, lightvae.LatentNorm):
        helper.fold(model)
    weights.write_weights(
        run.folder / "vae.safetensors",
        {k: v.bfloat16() for k, v in model.state_dict().items()},
        weights.vae_metadata(model) | {"stage": run.cfg.stage, "step": run.step},
    )
    full = model if model.cfg.dim else load_vae(run.cfg, run.device)
    truth = (
        torch.from_numpy(np.stack([v[-33:] for v in videos[:6]])).permute(0, 4, 1, 2, 3).float()
        / 127.5
        - 1
    )
    again = model.eval().decode(full.encode(truth.to(run.device))).clamp(-1, 1).cpu()
    strip = torch.cat((truth[:, :, ::8], again[:, :, ::8]), 2).permute(
        0, 3, 2, 4, 1
    )  # (N, H, 2·5, W, 3): truth | reconstruction
    episode.write_png(
        run.folder / "samples" / f"step_{run.step:06d}.png",
        (strip.flatten(2, 3).flatten(0, 1) + 1) / 2,
    )


# ----------------------------------------------------------------------------------------------------- stages: base, moe


def train_base(run: Run) -> None:
    """Flow matching on the new latents, with memory, past and the model's own mistakes."""
    cfg = run.cfg
    root, decoder = dataset(run), load_vae(cfg, run.device)
    clips, held = seen_by(run.view, run, decoder, root), load_clips(run, decoder, root, "tune")
    parts = {
        "high-first": (cfg.boundary, 1),
        "high-third": (cfg.boundary, 1),
        "low": (0, cfg.boundary),
    }  # of the σ axis
    low_sigma, high_sigma = parts.get(cfg.expert, (0, 1)) if cfg.stage == "moe" else (0, 1)
    model = start_model(run)
    opts, ema = (
        optim.optimizers(model, cfg.lr, cfg.muon, cfg.decay, dtype=run.dtype),
        optim.average(model),
    )
    how = error_buffer.ErrorConfig(probability=cfg.p_error, kind=cfg.error_kind)
    errors = error_buffer.ErrorBuffer(dataclasses.replace(how, warmup=min(how.warmup, cfg.warmup)))
    saved = restore(run, {"diffusion_pytorch_model": model}, ema, opts)
    errors.load_state_dict(saved.get("errors", errors.state_dict()))
    low, progress = (
        optim.low_precision_copy(model, run.dtype, cfg.checkpoint_activations),
        Progress(run),
    )
    while run.step < cfg.steps and not run.stop:
        cut = draw_cut(clips, run, run.step)
        x0, context = batch(clips, run, cut)
        g = generator(cfg, run.step + 500_000_000)
        sigma = share(
            run, low_sigma + (high_sigma - low_sigma) * flow.sample_sigma(cfg.batch, cfg.shift, g)
        ).to(run.device)
        noise = share(run, torch.randn(cfg.batch, *x0.shape[1:], generator=g)).to(run.device)
        refreshed = optim.copy_weights_down(low, model)
        own = own_errors(refreshed, clips, run, cut, g) if turn_of_own(run, cut, g) else None
        context = inject(errors, context, run, g, own)  # imperfect past and memory     Eq. 2, 5
        x_sigma = flow.add_noise(x0, noise, sigma)  # x_σ = (1 − σ)·x0 + σ·ε
        losses, delta = [], torch.empty_like(x0)
        for rows in (slice(i, None, cfg.accum) for i in range(cfg.accum)):
            part = dataclasses.replace(
                context,
                **{f.name: getattr(context, f.name)[rows] for f in dataclasses.fields(context)},
            )
            v_hat = refreshed(
                x_sigma[rows].to(run.dtype), sigma[rows], part.to(dtype=run.dtype)
            ).float()
            loss = (
                (v_hat - flow.velocity(x0[rows], noise[rows])).square().mean()
            )  # v = ε − x0            Eq. 3, 6
            optim.check_finite(loss, model, run.folder, x0=x0, noise=noise, sigma=sigma)
            (loss / cfg.accum).backward()
            optim.copy_gradients_up(low, model)
            losses.append(optim.gathered(loss.detach()[None]).mean())
            delta[rows] = (
                flow.x0_from_v(x_sigma[rows], v_hat.detach(), sigma[rows]) - x0[rows]
            )  # δ = x̂0 − x0      Eq. 1, 4
        errors.push(optim.gathered(delta), g)
        norm = optim.update(
            opts, model, optim.lr_at(run.step, cfg.steps, cfg.warmup), cfg.clip, ema, cfg.ema
        )
        run.step += 1
        progress(loss=sum(losses) / len(losses), norm=norm, bank=len(errors))
        if run.stop or run.due(cfg.save_every):
            save(run, {"diffusion_pytorch_model": model}, ema, opts, errors=errors.state_dict())
        if (
            cfg.sample_every
            and run.world == 1
            and (cfg.stage == "base" or cfg.expert == "dense")
            and run.due(cfg.sample_every)
        ):
            look(run, optim.averaged(model, ema), decoder, held)


def turn_of_own(run: Run, cut: Cut, g: torch.Generator) -> bool:
    """Whether this step's errors are the model's own of the same scene."""
    if not run.cfg.p_own or cut.n_past == 1:
        return False
    return float(torch.rand((), generator=g)) < run.cfg.p_own


def inject(
    errors: error_buffer.ErrorBuffer,
    context: Context,
    run: Run,
    g: torch.Generator,
    own: dict[str, Tensor] | None = None,
) -> Context:
    """x̃ = x + γ_h·δ on the past, m̃ = m + γ_m·δ on the memory; a lone image is real data and stays."""
    if context.past.shape[2] == 1:
        return context
    perturbed = {}
    for name in ("past", "memory"):
        if run.cfg.inject not in ("both", name):
            continue
        x = getattr(context, name)
        if own is None:  # drawn for the whole batch: every rank takes its rows
            zeros = x.new_zeros(run.cfg.batch, *x.shape[1:])
            delta = share(run, errors.perturb(zeros, run.cfg.gamma, g))
        else:
            amplitude = share(run, errors.amplitude(run.cfg.batch, run.cfg.gamma, g)).to(x)
            delta = amplitude.view(-1, 1, 1, 1, 1) * own[name]
        perturbed[name] = x + delta
    return dataclasses.replace(context, **perturbed)


def start_model(run: Run) -> nn.Module:
    """A fresh model of the preset, or the weights of --init, in float32 and sharded over the ranks."""
    torch.manual_seed(run.cfg.seed)
    model = (
        weights.start_from(run.cfg.init, network(run.cfg))[0].train()
        if run.cfg.init
        else moe.build(network(run.cfg))
    )
    return optim.shard(model.to(run.device), run.dtype)


# -------------------------------------------------------------------------------------------------------- stage: distill


def train_distill(run: Run) -> None:
    """Teacher, critic and student start as one base; the student learns on its own rollouts.                  Eq. 8"""
    cfg = run.cfg
    if not cfg.init:
        raise ValueError(
            "--stage distill needs --init <base run>; make one with: python train.py --stage base"
        )
    root, decoder = dataset(run), load_vae(cfg, run.device)
    clips = load_clips(run, decoder, root, "train")
    held = load_clips(run, decoder, root, "tune")
    how = dmd.DMDConfig(
        shift=cfg.shift,
        guidance=cfg.guidance,
        segments=cfg.segments,
        p_mask=cfg.p_i2v,
        lens=lens_of(cfg),
        sink=cfg.sink,
    )

    # three copies of the base: one is asked, one learns what the student makes, one is the student
    real = optim.low_precision_copy(start_model(run), run.dtype).requires_grad_(False)
    student, fake = start_model(run), start_model(run)
    judge = dmd.Judge(network(cfg).dim).to(run.device)
    betas = (0.0, 0.95)
    opts = optim.optimizers(student, cfg.lr, cfg.muon, cfg.decay, betas, run.dtype)
    opts_fake = optim.optimizers(fake, cfg.lr_critic, cfg.muon, cfg.decay, betas, run.dtype)
    opts_judge = optim.optimizers(judge, cfg.lr_critic, 0.0, cfg.decay, betas)
    ema = optim.average(student)
    models = {"diffusion_pytorch_model": student, "critic": fake}
    every = opts + opts_fake
    if cfg.adversarial:
        models["judge"] = judge
        every = every + opts_judge
    restore(run, models, ema, every)
    low = optim.low_precision_copy(student, run.dtype, cfg.checkpoint_activations)
    low_fake = optim.low_precision_copy(fake, run.dtype)
    progress = Progress(run)

    while run.step < cfg.steps and not run.stop:
        g = generator(cfg, run.step + 700_000_000)  # the same on every rank
        own = generator(cfg, run.step + 800_000_000 + 1_000_000 * run.rank)
        cold = run.step < cfg.cold_start
        critics_turn, students_turn = dmd.turns(run.step, cfg.ratio_cold if cold else cfg.ratio)
        student_in = in_dtype(optim.copy_weights_down(low, student), run)
        fast_fake = optim.copy_weights_down(low_fake, fake)
        fake_in, features = in_dtype(fast_fake, run), features_of(fast_fake, run)
        exit_step = dmd.draw_exit(how, g) if cfg.exit == "random" else None

        # what the student makes, and in the place of what
        with torch.set_grad_enabled(students_turn):
            if cold:  # one segment, true past and memory
                true, context = draw(clips, run, run.step)
                x0 = dmd.few_step(student_in, context, flow.fresh(true, own), exit_step, how, own)
            else:  # on its own outputs
                new, _ = draw_length(run, run.step)
                clip = scene(clips, run, run.step)
                k = dmd.draw_segments(how, g, new)
                x0, context = dmd.rollout(student_in, clip, k, exit_step, how, own, new)
                true = clip.latents[:, :, context.times[0, -x0.shape[2] :]]

        numbers = {}
        if students_turn:
            loss = dmd.generator_loss(x0, context, in_dtype(real, run), fake_in, how, own)  # Eq. 8
            if cfg.adversarial:
                fooled = dmd.adversarial_loss(x0, context, features, judge, how, own)
                loss = loss + cfg.adversarial * fooled
            optim.check_finite(loss, student, run.folder, x0=x0)
            loss.backward()
            optim.copy_gradients_up(low, student)
            low_fake.zero_grad(set_to_none=True)  # the student's loss went through both
            judge.zero_grad(set_to_none=True)
            rate = optim.lr_at(run.step, cfg.steps, cfg.warmup)
            numbers["norm"] = optim.update(opts, student, rate, cfg.clip, ema, cfg.ema)
        if critics_turn:
            loss = dmd.critic_loss(x0.detach(), context, fake_in, how, own)
            numbers["critic"] = loss.detach()
            if cfg.adversarial:
                caught = dmd.judge_loss(x0, true, context, features, judge, how, own)
                loss = loss + caught
                numbers["judge"] = caught.detach()
            optim.check_finite(loss, fake, run.folder, x0=x0)
            loss.backward()
            optim.copy_gradients_up(low_fake, fake)
            optim.update(opts_fake, fake, 1.0, cfg.clip, [], 0.0)
            if cfg.adversarial:
                optim.update(opts_judge, judge, 1.0, cfg.clip, [], 0.0)
        run.step += 1
        progress(**numbers, latent_std=x0.detach().std())
        if run.stop or run.due(cfg.save_every):
            save(run, models, ema, every)
        if cfg.sample_every and run.world == 1 and run.due(cfg.sample_every):
            look(
                run, optim.averaged(student, ema), decoder, held, steps=how.steps, method="renoise"
            )


def in_dtype(model: nn.Module, run: Run) -> Callable:
    """As dmd.py calls a network: float32 outside, the run's precision inside."""
    return lambda x, sigma, context: model(
        x.to(run.dtype), sigma, context.to(dtype=run.dtype)
    ).float()


def features_of(model: nn.Module, run: Run) -> Callable:
    """The same network up to its last block: what the judge looks at."""
    return lambda x, sigma, context: model(
        x.to(run.dtype), sigma, context.to(dtype=run.dtype), return_features=True
    )


# ------------------------------------------------------------------------------------------------------- looking at a model


@torch.no_grad()
def look(
    run: Run, model: nn.Module, vae: nn.Module, held: Clips, steps: int = 8, method: str = "euler"
) -> None:
    """Held-out revisits: reconstruction | model | without memory | with another clip's actions, as a picture, a film and numbers."""
    sure = dataclasses.replace(
        run.cfg, batch=8, new="10", revisit=1.0, p_i2v=0.0, p_memory_off=0.0, p_null=0.0
    )
    x0, context = draw(held, dataclasses.replace(run, cfg=sure), 0)
    wrong = dataclasses.replace(
        context, **{k: getattr(context, k).roll(1, 0) for k in ("rays", "mouse", "keyboard")}
    )
    noise, sigmas, g = (
        torch.randn(x0.shape, generator=generator(sure, 1)),
        flow.sigma_grid(steps, sure.shift),
        generator(sure, 2),
    )
    latents = {"truth": x0} | {
        name: flow.sample(
            model,
            c.to(dtype=run.dtype),
            sigmas,
            noise.to(run.device, run.dtype),
            method,
            generator=g,
        ).float()
        for name, c in {
            "model": context,
            "no memory": context.drop_memory(),
            "wrong actions": wrong,
        }.items()
    }
    frames = {
        name: vae.decode(torch.cat((context.past, z), 2), clamp=True)[
            :, :, -WINDOW.stride * WINDOW.new :
        ]  # the past fills
        .permute(0, 2, 3, 4, 1)
        .cpu()
        / 2
        + 0.5
        for name, z in latents.items()
    }  # the decoder's history; (8, F, H, W, 3)
    scores = {
        name: round(float(episode.psnr(x, frames["truth"]).mean()), 2)
        for name, x in frames.items()
        if name != "truth"
    }
    record(run, {"step": run.step} | {"psnr " + name: value for name, value in scores.items()})
    print(
        f"step {run.step}: held-out revisits, dB to the reconstruction: "
        + " · ".join(f"{k} {v}" for k, v in scores.items()),
        flush=True,
    )
    strips = torch.stack([*frames.values()], 1)[:4, :, 7::8]  # (4, kinds, 5, H, W, 3)
    path = run.folder / "samples" / f"step_{run.step:06d}"
    episode.write_png(
        path.with_suffix(".png"), strips.flatten(0, 1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    )
    episode.write_mp4(path.with_suffix(".mp4"), torch.cat([x[0] for x in frames.values()], 2))


# ------------------------------------------------------------------------------------------------------------------- main


def plot(runs: list[str]) -> None:
    """Loss curves of runs or of their logs, smoothed over ten log lines, as loss.png beside the first log."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    logs = [Path(run) if run.endswith(".jsonl") else Path(run) / "log.jsonl" for run in runs]
    for log in logs:
        if not log.exists():
            raise ValueError(
                f"no {log}; --plot takes folders of runs, such as runs/base-tiny, or their logs"
            )
        said = [
            x
            for x in map(json.loads, log.read_text().splitlines())
            if x.keys() & {"loss", "critic"}
        ]
        points = np.array([(x["step"], x.get("loss", x.get("critic"))) for x in said])
        n, name = min(10, len(points)), log.parent.name if log.stem == "log" else log.stem
        plt.plot(points[n - 1 :, 0], np.convolve(points[:, 1], np.ones(n) / n, "valid"), label=name)
    plt.xlabel("step"), plt.ylabel("loss"), plt.yscale("log"), plt.legend()
    plt.savefig(logs[0].parent / "loss.png", dpi=120)
    print(f"wrote {logs[0].parent / 'loss.png'}")


def main(argv: list[str]) -> int:
    if argv[:1] in (["--plot"], ["--export"]):
        if len(argv) < 2 + (argv[0] == "--export"):
            raise ValueError(
                "--plot takes runs or their logs, --export RUN ... FILE takes runs and the file to write"
            )
        return (
            plot(argv[1:]) if argv[0] == "--plot" else checkpoint.export(*argv[1:-1], file=argv[-1])
        ) or 0
    cfg = parse(argv)
    if cfg.dry_run:
        tokens = {"5b": 880, "14b": 880}.get(cfg.preset, 16) * (
            WINDOW.memory + WINDOW.past + WINDOW.new
        )  # per latent, latents
        print(
            f"{cfg.preset}:",
            sizes.memory_table(
                network(cfg),
                cfg.batch // cfg.accum,
                tokens,
                cfg.muon > 0,
                cfg.checkpoint_activations,
            ),
        )
        return 0
    run = setup(cfg)
    if run.rank == 0:
        print(
            f"stage {cfg.stage} · preset {cfg.preset} · {run.device} · {run.dtype} · {run.world} rank(s) · {run.folder}",
            flush=True,
        )
    try:
        {"vae": train_vae, "lightvae": train_vae, "distill": train_distill}.get(
            cfg.stage, train_base
        )(run)
    finally:
        dist.destroy_process_group() if dist.is_initialized() else None
    if run.rank == 0:
        print(
            f"stopped at step {run.step}; the same command resumes it"
            if run.stop
            else f"done: {run.folder} at step {run.step}"
        )
    return 130 if run.stop else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
