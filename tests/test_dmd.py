"""Distillation: the gradient is Eq. 8's, the right networks move, and a student lives on its own output."""

import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import clip_context, seeded

import camera
import dit
import dmd
import flow
from context import Clip, Lens, Window
from dit import DiT
from dmd import DMDConfig, few_step, generator_loss, rollout

MICRO = dit.PRESETS["micro"]
CFG = DMDConfig()


def latents(n):
    return torch.randn(2, MICRO.in_dim, n, 4, 4, generator=seeded())


def network(seed=0):
    torch.manual_seed(seed)
    model = DiT(MICRO)
    with torch.no_grad():
        for p in model.parameters():  # a fresh network predicts zero
            p.add_(0.05 * torch.randn_like(p))
    return model


def clip(segments=1, B=2, **changes):
    """A player who walks and turns, so that some places come back."""
    F, g = Window().frames(segments), seeded(3)
    keyboard = torch.zeros(B, F, 6)
    keyboard[..., 0] = 1
    mouse = torch.zeros(B, F, 2)
    mouse[..., 1] = 0.2
    poses = []
    for b in range(B):
        start = (0, -1.6, 0, 0, 40.0 * b)
        poses.append(camera.integrate(start, keyboard[b], mouse[b])[:F])
    c2w = camera.pose_to_c2w(torch.stack(poses))
    fields = {
        "latents": torch.randn(B, MICRO.in_dim, 1, 4, 4, generator=g),
        "c2w": c2w.float(),
        "keyboard": keyboard,
        "mouse": mouse,
        "text": torch.randn(B, 2, MICRO.text_dim, generator=g),
    }
    return Clip(**fields | changes)


