"""Images drawn in half precision and through CUDA graphs; a graph is pretended by computing anew from its buffers."""

from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

import compare
import evaluate
import libs
import sample
import train
from helpers import SMALL, Place
from libs.config import SETTINGS, defaults_of
from libs.training import speed
from libs.training.device import fast_sampling
from libs.unet import UNet

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = defaults_of(SETTINGS)
HEUN = {"sampler": "heun", "steps": 4, "guidance_scale": 2.0}


def model_of(kind="EDM", **options):
    torch.manual_seed(0)
    return getattr(libs, kind)(**SMALL | {"label_dropout": 0.1} | options).eval()


def draw(model, settings=HEUN, n=7, batch_size=3):
    labels = torch.arange(n) % 4
    return torch.cat(list(libs.draw_images(model, labels, settings, batch_size=batch_size)))


def test_on_a_cpu_in_fp32_nothing_changes():
    model = model_of()
    wanted = draw(model)
    with fast_sampling(model, CPU, None):
        assert torch.equal(draw(model), wanted) and "forward" not in vars(model.model)


@pytest.mark.parametrize("kind", ["DDPM", "EDM", "Flow"])
def test_bf16_is_close_and_for_the_network_alone(kind):
    model = model_of(kind)
    wanted, seen, outputs = draw(model), [], []
    model.model.conv_in.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
    hook = model.model.register_forward_hook(lambda _, inputs, out: outputs.append((inputs[0].dtype, out.dtype)))
    with fast_sampling(model, CPU, torch.bfloat16):
        found = draw(model)
    assert found.dtype == torch.float32 and set(seen) == {torch.bfloat16} and set(outputs) == {(torch.float32,) * 2}
    assert 0 < (found - wanted).abs().mean() < 0.02
    hook.remove()
    assert torch.equal(draw(model), wanted) and seen[-1] == torch.float32  # afterwards all is as before


class Graph:
    """In place of torch.cuda.CUDAGraph: a replay computes anew, from and into the memory of the recording."""

    made, recording = [], None

    def __init__(self):
        Graph.made.append(self)
        self.calls = []

    def replay(self):
        Graph.recording = False
        (forward, inputs, output), = self.calls
        output.copy_(forward(*inputs))
        Graph.recording = None


@pytest.fixture
def graphs(monkeypatch):
    """The list of the graphs that were made, on a CPU that has the calls of CUDA's streams."""
    @contextmanager
    def graph(g, stream):
        Graph.recording = g
        yield
        Graph.recording = None

    class Stream:
        def __init__(self, *_):
            pass

        def wait_stream(self, other):
            assert isinstance(other, Stream)

    monkeypatch.setattr(Graph, "made", [])
    for name, value in {"CUDAGraph": Graph, "graph": graph, "Stream": Stream, "stream": lambda _: nullcontext(),
                        "current_stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return Graph.made


def recorded(network):
    """Let the pretended graph know what the network does while it is recorded."""
    forward = network.forward

    def noted(*inputs):
        out = forward(*inputs)
        if Graph.recording:
            Graph.recording.calls.append((forward, inputs, out))
        return out
    network.forward = noted


@pytest.mark.parametrize("settings, shapes", [
    (HEUN, 2), ({**HEUN, "guidance_interval": [0.1, 100.0]}, 4), ({**HEUN, "guidance_scale": 1.0}, 2),
    ({"sampler": "dpmpp_2m", "steps": 6, "guidance_scale": 1.0}, 2)])
@pytest.mark.parametrize("kind", ["DDPM", "Flow"])
def test_graphs_draw_the_same_images(kind, settings, shapes, graphs):
    """One graph for each number of images that the network sees: of a batch, of the last, and of both guided."""
    model = model_of(kind, **{"prediction": "x0"} if kind == "DDPM" else {})
    wanted = draw(model, settings)
    recorded(model.model)
    own = model.model.forward
    with fast_sampling(model, CUDA, None):
        assert torch.equal(draw(model, settings), wanted) and len(graphs) == shapes
        assert torch.equal(draw(model, settings), wanted) and len(graphs) == shapes  # no others
    assert model.model.forward is own


def test_graphs_take_long_and_float_times(graphs):
    model = model_of("DDPM")
    recorded(model.model)
    with fast_sampling(model, CUDA, None):
        for sampler, steps in (("ddpm", 50), ("ddim", 4), ("heun", 4)):
            draw(model, {"sampler": sampler, "steps": steps, "guidance_scale": 1.0}, n=2)
    assert [[x.dtype for x in g.calls[0][1]] for g in graphs] == [
        [torch.float32, torch.long, torch.long], [torch.float32, torch.long, torch.float32]]


def test_where_graphs_fail_one_line_says_so(graphs, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    model = model_of()
    wanted = draw(model)
    monkeypatch.setattr(torch.cuda, "graph", broken)
    with fast_sampling(model, CUDA, None):
        assert torch.equal(draw(model), wanted)
    said = "network: CUDA graphs do not work here, drawing without (operation not permitted)\n"
    assert capsys.readouterr().out == said


# ---- the scripts

COMMANDS = {
    "sample": lambda place, path: sample.main([path, "--num", "2", "--output", str(place.root / "a.npz")]),
    "evaluate": lambda place, path: evaluate.main(
        [path, "--num", "8", "--no-memorization", "--output", str(place.root / "a.json"), "--device", "cpu"]),
    "samplers": lambda place, path: compare.main(
        ["samplers", path, "heun:2", "--num", "8", "--output", str(place.root / "a.json"), "--device", "cpu"]),
    "runs": lambda place, path: compare.main(
        ["runs", path, "--sampler", "DDPM=heun:2", "--num", "8", "--output", str(place.root / "a.json"), "--device",
         "cpu"]),
    "benchmark": lambda place, path: speed.measure_samplers(libs.load_model(path)[1], 0.1, CPU),
    "train": lambda place, path: train.main([str(place.config), *(w for x in (
        *place.latents(2), f"dtype={Path(path).name.split('.')[0]}", "dataset.latent_crops=1", "train_cfg.epochs=1")
        for w in ("--set", x))]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_scripts_draw_in_the_precision_of_the_config(command, tmp_path, monkeypatch):
    monkeypatch.setattr(libs.config, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "matmul_rate", lambda *_: {})  # minutes, where a CPU has no instructions for bf16
    place, forward, seen = Place(tmp_path), UNet.forward, []

    def noted(self, *inputs):
        if not self.training and inputs[0].device == CPU:
            seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return forward(self, *inputs)

    settings = place.latents(4)
    monkeypatch.setattr(UNet, "forward", noted)
    for dtype, wanted in (("fp32", False), ("bf16", torch.bfloat16)):
        seen.clear()
        path = place.checkpoint(f"dtype={dtype}", *settings, classes=["cat", "dog"])
        path = path.rename(place.root / f"{dtype}.pth.tar")
        COMMANDS[command](place, str(path))
        for left in place.root.glob("a.*"):
            left.unlink()
        assert set(seen) == ({False, wanted} if command == "runs" else {wanted})  # which measures the error in fp32 too
