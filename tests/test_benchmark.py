"""benchmark.py: what it counts, that its rows are the same network, its table, and bad input."""

import json
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import benchmark
import libs.training.speed as speed
from helpers import Place, one_line
from libs import RunError, UsageError, load_config
from libs.models import samplers_of
from libs.training.other_unets import OTHERS, build_other, nearest_width, parameters
from libs.training.speed import NAIVE, OURS, build, make_update, measure_samplers, operations, operations_by_kind
from libs.unet import UNet
from scripts import command

CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_operations():
    """A convolution, a linear layer and attention, counted by hand."""
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            q = self.linear(self.conv(x).flatten(2).transpose(1, 2))[:, None]
            return F.scaled_dot_product_attention(q, q, q)

    fused = F.scaled_dot_product_attention
    forward, backward = operations_by_kind(Network(), torch.zeros(2, 3, 5, 5))
    assert forward == {"convolutions": 2 * 25 * 9 * 3 * 8, "linear layers": 2 * 25 * 8 * 8,
                       "attention": 4 * 25 * 25 * 8}
    # with respect to weights and input, but of the first layer's weights alone
    assert backward == {kind: n * (1 if kind == "convolutions" else 2) for kind, n in forward.items()}
    assert F.scaled_dot_product_attention is fused
    q, k, v = torch.randn(3, 2, 4, 10, 6, dtype=torch.float64)
    right = F.scaled_dot_product_attention(q, k, v)
    with speed.written_out_attention():
        assert torch.allclose(F.scaled_dot_product_attention(q, k, v), right)


def test_training_and_naive_training_make_the_same_update(place, monkeypatch):
    """Layout, attention, optimizer and the parts of a batch differ in speed alone."""
    # two channels a group: of one alone, the normalization would take away what a bias adds
    config, moved = benchmark.load(str(place.config), ["model.dim=16", "train_cfg.optimizer=muon"]), []
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)  # the noise
    for kind, accumulate in ((OURS, 1), (OURS, 2), (NAIVE, 1)):
        config["train_cfg"]["accumulate"] = accumulate
        model = build(config, kind)
        # with one token of context the attention to it is 1: these have no gradient
        weights = [p for name, p in model.model.named_parameters()
                   if not any(word in name for word in ("attn2.to_q", "attn2.to_k", "norm2"))]
        before = [p.detach().clone() for p in weights]
        update, dtype, _ = make_update(model, config, kind == NAIVE, CPU)
        update()
        assert dtype == torch.float32
        moved.append(torch.cat([(p.detach() - b).flatten() for p, b in zip(weights, before)]))
    whole, *others = moved
    assert whole.abs().mean() > 1e-5
    assert all((other - whole).norm() < 1e-3 * whole.norm() for other in others)


@pytest.mark.parametrize("settings, seconds", [
    (["sample_cfg.steps=4"], 0),
    (["sample_cfg.steps=4"], 1e9),
    (["model_name=EDM", "model.label_dropout=0.1", "sample_cfg.guidance_scale=2"], 0),
])
def test_samplers_are_scaled_to_all_of_their_calls(place, monkeypatch, settings, seconds):
    """With a clock that counts network calls, an image takes as long as it needs calls, stopped early or not."""
    config = benchmark.load(str(place.config), settings)
    calls, forward = [0], UNet.forward

    def counted(self, x, label, time):
        calls[0] += len(x) / config["loader"]["batch_size"]
        return forward(self, x, label, time)

    monkeypatch.setattr(UNet, "forward", counted)
    monkeypatch.setattr(speed, "now", lambda device: calls[0])
    monkeypatch.setattr(speed, "matmul_rate", lambda device, dtype: {"matmul_rate": 1.0, "matmul_n": 1})
    rows = measure_samplers(config, seconds, CPU)
    assert list(rows) == samplers_of(build(config))
    guided = 2 if "model_name=EDM" in settings else 1
    for sampler, row in rows.items():
        assert row["calls"] == guided * (2 * row["steps"] - 1 if sampler == "heun" else row["steps"])
        assert row["images_per_s"] == pytest.approx(config["loader"]["batch_size"] / row["calls"])
        assert row["whole"] == (seconds > 0)
    assert rows["heun"]["operations"] / rows["heun"]["calls"] == rows["euler"]["operations"] / rows["euler"]["calls"]
    if guided == 1:
        assert rows["ddim"]["steps"] == 4 and rows["ddpm"]["steps"] == 10


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "diffusers"])  # it differs in one number
def test_other_networks_have_as_many_parameters_and_the_attention_they_name(name):
    pytest.importorskip(OTHERS[name].package.replace("-", "_"), reason="see requirements-extra.txt")
    config = load_config("configs/mnist.yaml")
    ours = build(config).model
    other = build_other(name, ours, config["model"], nearest_width(name, ours, config["model"]))
    assert abs(parameters(other) / parameters(ours) - 1) < 0.05
    x, label, time = torch.randn(2, 1, 28, 28), torch.tensor([0, 9]), torch.tensor([0, 999])
    assert other(x, label, time).shape == x.shape
    sizes = []  # of queries and keys
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention",
                      lambda q, k, v, **_: sizes.append((q.shape[2], k.shape[2])) or v[:, :, :1].expand_as(q))
        ours(x, label, time)
        wanted = {lengths for lengths in sizes if lengths[1] > 1}
        assert {q for q, _ in wanted} == {28 ** 2, 14 ** 2, 7 ** 2}
        sizes.clear()
        other(x, label, time)
    if name == "lucidrains, as it comes":
        wanted = {(7 ** 2, 7 ** 2)}
        assert len(sizes) == 3  # of the innermost level's encoder and decoder, and in the middle
    # lucidrains adds four keys of its own
    assert {(q, k if k in (q, 1) else k - 4) for q, k in sizes if k > 1} == wanted