class Spy:
    """A network that remembers what it was asked, and whether a graph was kept."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, x_sigma, sigma, context):
        v = self.model(x_sigma, sigma, context)
        self.calls.append(
            {
                "x": x_sigma.detach().clone(),
                "sigma": sigma.clone(),
                "context": context,
                "graph": v.requires_grad,
                "x0": flow.x0_from_v(x_sigma, v, sigma).detach(),
            }
        )
        return v


def rolled(student, segments=1, exit_step=None, seed=0):
    """What a student makes in a world of its own: x0, context."""
    return rollout(student, clip(segments), segments, exit_step, CFG, seeded(seed))


def grads(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


# ---- identity and limits


def test_gradient_vanishes_when_fake_equals_real():
    x0, context = rolled(network(), exit_step=0)
    x0.retain_grad()
    generator_loss(x0, context, network(1), network(1), CFG, seeded(1)).backward()
    assert torch.equal(x0.grad, torch.zeros_like(x0))


def test_gradient_is_the_difference_of_clean_estimates_over_the_teachers_error():
    x0 = latents(14).requires_grad_()
    _, context = rolled(network(), exit_step=0)
    real, fake = Spy(network(1)), Spy(network(2))
    generator_loss(x0, context, real, fake, CFG, seeded(1)).backward()
    x_real, x_fake = real.calls[0]["x0"], fake.calls[0]["x0"]
    distance = (x0.detach() - x_real).abs()
    error = distance.mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(x0.grad, (x_fake - x_real) / error / x0.numel())  # ∂L/∂x = g / numel


def test_guidance_pushes_the_teacher_away_from_its_null_answer():
    """By hand: v_null = 1/2, v_full = 2, guidance 3 give v = 1/2 + 3·3/2 = 5. With the critic at 1,
    x̂_fake − x̂_real = τ·(5 − 1) and x − x̂_real = τ·(x − ε + 5): τ drops out of the gradient."""
    null = SimpleNamespace(v=0.5)
    full = SimpleNamespace(v=2.0, null=lambda: null)
    x0 = torch.tensor([3.0, -1.0]).view(1, 2, 1, 1, 1)
    x0.requires_grad_()
    asked = []

    def teacher(x_tau, tau, context):
        asked.append((context, x_tau, tau))
        return torch.full_like(x_tau, context.v)

    def critic(x_tau, tau, context):
        return torch.ones_like(x_tau)

    cfg = replace(CFG, guidance=3.0)
    generator_loss(x0, full, teacher, critic, cfg, seeded()).backward()
    (first, x_tau, tau), (second, again, _) = asked
    assert first is full
    assert second is null
    assert torch.equal(x_tau, again)
    noise = (x_tau - (1 - tau) * x0.detach()) / tau
    error = (x0.detach() - noise + 5).abs()
    g = 4 / error.mean()
    torch.testing.assert_close(x0.grad, torch.full_like(x0, g.item() / 2))


def test_without_guidance_the_teacher_is_asked_once():
    x0, context = rolled(network(), exit_step=0)
    real = Spy(network(1))
    generator_loss(x0, context, real, network(2), replace(CFG, guidance=1.0), seeded(1))
    assert [call["context"] for call in real.calls] == [context]


def test_a_perfect_student_gives_no_nan():
    x0 = torch.randn(2, 3, 1, 1, 1, requires_grad=True)

    def teacher(x, sigma, context):  # its clean estimate is x0: its error is zero
        return (x - x0.detach()) / flow.per_sample(sigma, x)

    def critic(x, sigma, context):
        return x

    generator_loss(x0, None, teacher, critic, CFG, seeded()).backward()
    assert x0.grad.isfinite().all()


def test_the_gradient_of_two_gaussians_is_known_in_closed_form():
    """Equal covariance s²I, means m apart: whatever x is,
    x̂_fake − x̂_real = [1 − (1−τ)²s²/((1−τ)²s² + τ²)]·m."""
    m = torch.tensor([0.5, -1.0, 0.2])
    s2 = 0.8
    factor = s2**0.5 * torch.eye(3)
    real = dmd.Gaussian(torch.zeros(3), factor).requires_grad_(False)
    fake = dmd.Gaussian(m, factor).requires_grad_(False)
    x0 = torch.randn(16, 3, 1, 1, 1, generator=seeded()).requires_grad_()
    spy = Spy(real)
    generator_loss(x0, None, spy, fake, CFG, seeded(1)).backward()
    tau = spy.calls[0]["sigma"][:, None]
    x_real = spy.calls[0]["x0"]
    signal = (1 - tau) ** 2 * s2
    left = 1 - signal / (signal + tau**2)
    error = (x0.detach() - x_real).abs().mean(1).view(-1, 1)
    expected = left * m / error / x0.numel()
    torch.testing.assert_close(x0.grad.view(16, 3), expected, rtol=2e-3, atol=1e-5)


def test_the_toy_teacher_is_exact():
    """Its velocity is what flow matching would learn, E[ε − x0 | x_σ]: the rest does not
    correlate with x_σ."""
    teacher = dmd.toy_teacher()
    g = seeded()
    x0 = teacher.mean + torch.randn(200_000, 3, generator=g) @ teacher.factor.T
    noise = torch.randn(200_000, 3, generator=g)
    sigma = torch.full((200_000,), 0.6)
    x_sigma = flow.add_noise(x0, noise, sigma)
    said = teacher(x_sigma.view(-1, 3, 1, 1, 1), sigma, None).flatten(1)
    residual = said - flow.velocity(x0, noise)
    assert residual.mean(0).abs().max() < 0.02
    assert (residual.T @ x_sigma / len(x_sigma)).abs().max() < 0.02


# ---- behaviour


def test_student_moves_toward_the_teacher_on_a_gaussian():
    teacher = dmd.toy_teacher()
    *_, student = dmd.distil_gaussian(teacher)
    torch.manual_seed(0)
    mean, cov = dmd.distance(student, teacher)
    assert mean < 0.02 and cov < 0.02


def test_critic_step_leaves_student_untouched():
    student, fake = network(), network(1)
    x0, context = rolled(student, exit_step=1)
    dmd.critic_loss(x0, context, fake, CFG, seeded(1)).backward()
    assert not grads(student) and grads(fake)


def test_the_critic_is_asked_for_the_velocity_of_the_students_own_latents():
    """By hand: a critic that always says 1 pays mean (1 − (ε − x))², with the ε it was shown."""
    x0 = latents(3)
    asked = []

    def critic(x_tau, tau, context):
        asked.append((x_tau, tau))
        return torch.ones_like(x_tau)

    loss = dmd.critic_loss(x0, None, critic, CFG, seeded(1))
    x_tau, tau = asked[0]
    tau = flow.per_sample(tau, x0)
    noise = (x_tau - (1 - tau) * x0) / tau
    expected = (1 - (noise - x0)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    assert dmd.draw_tau(2, CFG, seeded(1)).tolist() == asked[0][1].tolist()


def test_noise_levels_are_clamped_not_drawn_inside_their_bounds():
    tau = dmd.draw_tau(20_000, CFG, seeded())
    assert tau.min() >= CFG.tau_min
    assert tau.max() == torch.tensor(CFG.tau_max)
    share = (tau == tau.max()).float().mean()
    assert 0.08 < share < 0.105  # shift 5: σ > .98 is u > .907


@pytest.mark.parametrize("sink", [True, False])
def test_the_last_memory_of_a_rollout_is_the_sink_only_if_wanted(sink):
    cfg = replace(CFG, sink=sink)
    _, context = rollout(network(), clip(4), 4, 0, cfg, seeded())
    last = context.times[:, 4]
    assert (last == 1).all() == sink


def test_a_rollout_with_the_released_encoding_remembers_by_the_released_rule(monkeypatch):
    rules = []
    plain = dmd.MemoryBank

    def bank(rule):
        rules.append(rule)
        return plain(rule)

    monkeypatch.setattr(dmd, "MemoryBank", bank)
    world = clip()

    def student(x, sigma, context):
        return torch.zeros_like(x)

    for encoding in ("anchored", "released"):
        cfg = replace(CFG, lens=Lens(encoding, 8))
        rollout(student, world, 1, 0, cfg, seeded())
    assert rules == ["uniform"] * 2 + ["released"] * 2


def test_student_step_leaves_teacher_and_critic_untouched():
    student = network()
    real = network(1)
    fake = network(2)
    x0, context = rolled(student, exit_step=1)
    generator_loss(x0, context, real, fake, CFG, seeded(1)).backward()
    assert grads(student)
    assert not grads(real)
    assert not grads(fake)
    assert all(g.isfinite().all() for g in grads(student))


def test_a_critic_learns_what_the_student_makes():
    fake = network(1)
    x0, context = rolled(network())
    opt = torch.optim.Adam(fake.parameters(), 3e-3)
    losses = []
    for i in range(40):
        loss = dmd.critic_loss(x0, context, fake, CFG, seeded(i % 3))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


# ---- the rollout


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_only_the_last_segment_has_gradient(exit_step):
    student = Spy(network())
    x0, _ = rolled(student, 3, exit_step)
    graphs = [call["graph"] for call in student.calls]
    assert len(graphs) == 2 * CFG.steps + exit_step + 1  # earlier segments always finish
    assert graphs == [False] * (len(graphs) - 1) + [True]
    assert x0.requires_grad


def test_a_rollout_without_grad_has_no_graph():
    student = Spy(network())
    with torch.no_grad():
        x0, _ = rolled(student)
    assert not x0.requires_grad
    assert len(student.calls) == CFG.steps


def test_the_past_is_the_tail_of_what_the_student_made_and_the_memory_comes_from_its_own_pool():
    student, world = Spy(network()), clip(3)
    x0, context = rollout(student, world, 3, None, CFG, seeded())
    made = [student.calls[i]["x0"] for i in (2, 5, 8)]  # the last step of each segment
    assert torch.equal(x0.detach(), made[2])
    assert x0.shape[2] == 10
    pool = torch.cat([world.latents, made[0], made[1]], 2)  # 25 latents: what it has lived
    first, _, P = Window().segment(2)
    assert torch.equal(context.past, pool[:, :, first : first + P])
    for b in range(2):
        times = context.times[b, :5]
        assert (times < first).all()
        assert torch.equal(context.memory[b], pool[b][:, times])
    assert context.times[0, 5:].tolist() == list(range(21, 35))


def test_the_first_segment_is_image_to_video_without_memory():
    world = clip()
    x0, context = rollout(network(), world, 1, None, CFG, seeded())
    assert (x0.shape[2], context.memory.shape[2]) == (14, 0)
    assert torch.equal(context.past, world.latents)


def test_the_context_is_the_one_that_play_and_training_build():
    """A rollout's context equals clip_context on the latents it made: one convention everywhere."""
    student, world = Spy(network()), clip(2)
    _, context = rollout(student, world, 2, None, CFG, seeded())
    not_yet = torch.zeros(2, MICRO.in_dim, 10, 4, 4)
    lived = torch.cat([world.latents, student.calls[2]["x0"], not_yet], 2)
    _, same = clip_context(
        lived,
        world.c2w,
        world.keyboard,
        world.mouse,
        world.text,
        torch.tensor([15, 15]),
        10,
        4,
        context.times[:, :5],
    )
    for name in ("past", "memory", "times", "rays", "mouse", "keyboard"):
        assert torch.equal(getattr(context, name), getattr(same, name)), name


