"""dit.py: the released network, key for key and number for number, and fast forms equal to plain ones."""

import math
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import GOLDEN_CONFIG, make_context, plain_attention, plain_rope, relative_error
from safetensors.torch import load_file
from torch import Tensor, nn

import attention as attention_file
import dit
import flow
import memory
import released
from actions import ActionModule
from attention import attention
from block import Block
from context import Context, Memory, Window, segment_cameras
from dit import DiT, DiTConfig, random_context
from flow import sample, sigma_grid

GOLDEN = Path(__file__).parent / "golden"
MICRO = dit.PRESETS["micro"]
CASES = (
    "first_segment",
    "later_segment_with_memory",
    "later_segment_without_memory",
    "perturbed_rope_sigma_0.3",
)


def loud(cfg: DiTConfig, seed: int = 0) -> DiT:
    """A network with nothing silent: layers that start at zero are random, so every path counts."""
    torch.manual_seed(seed)
    model = DiT(cfg).requires_grad_(False)
    for p in model.parameters():
        is_norm = p.ndim == 1 and p.mean().item() == 1
        p.copy_(torch.randn(p.shape) * 0.15 + is_norm)
    return model


def inputs(cfg: DiTConfig, B: int = 2, memory: int = 2, past: int = 2, new: int = 3, size: int = 4):
    torch.manual_seed(1)
    x = torch.randn(B, cfg.in_dim, new, size, size)
    sigma = torch.rand(B)
    return x, sigma, random_context(cfg, B, memory, past, new, size)


def with_parts_of(c: SimpleNamespace, change: Callable[[Tensor], Tensor]) -> SimpleNamespace:
    """Another context, every tensor of it changed."""
    return SimpleNamespace(**{name: change(value) for name, value in vars(c).items()})


# ---- the plain form: one timestep per token, every token through every block, no batches --------


def plain_rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    mean = x.square().mean(-1, keepdim=True)
    return x / (mean + 1e-6).sqrt() * weight


def plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def plain_actions(m: ActionModule, x: Tensor, c: SimpleNamespace, cfg: DiTConfig) -> Tensor:
    M = c.memory.shape[2]
    B, T, S, _ = x.shape
    heads = cfg.action_heads
    d = cfg.action_width // heads

    # the clock restarts after the memory
    local = torch.tensor([*range(M), *range(T - M)]).double()
    angles = torch.zeros(T, 1, d // 2, dtype=torch.float64)
    turning = cfg.action_rope // 2
    for j in range(turning):
        angles[:, 0, j] = local * 256 ** (-j / turning)

    def turn(y: Tensor) -> Tensor:
        return plain_rope(plain_rms(y), angles)

    windows = [m.keyboard_embed(c.keyboard[:, i]).flatten(1) for i in range(T)]
    kv = m.keyboard_attn_kv(torch.stack(windows, 1))
    k, v = kv.view(B, T, 2, heads, d).unbind(2)
    k = turn(k)

    out = []
    for s in range(S):
        here = x[:, :, s]
        hidden = m.mouse_mlp(torch.cat([here, c.mouse.flatten(2)], -1))
        q2, k2, v2 = m.t_qkv(hidden).view(B, T, 3, heads, d).unbind(2)
        y = plain_attention(turn(q2), turn(k2), v2)
        here = here + m.proj_mouse(y.flatten(2))

        q = turn(m.mouse_attn_q(here).view(B, T, heads, d))
        y = plain_attention(q, k, v)
        out.append(here + m.proj_keyboard(y.flatten(2)))
    return torch.stack(out, 2)


class Plain:
    """The whole network once more, as slowly as it is written down."""

    def __init__(self, model: DiT, c: SimpleNamespace):
        self.m = model
        self.cfg = model.cfg
        self.c = c
        self.B, self.T = c.times.shape
        self.h = c.past.shape[3] // 2
        self.w = c.past.shape[4] // 2

    def __call__(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """Every latent's velocity, memory and past included: (B, C, M+P+N, h, w)."""
        latents = torch.cat([self.c.memory, self.c.past, x_sigma], 2)
        x = self.m.patch_embedding(latents).flatten(2).mT  # (B, L, D)
        e = self.time(sigma, x_sigma.shape[2])
        e0 = self.m.time_projection(e).unflatten(-1, (6, -1))
        rays = self.rays()
        if self.cfg.rays_at_input:
            x = x + rays
        missing = self.cfg.text_len - self.c.text.shape[1]
        text = self.m.text_embedding(F.pad(self.c.text, (0, 0, 0, missing)))
        angles = self.angles()
        for block in self.m.blocks:
            x = self.block(block, x, e0, rays, text, angles)
        return self.head(x, e)

    def time(self, sigma: Tensor, new: int) -> Tensor:  # (B, L, D)
        t = torch.zeros(self.B, self.T, dtype=torch.float64)
        t[:, -new:] = 1000 * sigma.double()[:, None]
        t = t.repeat_interleave(self.h * self.w, 1)
        half = self.cfg.freq_dim // 2
        omega = 10000 ** (-torch.arange(half).double() / half)
        angle = t[..., None] * omega
        waves = torch.cat([angle.cos(), angle.sin()], -1)
        return self.m.time_embedding(waves.float())

    def rays(self) -> Tensor:  # (B, L, D)
        frames = self.c.rays.transpose(1, 2).flatten(0, 1)
        cells = F.pixel_unshuffle(frames, 2).flatten(2).mT  # (B·T, h·w, R·4)
        cells = cells.reshape(self.B, self.T * self.h * self.w, -1)
        p = self.m.patch_embedding_wancamctrl(cells)
        hidden = F.silu(self.m.c2ws_hidden_states_layer1(p))
        return p + self.m.c2ws_hidden_states_layer2(hidden)

    def angles(self) -> Tensor:  # (B, L, heads, pairs)
        heads = self.cfg.heads
        pairs = self.cfg.dim // heads // 2
        third = pairs // 3
        axes = {
            "time": (self.c.times[:, :, None, None], pairs - 2 * third),
            "row": (torch.arange(self.h)[:, None], third),
            "column": (torch.arange(self.w), third),
        }
        shape = (self.B, self.T, self.h, self.w, heads, pairs)
        angles = torch.zeros(shape, dtype=torch.float64)
        for head in range(heads):
            epsilon = 2 * head / (heads - 1) - 1
            theta = 10000 * (1 + self.cfg.sigma_theta * epsilon)
            first = 0
            for axis, n in axes.values():
                for j in range(n):
                    omega = theta ** (-j / n)
                    angles[..., head, first + j] = axis.double() * omega
                first += n
        return angles.flatten(1, 3)

    def split(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (self.cfg.heads, -1))

    def block(
        self, b: Block, x: Tensor, e0: Tensor, rays: Tensor, text: Tensor, angles: Tensor
    ) -> Tensor:
        time = b.modulation[:, None] + e0
        shift1, scale1, gate1, shift2, scale2, gate2 = time.unbind(2)

        attn = b.self_attn
        a = plain_norm(x) * (1 + scale1) + shift1
        q = plain_rms(attn.q(a), attn.norm_q.weight)
        k = plain_rms(attn.k(a), attn.norm_k.weight)
        q = plain_rope(self.split(q), angles)
        k = plain_rope(self.split(k), angles)
        y = plain_attention(q, k, self.split(attn.v(a)))
        x = x + attn.o(y.flatten(2)) * gate1

        g = b.cam_injector_layer2(F.silu(b.cam_injector_layer1(rays))) + rays
        scale = 1 + b.cam_scale_layer(g)
        x = b.norm3(scale * x + b.cam_shift_layer(g))

        attn = b.cross_attn
        q = plain_rms(attn.q(x), attn.norm_q.weight)
        k = plain_rms(attn.k(text), attn.norm_k.weight)
        y = plain_attention(self.split(q), self.split(k), self.split(attn.v(text)))
        x = x + attn.o(y.flatten(2))

        if b.action_model is not None:
            by_latent = x.unflatten(1, (self.T, -1))
            x = plain_actions(b.action_model, by_latent, self.c, self.cfg).flatten(1, 2)
        return x + b.ffn(plain_norm(x) * (1 + scale2) + shift2) * gate2

    def head(self, x: Tensor, e: Tensor) -> Tensor:
        time = self.m.head.modulation[:, None] + e[:, :, None]
        shift, scale = time.unbind(2)
        y = self.m.head.head(plain_norm(x) * (1 + scale) + shift)
        y = y.view(self.B, self.T, self.h, self.w, 2, 2, self.cfg.in_dim)
        y = torch.einsum("bthwpqc->bcthpwq", y)
        return y.reshape(self.B, self.cfg.in_dim, self.T, 2 * self.h, 2 * self.w)


def plain_forward(m: DiT, x_sigma: Tensor, sigma: Tensor, c: SimpleNamespace) -> Tensor:
    return Plain(m, c)(x_sigma, sigma)


# ---- identities --------------------------------------------------------------------------------------------


def test_patchify_round_trips():
    x = torch.randn(2, 3, 4, 6, 8)
    tokens = dit.patchify(x, (1, 2, 2))  # channel, row, column
    assert tokens.shape == (2, 4, 12, 12)
    # row, column, channel, like the head
    channel_last = tokens.unflatten(-1, (3, 4)).mT.flatten(-2)
    assert torch.equal(dit.unpatchify(channel_last, 6, 8, (1, 2, 2)), x)


@pytest.mark.parametrize("memories", [0, 2])
@pytest.mark.parametrize("actions", [(0,), (0, 1)])
def test_the_fast_form_equals_the_plain_form(memories: int, actions: tuple[int, ...]):
    model = loud(replace(MICRO, action_blocks=actions))
    x, sigma, c = inputs(model.cfg, memory=memories)
    plain = plain_forward(model, x, sigma, c)
    new = model(x, sigma, c)
    past_and_new = model(x, sigma, c, return_past=True)
    assert relative_error(new, plain[:, :, -3:]) < 2e-6
    assert relative_error(past_and_new, plain[:, :, -5:]) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_equals_direct_at_every_noise_level(dtype: torch.dtype):
    model = loud(MICRO).to(dtype)
    x, _, c = inputs(MICRO)
    prepared = model.prepare(c)
    for level in (1.0, 0.5, 0.01):
        sigma = torch.full((2,), level)
        direct = model(x, sigma, c)
        assert torch.equal(model(x, sigma, c, prepared), direct)


def test_a_batch_equals_its_samples_one_by_one():
    model = loud(MICRO)
    x, sigma, c = inputs(MICRO, B=3)
    c.times = c.times + torch.tensor([[0], [7], [900]])
    one_by_one = []
    for i in range(3):
        alone = with_parts_of(c, lambda t, i=i: t[[i]])
        one_by_one.append(model(x[[i]], sigma[[i]], alone))
    together = model(x, sigma, c)
    assert torch.allclose(together, torch.cat(one_by_one), atol=1e-5)


def test_conditioning_frames_leave_the_sampler_untouched():
    model = loud(MICRO)
    x, _, c = inputs(MICRO)
    before = {name: value.clone() for name, value in vars(c).items()}
    x0 = sample(model, c, sigma_grid(3), x, "unipc")
    assert x0.shape == x.shape and not torch.equal(x0, x)
    assert all(torch.equal(before[name], value) for name, value in vars(c).items())


def test_memory_is_read_but_never_predicted():
    model = loud(MICRO)
    x, sigma, c = inputs(MICRO)
    v = model(x, sigma, c)
    assert v.shape == x.shape
    c.memory = torch.randn_like(c.memory)
    assert relative_error(model(x, sigma, c), v) > 1e-3


def test_zero_initialised_action_modules_change_nothing():
    torch.manual_seed(0)
    model = DiT(
        replace(MICRO, rays_at_input=False)
    )  # as released: cameras enter through silent layers alone
    x, sigma, c = inputs(MICRO)
    assert not model(x, sigma, c).any()  # the output layer starts silent too
    nn.init.normal_(model.head.head.weight)
    v = model(x, sigma, c)
    c.mouse = c.mouse + 1
    c.keyboard = -torch.ones_like(c.keyboard)
    c.rays = c.rays.flip(1)
    assert torch.equal(model(x, sigma, c), v)
    nn.init.normal_(model.blocks[0].action_model.proj_keyboard.weight)
    assert not torch.equal(model(x, sigma, c), v)


def test_the_action_norm_weights_are_loaded_and_ignored_unless_switched_on():
    model = loud(MICRO)
    x, sigma, c = inputs(MICRO)
    v = model(x, sigma, c)
    multiplied = loud(replace(MICRO, action_norm_weight=True))
    assert relative_error(multiplied(x, sigma, c), v) > 1e-3
    for norm in ("img_attn_q_norm", "img_attn_k_norm", "key_attn_q_norm", "key_attn_k_norm"):
        for m in (model, multiplied):
            nn.init.ones_(getattr(m.blocks[0].action_model, norm).weight)
    assert torch.equal(model(x, sigma, c), v)
    assert relative_error(multiplied(x, sigma, c), v) < 1e-6


# ---- positions ---------------------------------------------------------------------------------------------


def test_perturbed_rope_has_the_released_angles():
    times = torch.tensor([[0, 1]])
    angles = attention_file.rope_angles(times, 2, 2, dit.PRESETS["5b"])
    first = angles[0, 1, 2, 0]  # latent 1; row 1, column 0; head 0
    last = angles[0, 1, 2, 23]
    golden_first = {1: 0.7078694702, 21: 0.0007063449, 23: 0.6963187592}
    golden_last = {1: 0.6405875924, 21: 8.67259e-05, 23: 0.627145017}
    for head, golden in ((first, golden_first), (last, golden_last)):
        for pair, value in golden.items():
            assert math.isclose(head[pair], value, rel_tol=1e-6)
    assert first[0] == first[22] == 1  # pair 0 of an axis: 1 radian a step
    assert not first[43:].any()


def test_without_perturbation_all_heads_share_one_clock():
    def heads(cfg: DiTConfig) -> Tensor:
        angles = attention_file.rope_angles(torch.tensor([[5]]), 2, 2, cfg)
        return angles.unbind(-2)

    first, second = heads(replace(MICRO, sigma_theta=0.0))
    assert torch.equal(first, second)
    first, second = heads(MICRO)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("later", [100, 5000, 1_000_000])
def test_only_differences_of_time_count_and_there_is_no_wall_at_2048(later: int):
    model = loud(MICRO)
    x, sigma, c = inputs(MICRO)
    v = model(x, sigma, c)
    c.times = c.times + later
    assert relative_error(model(x, sigma, c), v) < 1e-5


# ---- against the release -----------------------------------------------------------------------------------


def linear(name: str, n_in: int, n_out: int, bias: bool = True) -> dict:
    shapes = {f"{name}.weight": (n_out, n_in)}
    if bias:
        shapes[f"{name}.bias"] = (n_out,)
    return shapes


def released_block(b: str, c: DiTConfig) -> dict:
    D = c.dim
    out = {f"{b}.modulation": (1, 6, D)}
    out |= {f"{b}.norm3.weight": (D,), f"{b}.norm3.bias": (D,)}
    for kind in ("self_attn", "cross_attn"):
        out |= {f"{b}.{kind}.norm_q.weight": (D,), f"{b}.{kind}.norm_k.weight": (D,)}
        for projection in "qkvo":
            out |= linear(f"{b}.{kind}.{projection}", D, D)
    for name in ("injector_layer1", "injector_layer2", "scale_layer", "shift_layer"):
        out |= linear(f"{b}.cam_{name}", D, D)
    out |= linear(f"{b}.ffn.0", D, c.ffn)
    out |= linear(f"{b}.ffn.2", c.ffn, D)
    return out


def released_actions(a: str, c: DiTConfig) -> dict:
    D = c.dim
    A = c.action_width
    hidden = c.action_hidden
    window = c.action_window
    out = linear(f"{a}.keyboard_embed.0", 6, hidden)
    out |= linear(f"{a}.keyboard_embed.2", hidden, hidden)
    out |= linear(f"{a}.mouse_mlp.0", D + 2 * window, A)
    out |= linear(f"{a}.mouse_mlp.2", A, A)
    out |= {f"{a}.mouse_mlp.3.weight": (A,), f"{a}.mouse_mlp.3.bias": (A,)}
    for name in ("img_attn_q", "img_attn_k", "key_attn_q", "key_attn_k"):
        out[f"{a}.{name}_norm.weight"] = (A // c.action_heads,)
    out |= linear(f"{a}.t_qkv", A, 3 * A, bias=False)
    out |= linear(f"{a}.proj_mouse", A, D, bias=False)
    out |= linear(f"{a}.mouse_attn_q", D, A, bias=False)
    out |= linear(f"{a}.keyboard_attn_kv", hidden * window, 2 * A, bias=False)
    out |= linear(f"{a}.proj_keyboard", A, D, bias=False)
    return out


def released_shapes(c: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Every name and shape of the released checkpoint."""
    D = c.dim
    out = {"patch_embedding.weight": (D, c.in_dim, 1, 2, 2), "patch_embedding.bias": (D,)}
    out["head.modulation"] = (1, 2, D)
    out |= linear("patch_embedding_wancamctrl", 4 * c.ray_channels, D)
    out |= linear("c2ws_hidden_states_layer1", D, D)
    out |= linear("c2ws_hidden_states_layer2", D, D)
    out |= linear("text_embedding.0", c.text_dim, D)
    out |= linear("text_embedding.2", D, D)
    out |= linear("time_embedding.0", c.freq_dim, D)
    out |= linear("time_embedding.2", D, D)
    out |= linear("time_projection.1", D, 6 * D)
    out |= linear("head.head", D, 4 * c.in_dim)
    for i in range(c.layers):
        out |= released_block(f"blocks.{i}", c)
    for i in c.action_blocks:
        out |= released_actions(f"blocks.{i}.action_model", c)
    return out


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.state_dict().items()}


def test_5b_has_exactly_the_1356_released_tensors():
    with torch.device("meta"):
        model = DiT(dit.PRESETS["5b"])
    assert shapes_of(model) == released_shapes(model.cfg)
    state = model.state_dict()
    assert len(state) == 1356
    assert sum(p.numel() for p in state.values()) == 6_469_915_584
    assert state["blocks.14.action_model.mouse_mlp.0.weight"].shape == (1024, 3096)
    assert state["patch_embedding_wancamctrl.weight"].shape == (3072, 6144)


@pytest.mark.parametrize("preset", ["micro", "tiny", "small", "14b"])
def test_every_preset_is_the_same_network_in_another_size(preset: str):
    with torch.device("meta"):
        model = DiT(dit.PRESETS[preset])
    assert shapes_of(model) == released_shapes(model.cfg)
    if preset == "tiny":
        assert sum(p.numel() for p in model.parameters()) <= 7_950_000


@pytest.mark.parametrize(
    "steps, s, sigmas, integers, rounded",
    [
        (3, 5, [0.99979985, 0.9088428, 0.71397942, 0], [999, 908, 713], [1000, 908, 712]),
        (
            4,
            5,
            [0.99979985, 0.93726546, 0.83305538, 0.62468737, 0],
            [999, 937, 833, 624],
            [1000, 936, 832, 624],
        ),
    ],
)
def test_sigma_grids_and_timesteps_are_the_released_ones(steps, s, sigmas, integers, rounded):
    grid = sigma_grid(steps, s)
    assert grid.dtype == torch.float32 and grid[-1] == 0
    assert torch.allclose(grid, torch.tensor(sigmas), atol=1e-7)
    assert dit.timestep(grid[:-1], "integer").tolist() == integers
    assert dit.timestep(grid[:-1], "bf16").tolist() == rounded
    assert torch.equal(dit.timestep(grid), 1000 * grid.double())


INTEGERS = """
999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873 863 854 843
833 821 809 796 783 768 753 737 720 701 681 660 636 611 584 555 522 487 448 405 356 302 241 172 92
"""
ROUNDED = """
1000 996 992 988 984 976 972 968 964 956 952 944 940 936 928 920 912 904 896 888 880 872 864 856
844 832 820 808 796 784 768 752 736 720 700 680 660 636 612 584 556 520 488 448 404 356 302 241
172 92
"""


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def test_the_fifty_timesteps_of_the_base_model_are_the_released_ones():
    grid = sigma_grid(50)[:-1]
    assert dit.timestep(grid, "integer").tolist() == numbers(INTEGERS)
    assert dit.timestep(grid, "bf16").tolist() == numbers(ROUNDED)


@pytest.mark.parametrize("steps, s", [(3, 5), (4, 3), (50, 5)])
def test_unipc_matches_official(steps: int, s: int):
    golden = {
        k.split(".", 1)[1]: v
        for k, v in load_file(GOLDEN / "unipc.safetensors").items()
        if k.startswith(f"n{steps}_shift{s}.")
    }
    grid = sigma_grid(steps, float(s))
    assert torch.allclose(grid, golden["sigmas"], atol=1e-7)
    assert torch.equal(dit.timestep(grid[:-1], "integer").float(), golden["timesteps"])

    def v(x: Tensor, sigma: float) -> Tensor:
        t = float(dit.timestep(torch.tensor(sigma, dtype=torch.float64), "integer"))
        return torch.einsum("ij,bjthw->bithw", golden["A"], x) * (0.5 + t / 1000)

    ours = torch.stack(list(flow.unipc(v, golden["x0"], grid)))
    assert (ours - golden["trajectory"]).abs().max() < 1e-5
    euler = torch.stack(list(flow.euler(v, golden["x0"], grid)))
    assert (
        relative_error(euler[-1], golden["trajectory"][-1]) > 5e-4
    )  # another sampler is visibly another


def golden_model(**changes) -> DiT:
    weights = {
        k.removeprefix("weights."): v.float()
        for k, v in load_file(GOLDEN / "dit.safetensors").items()
        if k.startswith("weights.")
    }
    model = DiT(replace(GOLDEN_CONFIG, **changes)).requires_grad_(False)
    model.load_state_dict(weights, strict=True)
    return model


def golden_case(case: str) -> tuple[Tensor, Tensor, SimpleNamespace, Tensor]:
    """x_sigma, sigma, context and output of one stored forward."""
    g = {
        k.removeprefix(case + "."): v
        for k, v in load_file(GOLDEN / "dit.safetensors").items()
        if k.startswith(case + ".")
    }
    P = int((g["timestep"][0] == 0).sum()) // 2  # two tokens per latent
    bank = g.get("memory", g["x"][:, :, :0])
    M = bank.shape[2]
    remembered = g.get("memory_latent_idx", torch.tensor([])).long()
    times = torch.cat([remembered, torch.arange(*g["latent_range"].tolist())])
    no_turn = torch.ones(1, M, 12, 2)
    no_key = -torch.ones(1, M, 12, 6)
    mouse, keyboard = (released.windows(g[name]) for name in ("mouse", "keyboard"))
    context = SimpleNamespace(
        past=g["x"][:, :, :P],
        memory=bank,
        rays=g["plucker"].float(),
        text=g["context"][None],
        times=times[None],
        mouse=torch.cat([no_turn, mouse], 1),
        keyboard=torch.cat([no_key, keyboard], 1),
    )
    sigma = g["timestep"].max()[None].double() / 1000
    return g["x"][:, :, P:], sigma, context, g["out"]


@pytest.mark.parametrize("case", CASES)
def test_matches_official_on_golden_weights(case: str):
    model = golden_model(sigma_theta=0.3 if "perturbed" in case else 0.0)
    x, sigma, context, out = golden_case(case)
    assert relative_error(model(x, sigma, context, return_past=True), out) < 2e-6
    new = out[:, :, -x.shape[2] :]
    assert relative_error(model(x, sigma, context, model.prepare(context)), new) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_matches_official_on_a_gpu(case: str):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = golden_model(sigma_theta=0.3 if "perturbed" in case else 0.0).cuda()
    x, sigma, context, out = golden_case(case)
    context = with_parts_of(context, Tensor.cuda)
    v = model(x.cuda(), sigma.cuda(), context, return_past=True)
    assert relative_error(v.cpu(), out) < 5e-6


def test_a_wrong_perturbation_is_visible():
    x, sigma, context, out = golden_case("perturbed_rope_sigma_0.3")
    assert relative_error(golden_model()(x, sigma, context, return_past=True), out) > 1e-4


def rollout_context(g: dict, k: int, history: Tensor) -> Context:
    """Segment k of the stored rollout, from actions and cameras to retrieved memory, as released."""
    window = Window()
    first, end, P = window.segment(k)
    frames = slice(0, 57) if k == 0 else slice(40 * k + 1, 40 * k + 57)
    c2w = released.from_released(g["extrinsics"])[None]
    past = history[:, :, -P:]
    bank = None
    if k > 0:
        queries = [frames.stop - 1 - 8 * slot for slot in range(5)]
        old = c2w[0, 1 : frames.start]
        scores = memory.overlap(c2w[0, queries], old, "released")
        chosen = g[f"segment{k}.selected_before_sink"] - 1
        best = scores.amax(1)
        of_chosen = scores.gather(1, chosen[:, None])[:, 0]
        assert (best - g[f"segment{k}.overlap"]).abs().max() < 2e-3
        assert (best - of_chosen).abs().max() < 2e-3
        picked = torch.tensor(
            [window.latent_of(int(f)) for f in chosen[:4] + 1] + [1]
        )  # the sink comes last
        assert torch.equal(picked, g[f"segment{k}.memory_latents_idx"])
        cameras = torch.cat([segment_cameras(c2w, int(i), 1) for i in picked], 1)
        bank = Memory(history[:, :, picked], picked[None], cameras)
    context = make_context(
        past,
        torch.arange(first, end)[None],
        segment_cameras(c2w, first, end - first),
        *(released.windows(g[name][None, frames]) for name in ("mouse", "keyboard")),
        g["context"][None],
        bank,
        encoding="released",
        stride=16,
    )
    assert g[f"segment{k}.latent_range"].tolist() == [first, end]
    assert torch.allclose(
        context.rays[0, ::97, :, 1, 2], g[f"segment{k}.plucker_sample"], atol=2e-6
    )
    return context


def test_a_rollout_of_four_segments_matches_official():
    g = load_file(GOLDEN / "rollout.safetensors")
    model = golden_model(timestep="integer")
    history = g["image_latent"]
    for k in range(4):
        context = rollout_context(g, k, history)
        noise = g[f"segment{k}.noise"][:, :, context.past.shape[2] :]
        x0 = sample(model, context, sigma_grid(3), noise, "unipc")
        history = torch.cat([history, x0], 2)
        ours = history if k == 0 else history[:, :, -10:]
        assert relative_error(ours, g[f"segment{k}.latents"]) < 5e-6


# ---- precision, training, bad input ------------------------------------------------------------------------


@pytest.mark.parametrize("fp32_stream", [False, True])
def test_bf16_weights_stay_near_float32(fp32_stream: bool):
    model = loud(replace(MICRO, fp32_stream=fp32_stream))
    x, sigma, c = inputs(MICRO)
    v = model(x, sigma, c)
    low = model.bfloat16()(x, sigma, c)
    assert low.dtype == torch.float32 and relative_error(low, v) < 0.05


@pytest.mark.long
def test_a_block_compiles_into_one_graph():
    model = loud(MICRO)
    x, sigma, c = inputs(MICRO)
    v = model(x, sigma, c)
    prepared = model.prepare(c)
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)  # traced only: no compiler needed
    for _ in range(2):
        assert torch.allclose(model(x, sigma, c, prepared), v, atol=1e-6)


def test_autocast_changes_little():
    model = loud(MICRO)
    x, sigma, c = inputs(MICRO)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, sigma, c)
    assert relative_error(low.float(), model(x, sigma, c)) < 0.05


def test_the_loss_falls_and_every_parameter_learns():
    torch.manual_seed(0)
    model = loud(MICRO).requires_grad_(True)
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    x0, sigma, c = inputs(MICRO, B=4)
    noise, losses = torch.randn_like(x0), []
    for _ in range(40):
        v = model(flow.add_noise(x0, noise, sigma), sigma, c)
        loss = (v - flow.velocity(x0, noise)).square().mean()  # Eq. 3, 6
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    silent = set()
    for name, p in model.named_parameters():
        if p.grad is None or not p.grad.any():
            silent.add(name)
    # ignored as released; and a shift of all keys by one vector moves no softmax
    ignored = ("img_attn_q", "img_attn_k", "key_attn_q", "key_attn_k")
    assert {name for name in silent if not name.endswith("attn.k.bias")} == {
        f"blocks.0.action_model.{name}_norm.weight" for name in ignored
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 16, 4, 4, 4)), "x_sigma must be"),
        (dict(x=torch.zeros(2, 16, 3, 4)), "x_sigma must be"),
        (dict(sigma=torch.zeros(1)), "sigma must be"),
        (dict(rays=torch.zeros(2, 59, 7, 4, 4)), "rays must be"),
        (dict(times=torch.zeros(1, 7)), "times must be"),
        (dict(mouse=torch.zeros(2, 7, 4, 2)), "mouse must be"),
        (dict(keyboard=torch.zeros(2, 6, 12, 6)), "keyboard must be"),
        (dict(text=torch.zeros(2, 5, 8)), "at most 4 words"),
        (dict(text=torch.zeros(1, 3, 8)), "text must be"),
        (dict(memory=torch.zeros(2, 16, 2, 8, 8)), "memory must be"),
    ],
)
def test_wrong_shapes_are_named(change: dict, message: str):
    model = loud(MICRO)
    x, sigma, c = inputs(MICRO)
    change = dict(change)
    x = change.pop("x", x)
    sigma = change.pop("sigma", sigma)
    c = SimpleNamespace(**vars(c) | change)
    with pytest.raises(ValueError, match=message):
        model(x, sigma, c)


def test_wrong_words_are_answered_with_the_right_ones():
    model = loud(MICRO)
    x, sigma, c = inputs(MICRO, size=3)
    q = torch.zeros(1, 2, 4, 8)
    for call, message in (
        (lambda: model(x, sigma, c), "must divide into 2x2 patches, got 3x3"),
        (lambda: sample(model, c, sigma_grid(3), x, "heun"), "euler, unipc, renoise, got 'heun'"),
        (lambda: sigma_grid(0), "at least 1, got 0"),
        (lambda: dit.timestep(sigma, "half"), "exact, integer, bf16, got 'half'"),
        (lambda: attention(q, q[:, :, :1], q[:, :, :1]), r"must be \(1, 2, 4, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.slow  # speed needs repetitions
def test_the_fast_form_trains_in_less_cpu_time_than_the_plain_form():
    model = loud(dit.PRESETS["tiny"]).requires_grad_(True)
    x, sigma, c = inputs(model.cfg, B=8, memory=5, past=4, new=10, size=8)
    seconds = {}
    for form in (plain_forward, DiT.forward) * 3:
        start = time.process_time()  # not disturbed by other programs
        v = form(model, x, sigma, c)[:, :, -10:]
        v.square().mean().backward()
        spent = time.process_time() - start
        seconds[form] = min(seconds.get(form, math.inf), spent)
    assert seconds[DiT.forward] < 0.9 * seconds[plain_forward]


# ---- many ranks --------------------------------------------------------------------------------------------


class Threads:
    """A process group of threads: all-to-all through a shared table, so that ranks cost no processes."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self.table = {}
        self.me = threading.local()
        self.barrier = threading.Barrier(ranks, timeout=60)

    def all_to_all_single(
        self, out: Tensor, flat: Tensor, n_out: list[int], n_in: list[int], group
    ) -> None:
        self.table[self.me.rank] = flat.split(n_in)
        self.barrier.wait()
        arrived = [self.table[rank][self.me.rank] for rank in range(self.ranks)]
        assert [len(piece) for piece in arrived] == n_out  # both sides agree on every size
        out.copy_(torch.cat(arrived))
        self.barrier.wait()

    def run(self, task) -> list:
        def as_rank(rank: int):
            self.me.rank = rank
            return task(self)

        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(as_rank, range(self.ranks)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])  # of 4 places and 2 heads
def test_ranks_that_share_places_compute_what_one_computes(
    ranks: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dist, "get_rank", lambda group: group.me.rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group: group.ranks)
    monkeypatch.setattr(dist, "all_to_all_single", lambda *a: a[-1].all_to_all_single(*a))
    model = loud(replace(MICRO, action_blocks=(0,)))
    x, sigma, c = inputs(MICRO)
    alone = model(x, sigma, c, return_past=True)
    for v in Threads(ranks).run(
        lambda group: model(x, sigma, c, model.prepare(c, group), return_past=True)
    ):
        assert relative_error(v, alone) < 2e-6
    alone = sample(model, c, sigma_grid(2), x)
    together = Threads(ranks).run(lambda group: sample(model, c, sigma_grid(2), x, group=group))
    for x0 in together:
        assert relative_error(x0, alone) < 2e-6
        assert torch.equal(x0, together[0])


def rank_main(rank: int, port: int, expected: dict[str, Tensor], path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, sigma, c = inputs(MICRO)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = loud(MICRO).to(dtype)
        v = model(x, sigma, c, model.prepare(c, dist.group.WORLD), return_past=True)
        errors[str(dtype)] = relative_error(v, expected[str(dtype)])
    torch.save(errors, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # two processes import torch first
def test_two_gloo_processes_compute_what_one_computes(tmp_path: Path):
    x, sigma, c = inputs(MICRO)
    expected = {
        str(dtype): loud(MICRO).to(dtype)(x, sigma, c, return_past=True)
        for dtype in (torch.float32, torch.bfloat16)
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, (port, expected, str(tmp_path)), nprocs=2)
    for rank in range(2):
        errors = torch.load(tmp_path / f"{rank}.pt")
        assert errors["torch.float32"] < 2e-6 and errors["torch.bfloat16"] < 2e-2
