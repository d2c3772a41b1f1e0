"""From gradients to weights: what is left out, what is counted, when training gives up; and torch.compile's trial."""

import copy

import pytest
import torch

import libs
from helpers import SMALL, one_line
from libs import RunError, training
from libs.config import DEFAULTS
from libs.datasets import ImageDataset
from libs.training.optimizers import build_optimizer
from libs.training.update import Updater, as_written, prepare_network

CPU = torch.device("cpu")


def parts(optimizer="adamw", precision=None):
    model = libs.DDPM(**SMALL)
    built = build_optimizer(model, {**DEFAULTS["train_cfg"], "optimizer": optimizer, "lr": 1e-2}, CPU)
    return model, built, Updater(model, built, precision, 1.0, CPU)


def loss_of(model, factor=1.0):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 1, 8, 8, generator=generator)
    return model.compute_loss(x, torch.arange(4), torch.arange(4), x.flip(0)) * factor


def one_good_update(model, updater):
    updater.backward(loss_of(model))
    assert updater.step()[1]


def everything(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, (tuple, list)) else torch.equal(a, b)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_changes_nothing(optimizer, bad):
    model, built, updater = parts(optimizer)
    one_good_update(model, updater)
    before = everything(model, built)
    updater.backward(loss_of(model, bad))
    norm, finite = updater.step()
    assert not finite and not norm.isfinite() and updater.skipped == updater.in_a_row == 1
    assert same(before, everything(model, built))
    updater.backward(loss_of(model))  # and the next one is as good as ever
    assert updater.step()[1] and updater.in_a_row == 0 and updater.skipped == 1
    assert not same(before, everything(model, built))


def test_without_a_scaler_as_on_apple_chips():
    model, built, updater = parts()
    updater.scaler = torch.amp.GradScaler("cpu", enabled=False)
    one_good_update(model, updater)
    before = everything(model, built)
    updater.backward(loss_of(model, float("nan")))
    assert not updater.step()[1] and same(before, everything(model, built)) and updater.skipped == 1
    one_good_update(model, updater)
    assert not same(before, everything(model, built))


def test_a_single_bad_gradient_is_enough():
    model, built, updater = parts()
    one_good_update(model, updater)
    updater.backward(loss_of(model))
    built.param_groups[0]["params"][5].grad.view(-1)[0] = float("nan")
    before = everything(model, built)
    assert not updater.step()[1] and same(before, everything(model, built))


def test_the_norm_is_of_the_gradients_and_is_clipped():
    """Against PyTorch's own loop, without a scaler."""
    model, built, updater = parts()
    twin, theirs, _ = parts()
    twin.load_state_dict(model.state_dict())
    for _ in range(3):
        updater.backward(loss_of(model, 100))
        norm, _ = updater.step()
        loss_of(twin, 100).backward()
        wanted = torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 1.0)
        theirs.step(), theirs.zero_grad()
        assert norm == wanted > 1
    assert same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("last_good", [None, "epoch_004.pth.tar"])
def test_twenty_in_a_row_are_the_end(last_good):
    model, _, updater = parts()
    for k in range(39):
        updater.backward(loss_of(model, float("nan") if k != 19 else 1.0))
        updater.step()
        updater.check(k + 1, last_good)
    updater.backward(loss_of(model, float("nan")))
    updater.step()
    with pytest.raises(RunError) as e:
        updater.check(40, last_good)
    assert "20 updates in a row, up to update 40" in one_line(e) and (last_good or "start again") in one_line(e)


def test_half_precision_overflows_once_and_goes_on():
    """A loss that fp16's scale of 2^16 takes beyond fp32: left out, the scale is halved, the next ones fit."""
    model, built, updater = parts(precision=torch.float16)
    one_good_update(model, updater)
    before, scale = everything(model, built), updater.scaler.get_scale()
    updater.backward(loss_of(model, 3e38 / 2 ** 15 / loss_of(model).item()))
    assert not updater.step()[1] and same(before, everything(model, built))
    assert updater.scaler.get_scale() == scale / 2 and updater.state_dict()["skipped"] == 1
    updater.backward(loss_of(model))
    assert updater.step()[1] and not same(before, everything(model, built))