def test_the_finished_rollout_is_the_sampler_the_student_is_played_with():
    student, world = network().eval(), clip()
    x0, context = rollout(student, world, 1, None, CFG, seeded())
    g = seeded()
    noise = torch.randn(x0.shape, generator=g)
    played = flow.sample(
        student, context, flow.sigma_grid(CFG.steps, CFG.shift), noise, "renoise", generator=g
    )
    torch.testing.assert_close(x0.detach(), played, rtol=0, atol=1e-5)


def test_an_exit_step_gives_that_steps_clean_estimate():
    student = Spy(network())
    _, context = rolled(network(), exit_step=0)
    noise = latents(14)
    x0 = few_step(student, context, noise, 1, CFG, seeded(1))
    assert len(student.calls) == 2
    assert torch.equal(x0.detach(), student.calls[1]["x0"])


def test_all_networks_read_sigma_from_the_same_function():
    student = Spy(network())
    real = Spy(network(1))
    fake = Spy(network(2))
    x0, context = rolled(student)
    generator_loss(x0, context, real, fake, CFG, seeded(1))
    levels = [call["sigma"][0].item() for call in student.calls]
    assert levels == flow.sigma_grid(3, 5.0)[:-1].tolist()
    a, b = real.calls[0], fake.calls[0]
    assert torch.equal(a["x"], b["x"])
    assert torch.equal(a["sigma"], b["sigma"])
    assert a["context"] is context and b["context"] is context
    drawn = flow.sample_sigma(2, CFG.shift, seeded(1))
    drawn = drawn.clamp(CFG.tau_min, CFG.tau_max)
    assert torch.equal(a["sigma"], drawn)


