"""From gradients to weights: what is left out, what is counted, when training gives up; and the network made fast."""

import copy
import signal
from types import SimpleNamespace

import pytest
import torch

import libs
from helpers import SMALL, differences, one_line
from libs import RunError, config
from libs.datasets import ImageDataset
from libs.training import device
from libs.training.device import eager, pick_device, pick_precision, prepare_network
from libs.training.distributed import World
from libs.training.run_folder import RunFolder, TrainingLog
from libs.training.update import Signals, Trainer

CPU = torch.device("cpu")
CFG = config.defaults_of(config.SETTINGS)["train_cfg"] | {"lr": 1e-2}


def trainer(optimizer="adamw", precision=None, **cfg):
    torch.manual_seed(0)
    return Trainer(libs.DDPM(**SMALL), CFG | {"optimizer": optimizer} | cfg, CPU, precision, total_steps=100)


def loss_of(model, factor=1.0):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 1, 8, 8, generator=generator)
    return model.compute_loss(x, torch.arange(4), torch.arange(4), x.flip(0)) * factor


def update(trainer, factor=1.0):
    trainer.backward(loss_of(trainer.model, factor))
    return trainer.update()


def everything(trainer):
    return copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]))


# ---- updates

@pytest.mark.parametrize("optimizer, scaler, bad", [("adamw", True, "nan"), ("muon", True, "inf"), ("adamw", False, "nan")])
def test_an_update_that_is_not_finite_changes_nothing(optimizer, scaler, bad):
    t = trainer(optimizer)
    if not scaler:  # as on Apple's chips
        t.scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert update(t)[1]
    before = everything(t)
    norm, finite = update(t, float(bad))
    assert not finite and not norm.isfinite() and t.skipped == t.in_a_row == 1 and not differences(before, everything(t))
    assert update(t)[1] and t.in_a_row == 0 and t.skipped == 1  # the next one is as good as ever
    assert differences(before, everything(t)) and t.step == 3


def test_a_single_bad_gradient_is_enough():
    t = trainer()
    update(t)
    t.backward(loss_of(t.model))
    t.parameters[5].grad.view(-1)[0] = float("nan")
    before = everything(t)
    assert not t.update()[1] and not differences(before, everything(t))


def test_the_norm_is_of_the_gradients_and_is_clipped():
    """Against PyTorch's own loop, without a scaler."""
    t, twin = trainer(), libs.DDPM(**SMALL)
    twin.load_state_dict(t.model.state_dict())
    theirs = torch.optim.AdamW(twin.model.parameters(), CFG["lr"], CFG["betas"], weight_decay=CFG["weight_decay"], fused=True)
    for _ in range(3):
        norm, _ = update(t, 100)
        loss_of(twin, 100).backward()
        wanted = torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 1.0)
        theirs.step(), theirs.zero_grad()
        assert norm == wanted > 1
    assert not differences(t.model.state_dict(), twin.state_dict())


def test_parts_of_a_batch_add_up_to_its_mean():
    t, twin = trainer(), trainer()
    x, k = torch.randn(4, 1, 8, 8), torch.arange(4)
    t.backward(t.model.compute_loss(x, k, k, x.flip(0)))
    for part in (slice(0, 3), slice(3, 4)):
        twin.backward(twin.model.compute_loss(x[part], k[part], k[part], x.flip(0)[part]), share=len(k[part]) / 4)
    torch.testing.assert_close(t.update()[0], twin.update()[0])


def test_twenty_in_a_row_are_the_end():
    t = trainer()
    for k in range(39):
        update(t, float("nan") if k != 19 else 1.0)
        t.check(None)
    update(t, float("nan"))
    for last_good in (None, "epoch_004.pth.tar"):
        with pytest.raises(RunError) as e:
            t.check(last_good)
        assert "20 updates in a row, up to update 40" in one_line(e) and (last_good or "start again") in one_line(e)