def test_a_missing_package_is_named_and_the_rest_goes_on(place, monkeypatch, capsys):
    for module in ("diffusers", "denoising_diffusion_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    assert benchmark.other_widths(benchmark.load(str(place.config), [])) == {}
    lines = capsys.readouterr().out.splitlines()
    assert all(f"`pip install {other.package}`" in line for line, other in zip(lines, OTHERS.values(), strict=True))


def test_the_table(place, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure_apart", lambda path, kind, width, args: speed.measure(
        benchmark.load(path, args.set), kind, width, args.seconds))
    monkeypatch.setattr(speed, "matmul_rate", lambda *_: {"matmul_rate": 1e12, "matmul_n": 2048})
    arguments = [str(place.config), "--seconds", "0.01", "--rounds", "1", "--json", str(place.root / "a.json")]
    benchmark.main(arguments)
    out = capsys.readouterr().out
    assert "1 rounds of 3 measurements" in out and "\n|-" in out
    figures = json.loads((place.root / "a.json").read_text())
    assert figures["command"].startswith("benchmark.py ") and torch.__version__ in figures["machine"]
    rows = {row["row"]: row for row in figures["rows"]}
    assert list(rows) == [OURS, NAIVE, "ddpm", "ddim", "heun", "euler", "euler_ancestral", "dpmpp_2m"]
    for name, row in rows.items():
        assert len(row["rounds"]) == 1 and 0 < row["images_per_s"] == row["rounds"][0]["images_per_s"]
        assert row["share"] == pytest.approx(row["images_per_s"] * row["operations"] / row["matmul_rate"])
        assert 0 < row["share"] < 1 and 2 ** 26 < row["peak_memory"] < 2 ** 33
        assert f"| tiny.yaml: {name} |" in out
    ours, naive = rows[OURS], rows[NAIVE]
    assert ours["operations"] == naive["operations"] and ours["parameters"] == naive["parameters"]
    assert naive["images_per_s_ratio"] == pytest.approx(ours["images_per_s"] / naive["images_per_s"])
    assert f"{naive['images_per_s_ratio']:.2f} x images/s, {naive['peak_memory_ratio']:.2f} x memory" in out
    with pytest.raises(UsageError, match="a.json exists.*--overwrite"):
        benchmark.main(arguments)


def test_a_row_is_measured_in_a_process_of_its_own(place, monkeypatch):
    args = benchmark.parse_args([str(place.config), "--seconds", "0.01", "--set", "loader.batch_size=3"])

    def run(arguments, **_):
        ended = command(*arguments[1:], cwd=place.root)
        return SimpleNamespace(returncode=ended.status, stdout=ended.out, stderr=ended.err)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark.subprocess, "run", run)
        figures, = benchmark.measure_apart(str(place.config), OURS, None, args).values()
    assert figures["images_per_s"] > 0 and figures["dtype"] == "float32"
    monkeypatch.setattr(benchmark, "__file__", str(place.root / "no.py"))
    with pytest.raises(RunError) as error:
        benchmark.measure_apart(str(place.config), OURS, None, args)
    assert OURS in one_line(error) and "no.py" in one_line(error)


def test_medians_are_of_the_rounds_and_ratios_of_pairs():
    def figures(*speeds):
        return [{"images_per_s": s, "peak_memory": 10 * s, "operations": 2.0, "matmul_rate": 100.0, "dtype": "float32"}
                for s in speeds]
    results = {("a", OURS): figures(4, 6, 20), ("a", NAIVE): figures(1, 3, 4), ("b", OURS): figures(7, 8, 9)}
    rows = list(benchmark.summary(results))
    assert [row["images_per_s"] for row in rows] == [6, 3, 8]
    assert rows[1]["images_per_s_ratio"] == statistics.median([4, 2, 5]) == rows[1]["peak_memory_ratio"]
    assert rows[0]["share"] == pytest.approx(0.12) and "images_per_s_ratio" not in rows[0] | rows[2]


def test_profile(place, capsys):
    benchmark.main([str(place.config), "--profile"])
    heading, update, *kinds, matmul = capsys.readouterr().out.splitlines()[-7:]
    assert "batch 2" in heading and "on cpu" in update and "matrices of 2048" in matmul
    assert sum(float(line.split("%")[0]) for line in kinds) == pytest.approx(100, abs=0.3)
    work = [float(line.split(": ")[1].split(" GFLOP")[0]) for line in kinds[:3]]  # rounded to 0.1
    model = build(benchmark.load(str(place.config), []))
    assert sum(work) == pytest.approx(2 * operations(model)[1] / 1e9, abs=0.16)


def test_bad_input(place, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_apart", lambda *_: pytest.fail("measured all the same"))
    for arguments, message in ((["no.yaml"], "no file no.yaml"), (["--set", "model.dimm=8"], "did you mean model.dim"),
                               (["--set", "model.dim=12"], "multiple of 8"), (["--rounds", "0"], "0; must be from 1"),
                               (["--json", "no/such/a.json"], "cannot write into"),
                               (["--compare", "--profile"], "--compare: not with --profile")):
        with pytest.raises(UsageError) as error:
            benchmark.main(arguments if arguments == ["no.yaml"] else [str(place.config), *arguments])
        assert message in one_line(error)