def test_guidance_asks_the_teacher_twice_and_without_memory():
    real = Spy(network(1))
    x0, context = rolled(network(), 2, 0)
    generator_loss(x0, context, real, network(2), replace(CFG, guidance=4.0), seeded(1))
    with_memory, null = (call["context"] for call in real.calls)
    assert (with_memory.memory.shape[2], null.memory.shape[2]) == (5, 0)
    assert (null.mouse == 1).all()


def test_a_seed_fixes_a_rollout():
    student = network()
    made = [rolled(student, 2, 1, seed=seed)[0] for seed in (0, 0, 1)]
    a, b, c = made
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---- what an iteration draws


def test_turns_count_critic_updates_per_student_update_or_the_reverse():
    updates = {5: (30, 6), 3: (30, 10), 1: (30, 30), -5: (6, 30)}  # of critic and student
    for ratio, expected in updates.items():
        taken = torch.tensor([dmd.turns(step, ratio) for step in range(30)])
        assert tuple(taken.sum(0).tolist()) == expected, ratio
    with pytest.raises(ValueError, match="got 0"):
        dmd.turns(3, 0)


def test_a_fifth_of_the_rollouts_is_masked_and_the_rest_is_uniform():
    g = seeded()
    drawn = torch.tensor([dmd.draw_segments(CFG, g) for _ in range(6000)])
    share = torch.bincount(drawn, minlength=7)[1:] / 6000
    each = 0.8 / 6
    assert abs(share[0] - (0.2 + each)) < 0.02
    assert (share[1:] - each).abs().max() < 0.02
    assert {dmd.draw_exit(CFG, g) for _ in range(50)} == {0, 1, 2}