def test_its_state_goes_on():
    model, _, updater = parts(precision=torch.float16)
    for _ in range(3):
        updater.backward(loss_of(model, float("inf")))
        updater.step()
    again = parts(precision=torch.float16)[2]
    again.load_state_dict(updater.state_dict())
    assert again.state_dict() == updater.state_dict() and again.scaler.get_scale() == 2 ** 13
    single = parts()[2]  # resumed on a machine without half precision: no scale of 2^13
    single.load_state_dict(updater.state_dict())
    assert single.scaler.get_scale() == 1


# ---- torch.compile and CUDA graphs

def images():
    return ImageDataset(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3), "abcd")


def prepare(model, device=CPU, processes=1, n=2, precision=None, **settings):
    return prepare_network(model, {**DEFAULTS["train_cfg"], **settings}, images(), device, precision, n, processes)


@pytest.mark.parametrize("device, processes, settings, wanted", [
    ("cpu", 1, {}, []), ("cpu", 1, {"compile": True}, ["_compile"]), ("cuda", 1, {}, ["_record"]),
    ("cuda", 2, {}, ["_compile"]), ("cuda", 1, {"accumulate": 2}, ["_compile"]),
    ("cuda", 2, {"cuda_graphs": True}, ["_compile"]), ("cuda", 1, {"cuda_graphs": False}, ["_compile"]),
    ("cuda", 1, {"cuda_graphs": False, "compile": False}, []), ("cuda", 1, {"compile": True}, ["_compile", "_record"])])
def test_what_is_prepared(device, processes, settings, wanted, monkeypatch):
    calls = []
    for name in ("_compile", "_record"):
        monkeypatch.setattr(training, name, lambda *_, name=name: calls.append(name))
    done = prepare(libs.DDPM(**SMALL), torch.device(device), processes, **settings)
    assert calls == wanted and done == [{"_compile": "compiled", "_record": "CUDA graphs"}[name] for name in wanted]


@pytest.mark.parametrize("setting, name", [("compile", "compiled"), ("cuda_graphs", "CUDA graphs")])
def test_what_fails_is_one_line(setting, name, monkeypatch, capsys):
    def broken(*args, **_):
        raise RuntimeError("no C++ compiler\nfound here")

    monkeypatch.setattr(torch, "compile", lambda f, **_: broken)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", broken)
    model = libs.DDPM(**SMALL)
    wanted, rng = loss_of(model), torch.get_rng_state()
    assert prepare(model, **{setting: True}) == []
    assert capsys.readouterr().out == f"network: {name} does not work here, going on without (no C++ compiler)\n"
    assert torch.equal(loss_of(model), wanted) and torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())


def test_compiled_is_the_same_network(monkeypatch, capsys):
    """Through PyTorch's tracer; without its code generator, which takes minutes on a CPU."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: real(f, backend="eager", fullgraph=True))
    model = libs.DDPM(**SMALL)
    wanted, names = loss_of(model), list(model.state_dict())
    assert prepare(model, compile=True) == ["compiled"]
    assert capsys.readouterr().out == "network: compiled\n"
    assert list(model.state_dict()) == names and torch.equal(loss_of(model), wanted)


def test_the_trial_compiles_what_training_calls(monkeypatch):
    """The graph of the trial is the one of all updates; a sample grid of another size compiles none."""
    real, graphs = torch.compile, []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=counted, **options))
    model = libs.DDPM(**SMALL)
    prepare(model, n=3, precision=torch.bfloat16, compile=True)
    assert len(graphs) == 1
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(3, 1, 8, 8), torch.arange(3), torch.arange(3)).mean().backward()
    with as_written(model):
        model.sample(torch.arange(4), "ddim", 2)
    assert len(graphs) == 1
    model.sample(torch.arange(4), "ddim", 2)  # which would have
    assert len(graphs) == 2


@pytest.mark.parametrize("kind, time", [("DDPM", torch.long), ("EDM", torch.float32)])
def test_graphs_are_recorded_for_what_training_calls(kind, time, monkeypatch):
    seen = []

    def record(network, inputs, allow_unused_input):
        seen.extend([network, torch.is_autocast_cache_enabled(), torch.get_autocast_dtype("cpu"),
                     *((x.shape, x.dtype) for x in inputs)])

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    model = getattr(libs, kind)(**SMALL)
    assert prepare(model, n=3, precision=torch.bfloat16, cuda_graphs=True) == ["CUDA graphs"]
    assert seen == [model.model, False, torch.bfloat16, ((3, 1, 8, 8), torch.float32), ((3,), torch.long), ((3,), time)]
    assert not model.model._forward_pre_hooks
