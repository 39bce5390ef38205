"""INT8: the integers are the released ones, the error is small and known, the rest is left alone."""

from pathlib import Path

import pytest
import torch
from helpers import relative_error
from safetensors.torch import load, load_file, save
from torch import nn

from quant import (
    Int8Linear,
    chosen,
    error_bound,
    expected_sqnr,
    int_mm,
    int_mm_plain,
    quantise_rows,
    quantise_weight,
    quantize_,
    sqnr,
)

GOLDEN = load_file(Path(__file__).parent / "golden" / "int8.safetensors")


def linear_of(weight, bias):
    N, K = weight.shape
    linear = nn.Linear(K, N, bias=bias is not None)
    tensors = {"weight": weight}
    if bias is not None:
        tensors["bias"] = bias
    linear.load_state_dict(tensors)
    return linear


def random_integers(M, K, N):
    g = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (M, K), generator=g).to(torch.int8)
    b = torch.randint(-128, 128, (N, K), generator=g).to(torch.int8)
    return a, b


def random_linear(K=64, N=48, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(K, N)


class Block(nn.Module):
    """Names as in the real model, and decoys that end in the same letters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.self_attn = nn.ModuleDict({n: nn.Linear(32, 32) for n in "qkvo"})
        self.cross_attn = nn.ModuleDict({n: nn.Linear(32, 32) for n in "qkvo"})
        self.ffn = nn.Sequential(nn.Linear(32, 80), nn.GELU(), nn.Linear(80, 32))
        decoys = {"mouse_attn_q": nn.Linear(32, 32), "t_qkv": nn.Linear(32, 96)}
        self.action_model = nn.ModuleDict(decoys)
        self.norm_q = nn.LayerNorm(32)

    def forward(self, x):
        a = self.self_attn
        scores = a["q"](x) @ a["k"](x).mT / 32**0.5
        h = x + a["o"](scores.softmax(-1) @ a["v"](x))
        return h + self.ffn(h)


# ---- identity


def test_weights_and_activations_equal_the_golden_integers_exactly():
    weight_int8, weight_scales = quantise_weight(GOLDEN["weight"])
    x_int8, x_scales = quantise_rows(GOLDEN["x"])
    assert torch.equal(weight_int8, GOLDEN["weight_int8"])
    assert torch.equal(weight_scales, GOLDEN["weight_scales"])
    assert torch.equal(x_int8, GOLDEN["x_int8"])
    torch.testing.assert_close(x_scales, GOLDEN["x_scales"], rtol=1e-6, atol=0)


def test_the_layer_reproduces_the_golden_output():
    layer = Int8Linear(linear_of(GOLDEN["weight"], GOLDEN["bias"]))
    torch.testing.assert_close(layer(GOLDEN["x"]), GOLDEN["out"], rtol=0, atol=1e-5)


def test_every_weight_row_reaches_127():
    weight_int8, _ = quantise_weight(random_linear().weight)
    assert (weight_int8.abs().amax(1) == 127).all()


def test_saving_and_loading_is_exact():
    model, twin = Block(), Block()
    quantize_(model, "qkvo+ffn")
    names = quantize_(twin, "qkvo+ffn")
    twin.load_state_dict(load(save(model.state_dict())))
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        assert len(names) == 6 and torch.equal(model(x), twin(x))


# ---- behaviour: one word for kind and layers


def test_a_prefix_names_the_kind():
    model = Block()
    assert quantize_(model, "released:qkvo+ffn")
    assert model.ffn[0].released
    assert model.self_attn["q"].released
    assert type(model.cross_attn["q"]) is nn.Linear
    for kind in ("int4", "fp8"):
        with pytest.raises(ValueError, match=f"unknown kind '{kind}'; use int8 or released"):
            quantize_(Block(), f"{kind}:qkvo")


def test_the_layer_compiles_into_one_graph():
    layer = Int8Linear(random_linear())
    x = torch.randn(5, 64)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


# ---- limits


@pytest.mark.parametrize(
    "M, K, N",
    [(1, 64, 48), (16, 64, 48), (17, 64, 48), (5, 6, 7), (40, 3096, 8)],
)
def test_the_integer_product_is_exact_for_any_shape(M, K, N):
    a, b = random_integers(M, K, N)
    exact = (a.long()[:, None] * b.long()[None]).sum(-1)
    assert torch.equal(int_mm(a, b).long(), exact)
    assert torch.equal(int_mm_plain(a, b).long(), exact)


class OnGpu(torch.Tensor):
    """A tensor of this machine that says it is on a GPU: the way that is taken there can be walked here."""

    is_cpu = False
    is_cuda = True

    @property
    def device(self):
        return torch.device("cuda")


@pytest.mark.parametrize("K, N", [(64, 48), (6, 48), (64, 7), (3096, 8)])
@pytest.mark.parametrize("M", [1, 15, 16, 17, 40])
def test_on_a_gpu_int_mm_is_given_only_what_it_takes_there(monkeypatch, M, K, N):
    """More than 16 rows, K and N in multiples of 8; whatever is padded, the product stays the plain one."""
    product = torch._int_mm
    taken = []

    def picky(a, b):
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
        taken.append(tuple(a.shape))
        return product(a, b)

    monkeypatch.setattr(torch, "_int_mm", picky)
    a, b = random_integers(M, K, N)
    out = int_mm(a.as_subclass(OnGpu), b.as_subclass(OnGpu))
    out = out.as_subclass(torch.Tensor)
    assert torch.equal(out.long(), a.long() @ b.long().t())
    rows = M if M > 16 else 32
    fits = K % 8 == 0 and N % 8 == 0
    assert taken == ([(rows, K)] if fits else [])


def test_a_single_row_still_works():
    layer = Int8Linear(random_linear())
    x = torch.randn(20, 64)
    # a token never depends on its neighbours
    torch.testing.assert_close(layer(x[3:4]), layer(x)[3:4])
    assert layer(x.view(4, 5, 64)).shape == (4, 5, 48)
    assert layer(x[0]).shape == (48,)


def test_an_all_zero_token_gives_the_bias():
    linear = random_linear()
    y = Int8Linear(linear)(torch.zeros(3, 64))
    torch.testing.assert_close(y, linear.bias.expand(3, 48))


def test_a_layer_without_bias_and_an_outlier_token_are_fine():
    torch.manual_seed(1)
    linear = linear_of(torch.randn(48, 64), None)
    size = torch.tensor([1e-4, 1, 1, 1, 1, 1e4])
    x = torch.randn(6, 64) * size[:, None]
    exact = linear(x)
    error = Int8Linear(linear)(x) - exact
    assert (
        error.norm(dim=1) / exact.norm(dim=1)
    ).max() < 0.02  # scales are per token: the outlier hurts nobody


# ---- reference


def test_int8_matches_official_in_its_rounding_mode():
    layer = Int8Linear(linear_of(GOLDEN["weight"], GOLDEN["bias"]), released=True)
    truncated, _ = quantise_rows(GOLDEN["x"], released=True)
    divided = GOLDEN["x"] / GOLDEN["x_scales"][:, None]
    divided = divided.trunc().to(torch.int8)
    assert (divided != GOLDEN["x_int8"]).sum() == 808  # of 1632

    # the kernel's x·(127/a) and x/(a/127) part only at 127 itself
    size = GOLDEN["x"].abs()
    below = size != size.amax(1, keepdim=True)
    assert (truncated == divided)[below].all()
    assert torch.equal(layer.weight_scales, GOLDEN["weight_scales"].bfloat16().float())

    # (product·s_x)·s_w -> bf16, then the bias
    product = truncated.float() @ GOLDEN["weight_int8"].float().t()
    y = product * GOLDEN["x_scales"][:, None] * layer.weight_scales
    y = y.bfloat16() + GOLDEN["bias"].bfloat16()
    assert torch.equal(layer(GOLDEN["x"]), y.float())


def test_true_rounding_is_closer():
    linear = linear_of(GOLDEN["weight"], None)
    exact = GOLDEN["x"] @ GOLDEN["weight"].t()
    ours = relative_error(Int8Linear(linear)(GOLDEN["x"]), exact)
    released = relative_error(Int8Linear(linear, released=True)(GOLDEN["x"]), exact)
    assert ours < 0.009 and released > 1.5 * ours, (ours, released)


# ---- behaviour


def test_the_error_on_gaussian_data_lies_in_its_band():
    linear = random_linear(256, 256)
    x = torch.randn(200, 256)
    y = linear(x).detach()
    assert 0.005 < relative_error(Int8Linear(linear)(x), y) < 0.02


def test_the_error_is_as_large_as_expected_and_never_above_its_bound():
    linear = random_linear(256, 256)
    x = torch.randn(200, 256)
    y = linear(x).detach()
    y_hat = Int8Linear(linear)(x)
    assert abs(sqnr(y_hat, y) - expected_sqnr(x, linear.weight.detach())) < 0.3

    # rows made for the worst: every entry lies half way between two integers
    worst = torch.full((4, 64), 0.5)
    worst[:, 0] = 127.0
    bad = linear_of(worst, None)
    for layer, rows in ((linear, x), (bad, worst)):
        error = (Int8Linear(layer)(rows) - layer(rows)).detach().abs()
        assert (error <= error_bound(rows, layer.weight.detach()) + 1e-4).all()


def test_only_q_k_v_o_are_converted():
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])})
    names = quantize_(model)
    assert names == [f"blocks.{i}.self_attn.{n}" for i in (0, 1) for n in "qkvo"]
    converted = {n for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    assert converted == set(names)


@pytest.mark.parametrize(
    "which, count", [("qkvo", 4), ("cross", 4), ("qkvo+cross", 8), ("ffn", 2), ("all", 12)]
)  # of one block
def test_each_choice_of_layers_means_what_it_says(which, count):
    parts = {"blocks": nn.ModuleList([Block()]), "head": nn.Linear(2, 2)}
    assert len(chosen(nn.ModuleDict(parts), which)) == count


def test_weights_take_a_quarter_of_fp32():
    model = Block()
    before = sum(model.self_attn[n].weight.nbytes for n in "qkvo")
    quantize_(model)
    assert sum(model.self_attn[n].weight_int8.nbytes for n in "qkvo") * 4 == before
    kept = [*model.self_attn.parameters(), *model.self_attn.buffers()]  # scales and bias included
    assert sum(tensor.nbytes for tensor in kept) < 0.33 * before


def test_casting_the_model_to_bf16_leaves_scales_and_weights_alone():
    model = Block()
    quantize_(model)
    before = {k: v.clone() for k, v in model.state_dict().items() if "weight_" in k}
    model.bfloat16()
    after = model.state_dict()
    assert len(before) == 8
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with torch.no_grad():
        assert model(torch.randn(2, 9, 32).bfloat16()).dtype == torch.bfloat16


# ---- bad input


def test_wrong_requests_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="qkvo, cross, ffn, all"):
        quantize_(Block(), "attention")
    with pytest.raises(ValueError, match="int8 or released"):
        quantize_(Block(), kind="int4")
    model = Block()
    quantize_(model)
    with pytest.raises(ValueError, match="left to convert"):
        quantize_(model)
    with pytest.raises(ValueError, match="no gradient"):
        model.self_attn["q"](torch.randn(2, 32, requires_grad=True))


# ---- CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_cuda_equals_cpu(rows):
    linear = random_linear(256, 128)
    x = torch.randn(rows, 256)
    on_cpu = Int8Linear(linear)(x)
    on_gpu = Int8Linear(linear).cuda()(x.cuda()).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-5, atol=1e-5)