def test_a_clip_too_short_for_the_rollout_says_how_long_it_must_be():
    with pytest.raises(
        ValueError, match="3 segments need cameras and actions of 137 frames .* the clip has 97"
    ):
        rollout(network(), clip(2), 3, None, CFG, seeded())


# ---- a judge


def test_a_judge_learns_to_tell_true_from_generated_and_the_student_is_told_how_to_pass():
    torch.manual_seed(0)
    cfg = DMDConfig(tau_min=0.02, tau_max=0.02)
    apart = torch.tensor([2.0, 0, 0, 0]).view(1, 4, 1, 1, 1)  # in one channel
    true = torch.randn(8, 4, 2, 2, 2) + apart
    made = torch.randn(8, 4, 2, 2, 2) - apart

    def features(x, tau, context):  # each cell is a token of four numbers
        return x.flatten(3).permute(0, 2, 3, 1)

    context = types.SimpleNamespace(alone=lambda: None)
    judge = dmd.Judge(4)

    def opinion(x, tau, context):
        return judge(features(x, tau, context))

    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-2)
    before = dmd.judge_loss(made, true, context, opinion, cfg)
    for _ in range(60):
        optimizer.zero_grad()
        loss = dmd.judge_loss(made, true, context, opinion, cfg)
        loss.backward()
        optimizer.step()
    assert before > 1.2 and loss < 0.3  # chance is 2 ln 2 = 1.39

    x0 = made.clone().requires_grad_()
    dmd.adversarial_loss(x0, context, opinion, cfg).backward()
    assert x0.grad[:, 0].mean() < 0  # a step against it moves towards the true ones


def test_the_judge_sees_the_new_latents_alone_in_the_real_network():
    x0, context = rolled(network(), 2)
    alone = context.alone()
    new = x0.shape[2]
    assert alone.memory.shape[2] == alone.past.shape[2] == 0
    assert torch.equal(alone.times, context.times[:, -new:])
    sigma = torch.full((len(x0),), 0.5)
    tokens = network()(x0.detach(), sigma, alone, return_features=True)
    cells = x0.shape[3] * x0.shape[4] // 4
    assert tokens.shape == (len(x0), new, cells, MICRO.dim)
    assert tokens.isfinite().all()


def test_short_rollouts_go_as_far_in_time_as_long_ones_up_to_a_number_of_segments():
    cfg = DMDConfig(segments=5, p_mask=0.0)
    longest = {}
    for new in (10, 5, 2):
        longest[new] = max(dmd.draw_segments(cfg, seeded(i), new) for i in range(300))
    assert longest == {10: 5, 5: 9, 2: 12}
    for new, k in longest.items():
        assert Window(new=new).frames(k) <= 241  # they fit into an episode


@pytest.mark.parametrize("new", (10, 5, 2))
def test_a_rollout_ends_where_its_clip_ends(new: int):
    cfg = DMDConfig(segments=5, p_mask=0.0)
    k = max(dmd.draw_segments(cfg, seeded(i), new, frames=81) for i in range(300))
    assert Window(new=new).frames(k) <= 81 < Window(new=new).frames(k + 1)
