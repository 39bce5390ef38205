"""What bench.py promises."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import dit
import moe
import vae
from engine.parts import Options, vae_config
from lab import bench, plain

RESULTS = Path(__file__).resolve().parents[1] / "results"


def attention_flops(query: list, key: list, value: list, *args: object, **more: object) -> int:
    return sdpa_flop_count(query, key, value)  # of shapes


def counter() -> FlopCounterMode:
    """Torch's own counter knows attention on GPUs alone."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: attention_flops})


def test_flop_formulas_give_905_tf() -> None:
    exact, released, decode = bench.segment_flops(Options(preset="5b"))
    assert (
        abs(released / 1e12 - 905.5) < 0.5 and 0 < exact / 1e12 - 807.7 < 0.7
    )  # + text K and V, per segment
    assert abs(decode / 1e12 - 663.5) < 0.2
    assert abs(bench.segment_flops(Options(preset="5b", decoder="light75"))[2] / 1e12 - 41.86) < 0.1
    faster = bench.exact_reuse(bench.total(bench.costs_of(Options(preset="5b"))), 3)
    assert 905.5 / faster == pytest.approx(807.7, rel=1e-3)
    parts = bench.dit_flops(dit.PRESETS["5b"], 880)
    for part, tf in (
        ("self-attention", 103.06),
        ("feed-forward", 88.36),
        ("camera", 37.87),
        ("time", 2.24),
        ("rays", 1.26),
    ):
        assert parts[part][2] / 1e12 == pytest.approx(tf, rel=5e-3), part


@pytest.mark.parametrize("preset", ["micro", "tiny"])
@torch.no_grad()
def test_flop_formulas_count_what_the_modules_do(preset: str) -> None:
    model = moe.build(preset)
    context, places = dit.random_context(model.cfg), 16
    with counter() as once:
        prepared = model.prepare(context)
    with counter() as step:
        model(torch.randn(1, model.cfg.in_dim, 10, 8, 8), torch.tensor([0.5]), context, prepared)
    ours = [
        sum(column) for column in zip(*bench.dit_flops(model.cfg, places).values(), strict=True)
    ]
    assert once.get_total_flops() == pytest.approx(ours[0], rel=0.01)
    assert step.get_total_flops() == pytest.approx(ours[1], rel=0.01)
    net = vae.VAE(vae_config(preset, "light50"))
    z = torch.randn(1, model.cfg.in_dim, 1, 8, 8)
    state = net.decode_stream(z)[1]
    with counter() as decode:
        net.decode_stream(z, state)
    assert decode.get_total_flops() == pytest.approx(bench.vae_flops(net.cfg, 8, 8), rel=0.01)


def test_bench_writes_the_table_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bench.main(
        [
            "--preset",
            "5b",
            "--suite",
            "model",
            "--decoder",
            "light75",
            "--out",
            str(tmp_path),
        ]
    )
    printed, saved = (
        capsys.readouterr().out,
        json.loads((tmp_path / "bench-5b-model.json").read_text()),
    )
    assert saved["command"] in printed
    assert {"commit", "machine", "versions", "weights"} <= saved.keys()
    rows = {row[0]: row[2] for row in saved["rows"]}
    assert (
        rows["TF to denoise"] == pytest.approx(808.3, abs=0.1)
        and "\n".join(saved["table"]) + "\n" == printed
        and "threads" in printed
    )
    assert (
        rows["FPS on 1 H200, projected"]
        < rows["FPS on 2 H200, projected"]
        < rows["FPS on 9 H200, projected"]
    )


def rows_of(suite: str, out: Path, rounds: int = 2) -> dict[str, list]:
    """A suite of the smallest model, by what its rows are about."""
    words = ["--preset", "micro", "--suite", suite, "--rounds", str(rounds)]
    bench.main([*words, "--out", str(out)])
    stored = json.loads((out / f"bench-micro-{suite}.json").read_text())
    return {row[0].split(":")[0]: row for row in stored["rows"]}


def test_bench_ladder_keeps_the_exact_row_exact(tmp_path: Path) -> None:
    rows = rows_of("ladder", tmp_path)
    assert rows["as released"][4] == 0
    assert rows["exact reuse"][4] < 1e-5
    assert rows["exact reuse"][2] > 1
    assert rows["5 new"][4] is None
    assert rows["fast"][4] < 0.3


@pytest.mark.long
def test_bench_ablation_says_what_int8_costs_in_quality(tmp_path: Path) -> None:
    rows = rows_of("ablation", tmp_path, rounds=1)  # its times are not asked for
    for name in ("slow projections", "bfloat16", "all layers"):
        assert 1e-5 < rows[f"− INT8, {name}"][4] < 0.3


def test_every_quantity_is_of_one_suite() -> None:
    tables = {}
    for path in sorted(RESULTS.glob("bench-tiny-*.json")):
        rows = json.loads(path.read_text())["rows"]
        tables[path.stem] = {row[0].split(":")[0] for row in rows}
    assert len(tables) == 4
    assert len(set.union(*tables.values())) == sum(map(len, tables.values()))


