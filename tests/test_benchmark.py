"""benchmark.py: what it counts, that its rows are the same network, its table, and what it refuses."""

import json
import re
import statistics
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import benchmark
import libs.training.speed as benchmark_measure
from libs.training.speed import (NAIVE, OURS, build, inputs_of, make_update, measure_samplers, operations,
                               operations_by_kind)
from libs.training.other_unets import OTHERS, build_other, fit, parameters
from helpers import Place, one_line
from libs import RunError, UsageError, load_config
from libs.blocks import CrossAttention
from libs.unet import UNet

CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture
def config(place):
    return benchmark.load(str(place.config), [])


@pytest.fixture
def call(monkeypatch):
    """call(arguments): main() of benchmark.py in this process."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
        return benchmark.main()
    return call


# ---- operations

def test_operations_of_a_convolution_and_a_matrix():
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5 * 8 * 8, 7)

        def forward(self, x):
            return self.linear(self.conv(x).flatten(1))

    conv, linear = 2 * (3 * 3 * 3) * 5 * 8 * 8, 2 * 5 * 8 * 8 * 7
    forward, both = operations(Toy(), torch.zeros(4, 3, 8, 8))
    # back through the matrix to weights and input, through the first layer to its weights alone
    assert forward == conv + linear and both == 2 * conv + 3 * linear


def test_operations_by_kind():
    """A convolution, a linear layer and attention, counted by hand."""
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            q = self.linear(self.conv(x).flatten(2).transpose(1, 2))[:, None]
            return F.scaled_dot_product_attention(q, q, q)

    forward, backward = operations_by_kind(Network(), torch.zeros(2, 3, 5, 5))
    assert forward == {"convolutions": 2 * 25 * 9 * 3 * 8, "linear layers": 2 * 25 * 8 * 8, "attention": 4 * 25 * 25 * 8}
    # with respect to weights and input, but of the first layer's weights alone
    assert backward == {kind: n * (1 if kind == "convolutions" else 2) for kind, n in forward.items()}


def test_operations_of_attention_whatever_the_kernel():
    L, dim, M, width = 16, 8, 3, 6
    fused = F.scaled_dot_product_attention
    inputs = torch.zeros(5, L, dim), torch.zeros(5, M, width)
    forward, both = operations(CrossAttention(dim, width, num_heads=2), *inputs)
    queries, keys, attention = 2 * L * dim * dim, 2 * M * width * dim, 2 * L * M * dim
    assert forward == 2 * queries + 2 * keys + 2 * attention
    assert both == (2 + 3) * queries + 2 * 2 * keys + 3 * 2 * attention
    assert F.scaled_dot_product_attention is fused


def test_the_written_out_attention_is_attention():
    q, k, v = torch.randn(3, 2, 4, 10, 6, dtype=torch.float64)
    assert torch.allclose(benchmark_measure.written_out_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


# ---- training

def test_all_ways_to_train_make_the_same_update(place, monkeypatch):
    """Layout, attention, optimizer and the parts of a batch differ in speed alone."""
    # two channels a group: of one alone, the normalization would take away what a bias adds
    config, moved = benchmark.load(str(place.config), ["model.dim=16"]), []
    for way, accumulate in ((OURS, 1), (OURS, 2), (NAIVE, 1)):
        config["train_cfg"].update(accumulate=accumulate, optimizer="muon")
        with monkeypatch.context() as patch:
            if way == NAIVE:
                patch.setattr(F, "scaled_dot_product_attention", benchmark_measure.written_out_attention)
            model = build(config, way)
            # with one token of context the attention to it is 1: these have no gradient
            weights = [p for name, p in model.model.named_parameters()
                       if not any(word in name for word in ("attn2.to_q", "attn2.to_k", "norm2"))]
            before = [p.detach().clone() for p in weights]
            patch.setattr(torch, "randn_like", torch.ones_like)  # the noise
            update, dtype, _ = make_update(model, config, way == NAIVE, CPU)
            update()
        assert dtype == torch.float32
        moved.append(torch.cat([(p.detach() - b).flatten() for p, b in zip(weights, before)]))
    whole, *others = moved
    assert whole.abs().mean() > 1e-5
    assert all((other - whole).norm() < 1e-3 * whole.norm() for other in others)


# ---- sampling

@pytest.mark.parametrize("settings", [["sample_cfg.steps=4"],
                                      ["model_name=EDM", "model.label_dropout=0.1", "sample_cfg.guidance_scale=2"]])
@pytest.mark.parametrize("seconds", [0, 1e9])
def test_samplers_are_scaled_to_all_of_their_calls(place, monkeypatch, settings, seconds):
    """With a clock that counts network calls, an image takes as long as it needs calls, stopped early or not."""
    config = benchmark.load(str(place.config), settings)
    calls, forward = [0], UNet.forward

    def counted(self, x, label, time):
        calls[0] += len(x) / config["loader"]["batch_size"]
        return forward(self, x, label, time)

    monkeypatch.setattr(UNet, "forward", counted)
    monkeypatch.setattr(benchmark_measure, "now", lambda device: calls[0])
    monkeypatch.setattr(benchmark_measure, "matmul_rate", lambda device, dtype: (1.0, 1))
    rows = measure_samplers(config, seconds, CPU)
    model = build(config)
    assert set(rows) == set(model.SAMPLERS)
    guided = 2 if "model_name=EDM" in settings else 1
    for sampler, row in rows.items():
        assert row["calls"] == guided * (2 * row["steps"] - 1 if sampler == "heun" else row["steps"])
        assert row["images_per_s"] == pytest.approx(config["loader"]["batch_size"] / row["calls"])
        assert row["whole"] == (seconds > 0)
    assert rows["heun"]["operations"] / rows["heun"]["calls"] == rows["euler"]["operations"] / rows["euler"]["calls"]
    if guided == 1:
        assert rows["ddim"]["steps"] == 4 and rows["ddpm"]["steps"] == 10


# ---- other people's networks

@pytest.mark.parametrize("path", ["./configs/mnist.yaml", "./configs/mnist_cpu.yaml"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_have_as_many_parameters(name, path):
    pytest.importorskip(OTHERS[name].package.replace("-", "_"), reason="see requirements-extra.txt")
    config = load_config(path)
    ours = build(config).model
    how, n = fit(name, ours, config["model"])
    other = build_other(name, ours, config["model"], how)
    assert parameters(other) == n and abs(n / parameters(ours) - 1) <= 0.05 and how["width"] % 4 == 0
    x = torch.randn(2, 1, 28, 28)
    assert other(x, torch.tensor([0, 9]), torch.tensor([0, 999])).shape == x.shape
    # the same attention: each of our self-attentions costs L x L products of its width, and theirs are there too
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention",
                      lambda q, k, v, **_: sizes.append((q.shape[2], k.shape[2])) or v[:, :, :1].expand_as(q))
        ours(x, torch.tensor([0, 9]), torch.tensor([0, 999]))
        mine = {lengths for lengths in sizes if lengths[1] > 1}
        sizes.clear()
        other(x, torch.tensor([0, 9]), torch.tensor([0, 999]))
    # lucidrains adds four keys of its own
    theirs = {(q, k if k in (q, 1) else k - 4) for q, k in sizes if k > 1}
    assert theirs == mine


def test_a_missing_package_is_named_and_the_rest_goes_on(config, monkeypatch, capsys):
    for module in ("diffusers", "denoising_diffusion_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    assert benchmark.others(config) == {}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(OTHERS)
    assert all(f"`pip install {other.package}`" in line for line, other in zip(lines, OTHERS.values()))


# ---- the command

def test_the_whole_table(place, call, capsys, monkeypatch):
    arguments = [place.config, "--seconds", "0.01", "--json", place.root / "a.json"]
    call(*arguments, "--rounds", "1")
    out = capsys.readouterr().out
    assert "1 rounds of 3 measurements" in out and "\n|-" in out
    figures = json.loads((place.root / "a.json").read_text())
    assert figures["command"].startswith("benchmark.py ") and torch.__version__ in figures["machine"]
    rows = {row["row"]: row for row in figures["rows"]}
    assert list(rows) == [OURS, NAIVE, *build(benchmark.load(str(place.config), [])).SAMPLERS]
    for name, row in rows.items():
        assert len(row["rounds"]) == 1 and 0 < row["images_per_s"] == row["rounds"][0]["images_per_s"]
        assert row["share"] == pytest.approx(row["images_per_s"] * row["operations"] / row["matmul_rate"])
        assert 0 < row["share"] < 1 and 2 ** 26 < row["peak_memory"] < 2 ** 33
        assert re.search(rf"\| {name},.* \|", out)
    ours, naive = rows[OURS], rows[NAIVE]
    assert ours["operations"] == naive["operations"] and ours["parameters"] == naive["parameters"]
    assert naive["images_per_s_ratio"] == pytest.approx(ours["images_per_s"] / naive["images_per_s"])
    assert f"{naive['images_per_s_ratio']:.2f} x images/s, {naive['peak_memory_ratio']:.2f} x memory" in out

    with pytest.raises(UsageError) as error:
        call(*arguments)
    assert "a.json" in one_line(error) and "--overwrite" in one_line(error)


def test_medians_are_of_the_rounds_and_ratios_of_pairs():
    def figures(*speeds):
        return [{"images_per_s": s, "peak_memory": 10 * s, "operations": 2.0, "matmul_rate": 100.0, "dtype": "float32"}
                for s in speeds]
    results = {("a", OURS): figures(4, 6, 20), ("a", NAIVE): figures(1, 3, 4), ("b", OURS): figures(7, 8, 9)}
    rows = list(benchmark.summary(results))
    assert [row["images_per_s"] for row in rows] == [6, 3, 8]
    assert rows[1]["images_per_s_ratio"] == statistics.median([4, 2, 5]) == rows[1]["peak_memory_ratio"]
    assert rows[0]["share"] == pytest.approx(0.12) and "images_per_s_ratio" not in rows[0] | rows[2]


def test_profile(place, call, capsys):
    call(place.config, "--profile")
    heading, update, *lines = capsys.readouterr().out.splitlines()
    kinds, matmul, operators = lines[:4], lines[4], lines[5:]
    assert "batch 2" in heading and "on cpu" in update and "GFLOP/s" in matmul and len(operators) == 10
    shares = [float(line.split("%")[0]) for line in operators]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100
    assert any("convolution" in line for line in operators)
    assert sum(float(line.split("%")[0]) for line in kinds) == pytest.approx(100, abs=0.3)
    work = [float(line.split(": ")[1].split(" GFLOP")[0]) for line in kinds[:3]]  # rounded to 0.1
    model = benchmark.build(benchmark.load(place.config, []))
    assert sum(work) == pytest.approx(2 * operations(model.model, *inputs_of(model))[1] / 1e9, abs=0.16)


@pytest.mark.parametrize("arguments, says", [
    (["no.yaml"], ["no file no.yaml"]),
    (["CONFIG", "--set", "model.dimm=8"], ["model.dimm", "did you mean model.dim"]),
    (["CONFIG", "--set", "model.dim=12"], ["model.dim", "multiple of 8"]),
    (["CONFIG", "--rounds", "0"], ["--rounds", "0 is too few"]),
    (["CONFIG", "--seconds", "0"], ["--seconds", "0 is no time above 0"]),
    (["CONFIG", "--seconds", "nan"], ["--seconds", "nan"]),
    (["CONFIG", "--json", "a.txt"], ["--json", "a.txt", ".json"]),
    (["CONFIG", "--json", "no/such/a.json"], ["--json", "no/such"]),
    (["CONFIG", "--json", "a.json", "--profile"], ["--json", "--profile"]),
    (["CONFIG", "--compare", "--profile"], ["--compare", "--profile"]),
    (["CONFIG", "--updates", "4"], ["--updates"]),
])
def test_mistakes(place, call, monkeypatch, arguments, says):
    monkeypatch.setattr(benchmark, "in_a_process", lambda *_: pytest.fail("measured all the same"))
    with pytest.raises(UsageError) as error:
        call(*(place.config if a == "CONFIG" else a for a in arguments))
    assert all(words in one_line(error) for words in says)


def test_what_goes_wrong_in_a_process_is_one_line(place, call, monkeypatch):
    monkeypatch.setattr(benchmark, "__file__", str(place.root / "no.py"))
    with pytest.raises(RunError) as error:
        call(place.config)
    assert OURS in one_line(error) and "no.py" in one_line(error)