@pytest.mark.parametrize("kind, end", [("cpu", 20), ("cuda", 32)])
def test_the_log_ends_training_with_its_next_line_or_before(kind, end):
    """On a GPU nothing is read between two lines. Here the tensors are on the CPU in both cases."""
    t = trainer()
    folder = RunFolder("", config.defaults_of(config.SETTINGS), t, 4, SimpleNamespace(print_freq=16), claim=None)
    log = TrainingLog(folder, t.model, World(), 4, epochs=1)
    t.device = torch.device(kind)
    with pytest.raises(RunError, match=f"not finite in {end} updates in a row, up to update {end}; start again"):
        while True:
            log.update(torch.ones(4), torch.arange(4), *update(t, float("nan")))
    assert t.step == end


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("value, size", [(float("inf"), "inf"), (float("nan"), "nan"), (-3e10, r"3e\+10")])
def test_weights_beyond_fp16_are_not_saved(average, value, size):
    t = trainer()
    weights = next((t.ema.module if average else t.model).parameters())
    with torch.no_grad():
        weights.view(-1)[0] = -65504  # fp16's largest
        t.check_weights(None)
        weights.view(-1)[0] = value
    for last, advice in ((None, "start again"), ("x", "resume from x with a lower train_cfg.lr")):
        with pytest.raises(RunError, match=f"weights up to {size} .* at update 0: training went astray; {advice}"):
            t.check_weights(last)


def test_half_precision_overflows_once_and_goes_on():
    """A loss that fp16's scale of 2^16 takes beyond fp32: left out, the scale is halved, the next ones fit."""
    t = trainer(precision=torch.float16)
    update(t)
    before, scale = everything(t), t.scaler.get_scale()
    assert not update(t, 3e38 / 2 ** 15 / loss_of(t.model).item())[1] and not differences(before, everything(t))
    assert t.scaler.get_scale() == scale / 2 and t.state_dict()["scaler"]["skipped"] == 1
    assert update(t)[1] and differences(before, everything(t))


def test_its_state_goes_on():
    t = trainer(precision=torch.float16)
    t.epoch, t.batch = 2, 1
    for _ in range(3):
        update(t, float("inf"))
    again = trainer(precision=torch.float16)
    again.load_state_dict(t.state_dict())
    assert again.state_dict()["scaler"] == t.state_dict()["scaler"] and again.scaler.get_scale() == 2 ** 13
    assert (again.epoch, again.batch, again.step, again.ema.updates) == (2, 1, 3, 3)
    single = trainer()  # resumed on a machine without half precision: no scale of 2^13
    single.load_state_dict(t.state_dict())
    assert single.scaler.get_scale() == 1 and single.in_a_row == 3


def test_resuming_with_other_settings_of_the_optimizer():
    """What the config says now holds, not what the optimizer's state brings along."""
    t = trainer(betas=[0.8, 0.9], weight_decay=0.5)
    t.load_state_dict(trainer().state_dict())
    assert all(tuple(g["betas"]) == (0.8, 0.9) and g["weight_decay"] == 0.5 for g in t.optimizer.param_groups)


def test_a_signal_is_noted_and_a_second_one_interrupts(capfd):
    signals = Signals()
    signal.raise_signal(signal.SIGTERM)
    assert signals.received == signal.SIGTERM and "a checkpoint is written first" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_closed_terminal_is_a_signal_but_not_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signals = Signals()
    signal.raise_signal(signal.SIGHUP)
    assert signals.received == signal.SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals()
    signal.raise_signal(signal.SIGHUP)
    assert signals.received is None


# ---- device and precision

def test_a_device_that_is_missing(capsys):
    assert pick_device("cpu") == CPU and not capsys.readouterr().out
    assert pick_device("cuda:77").type in ("cpu", "cuda", "mps")
    assert "devices: cuda:77 is not available; using" in capsys.readouterr().out