def test_a_misspelt_suite_is_guessed() -> None:
    with pytest.raises(ValueError, match="did you mean ladder"):
        bench.main(["--suite", "lader"])


# ---- cost


def counted(run):
    """Multiply-adds, twice, of every module inside a call, and of the whole call under "Global"."""
    with torch.no_grad(), counter() as count:
        run()
    return {name: sum(ops.values()) for name, ops in count.get_flop_counts().items()}


def matching(counts, pattern):
    return sum(flops for name, flops in counts.items() if re.fullmatch(pattern, name))


@pytest.mark.parametrize("memory, past, new, size", [(5, 4, 10, 8), (0, 1, 14, 4)])
@pytest.mark.parametrize("preset", ["micro", "tiny"])
def test_the_cost_of_a_step_is_what_its_modules_count(preset, memory, past, new, size):
    model = dit.DiT(dit.PRESETS[preset])
    c = model.cfg
    context = dit.random_context(c, 1, memory, past, new, size)
    x = torch.randn(1, c.in_dim, new, size, size)
    parts = bench.dit_flops(c, size**2 // 4, memory + past, new)
    once = counted(lambda: model.prepare(context))
    prepared = model.prepare(context)
    step = counted(lambda: model(x, torch.tensor([0.5]), context, prepared))
    assert once["Global"] == sum(part[0] for part in parts.values())
    assert step["Global"] == sum(part[1] for part in parts.values())

    blocks = matching(step, r"DiT\.blocks\.\d+")
    qkvo = matching(step, r".*\.self_attn\.[qkvo]")
    ffn = matching(step, r".*\.ffn")
    actions = matching(step, r".*\.action_model")
    assert parts["self-attention qkvo"][1] == qkvo
    assert parts["feed-forward"][1] == ffn
    assert parts["actions"][1] == actions
    assert parts["self-attention"][1] + parts["text attention"][1] == blocks - qkvo - ffn - actions
    # what is left of the text's attention are the products of its queries with the words
    words = matching(step, r".*\.cross_attn\.[qo]")
    queries = words // (4 * c.dim**2)
    assert parts["text attention"][1] == words + 4 * queries * c.text_len * c.dim
    assert parts["time"][1] + parts["patches, head"][1] == step["Global"] - blocks


def test_the_released_cost_is_that_of_a_network_that_answers_for_every_token():
    """With actions in every block the last one asks for all tokens, too; once and step then add up
    to the release."""
    c = dit.PRESETS["micro"]
    every = bench.dit_flops(replace(c, action_blocks=tuple(range(c.layers))), 16)
    L = 16 * 19
    for name, (once, step, released) in every.items():
        if name == "time":  # a row for every token instead of two
            assert released * 2 == step * L
        elif name == "patches, head":  # the head for all latents, not for new ones only
            assert (released - once - step) * 19 == released // 2 * 9
        else:
            assert released == once + step, name


@pytest.mark.parametrize("size", [(8, 8), (4, 6)])
@pytest.mark.parametrize("kind", ["full", "light50", "light75"])
@pytest.mark.parametrize("preset", ["micro", "tiny"])
def test_the_cost_of_decoding_is_what_its_modules_count(preset, kind, size):
    full = vae.PRESETS[preset]
    net = vae.VAE(
        full if kind == "full" else vae.pruned(full, int(kind.removeprefix("light")) / 100)
    )
    z = torch.randn(1, net.cfg.z_dim, 1, *size)
    with torch.no_grad():
        state = net.decode_stream(z)[1]
    assert counted(lambda: net.decode_stream(z, state))["Global"] == bench.vae_flops(net.cfg, *size)


# ---- the plain form


@torch.no_grad()
@pytest.mark.parametrize("preset", ["micro", "tiny"])
def test_the_plain_form_of_a_network_gives_the_same_velocities(preset):
    torch.manual_seed(0)
    for quirks in ({}, {"rays_at_input": False, "fp32_stream": True}):
        model = dit.DiT(replace(dit.PRESETS[preset], **quirks))
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        context = dit.random_context(model.cfg, 2, size=4)
        x = torch.randn(2, model.cfg.in_dim, 10, 4, 4)
        sigma = torch.tensor([0.9, 0.3])
        ours = model(x, sigma, context, model.prepare(context))
        apart = bench.relative_error(plain.velocity(model, x, sigma, context), ours)
        assert apart < 1e-5


def test_bench_plain_says_how_much_faster_we_are(tmp_path, monkeypatch):
    small = dit.PRESETS["micro"]
    monkeypatch.setattr(bench, "wider", lambda options: [("micro", small, 8)])
    (row,) = rows_of("plain", tmp_path).values()
    assert row[3] > 1
    assert row[4] < 1e-5


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="--rounds must be 1 or more, got 0"):
        bench.main(["--suite", "plain", "--rounds", "0"])