def test_bf16_on_a_cpu_without_it_is_used_with_a_warning(monkeypatch, capsys):
    for known in (True, False):
        monkeypatch.setattr(device, "_cpu_has_bf16", lambda: known)
        assert pick_precision("bf16", CPU) == torch.bfloat16
        assert ("this CPU has no instructions for bf16" in capsys.readouterr().out) != known
    assert pick_precision("auto", CPU) is None and not capsys.readouterr().out
    assert pick_precision("fp16", CPU) is None and "using fp32" in capsys.readouterr().out


# ---- torch.compile and CUDA graphs

def prepare(model, device=CPU, processes=1, n=2, precision=None, **settings):
    images = ImageDataset(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3), "abcd")
    return prepare_network(model, CFG | settings, images, device, precision, n, processes)


@pytest.mark.parametrize("kind, processes, settings, expected", [
    ("cpu", 1, {}, []), ("cpu", 1, {"compile": True}, ["_compile"]), ("cuda", 1, {}, ["_record"]),
    ("cuda", 2, {}, ["_compile"]), ("cuda", 1, {"accumulate": 2}, ["_compile"]), ("cuda", 1, {"compile": False}, []),
    ("cuda", 1, {"compile": True}, ["_compile"])])
def test_what_is_prepared(kind, processes, settings, expected, monkeypatch):
    calls = []
    for name in ("_compile", "_record"):
        monkeypatch.setattr(device, name, lambda *_, name=name: calls.append(name))
    done = prepare(libs.DDPM(**SMALL), torch.device(kind), processes, **settings)
    assert calls == expected and done == [{"_compile": "compiled", "_record": "CUDA graphs"}[name] for name in expected]


def test_what_fails_is_one_line_and_changes_nothing(monkeypatch, capsys):
    def broken(*args, **_):
        raise RuntimeError("no C++ compiler\nfound here")

    monkeypatch.setattr(torch, "compile", lambda f, **_: broken)
    model = libs.DDPM(**SMALL)
    wanted, rng = loss_of(model), torch.get_rng_state()
    assert prepare(model, compile=True) == []
    assert capsys.readouterr().out == "network: compiled does not work here, going on without (no C++ compiler)\n"
    assert torch.equal(loss_of(model), wanted) and torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())


def test_the_trial_compiles_what_training_calls(monkeypatch):
    """The graph of the trial is the one of all updates; a sample grid of another size compiles none. Through PyTorch's
    tracer; without its code generator, which takes minutes on a CPU."""
    compile, graphs = torch.compile, []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=counted, fullgraph=True, **options))
    model = libs.DDPM(**SMALL | {"timesteps": 3})
    x, label, t, names = torch.randn(3, 1, 8, 8), torch.arange(3), torch.arange(3), list(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(x, label, t, x.flip(0))
    assert prepare(model, n=3, precision=torch.bfloat16, compile=True) == ["compiled"]
    assert len(graphs) == 1 and list(model.state_dict()) == names
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, label, t, x.flip(0))
        loss.backward()
        assert torch.equal(loss, wanted)
    with eager(model):
        model.p_sample_loop(torch.arange(4))
    assert len(graphs) == 1


@pytest.mark.parametrize("kind, time", [("DDPM", torch.long), ("EDM", torch.float32), ("Flow", torch.float32)])
def test_graphs_are_recorded_for_what_training_calls(kind, time, monkeypatch):
    seen = []

    def record(network, inputs, allow_unused_input):
        seen.extend([network, torch.is_autocast_cache_enabled(), torch.get_autocast_dtype("cpu"),
                     *((x.shape, x.dtype) for x in inputs)])

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    model = getattr(libs, kind)(**SMALL)
    images = ImageDataset(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3), "abcd")
    device._record(model, lambda: device._trial_loss(model, images, CPU, torch.bfloat16, 3), torch.bfloat16)
    assert seen == [model.model, False, torch.bfloat16, ((3, 1, 8, 8), torch.float32), ((3,), torch.long), ((3,), time)]
    assert not model.model._forward_pre_hooks
