"""Random states, and the small averages that training keeps."""

import pytest
import torch
from torch import nn

from libs import AverageMeter, ModelEMA
from libs.common.seeds import seed_everything, seeded_generator
from libs.training.update import TenthsMeter, learning_rate


# ---- random states

def test_the_global_generator_is_a_function_of_seed_and_purpose():
    def draw(*key):
        seed_everything(*key)
        return torch.randn(3).tolist()
    assert draw(5) == torch.randn(3, generator=torch.Generator().manual_seed(5)).tolist()
    assert draw(5, "dropout", 2) == draw(5, "dropout", 2)
    keys = [(5,), (5, "dropout", 2), (5, "dropout", 3), (5, "dropout", 2, 32), (6, "dropout", 2)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_seeded_generator_is_a_function_of_its_key():
    def draw(*key):
        return torch.rand(4, generator=seeded_generator(*key)).tolist()
    assert draw(0, "noise", 3) == draw(0, "noise", 3)
    keys = [(0, "noise", 3), (1, "noise", 3), (0, "order", 3), (0, "noise", 4), (0, "noise", "3"), (0, "noise")]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


# ---- averages

class Tiny(nn.Module):
    """A model as ModelEMA wants it: `.model` learns, buffers beside it."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(2, 2)
        self.register_buffer("table", torch.zeros(3))


def test_ema_by_hand():
    """Decay of update n: min(decay, (1 + n) / (10 + n)), so 0.1, 2/11, 3/12, ... until `decay` is reached."""
    torch.manual_seed(0)
    model = Tiny().train()
    ema = ModelEMA(model, decay=0.26)
    wanted = model.model.weight.detach().clone()
    for decay in (1 / 10, 2 / 11, 3 / 12, 0.26, 0.26):
        with torch.no_grad():
            model.model.weight.add_(torch.randn(2, 2))
            model.table.add_(1)
        ema.update(model)
        wanted = decay * wanted + (1 - decay) * model.model.weight.detach()
        assert torch.allclose(ema.module.model.weight, wanted, atol=1e-6)
        assert torch.equal(ema.module.table, model.table)  # buffers are copied, not averaged
    assert ema.updates == 5
    assert not ema.module.training and model.training
    assert not any(p.requires_grad for p in ema.module.parameters()) and model.model.weight.requires_grad


def test_average_meter():
    meter = AverageMeter()
    assert meter.avg == 0
    meter.update(2.0)
    meter.update(torch.tensor(5.0), n=3)
    assert meter.avg == pytest.approx(17 / 4) and float(meter.val) == 5 and meter.count == 4
    meter.reset()
    meter.update(1)
    assert meter.avg == 1


def test_tenths_meter():
    meter = TenthsMeter(1000, "cpu")
    meter.update(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0, 99, 100, 999]))
    meter.update(torch.tensor([9.0]), torch.tensor([950]))
    averages = meter.read()
    assert averages[0] == 2 and averages[1] == 5 and averages[9] == 8
    assert all(a != a for a in averages[2:9])  # NaN: nothing seen
    assert all(a != a for a in meter.read())  # and begun again


@pytest.mark.parametrize("timesteps", [1, 3, 10, 128])
def test_tenths_meter_takes_every_time(timesteps):
    meter = TenthsMeter(timesteps, "cpu")
    meter.update(torch.ones(timesteps), torch.arange(timesteps))
    assert sum(a == 1 for a in meter.read()) == min(timesteps, 10)
    meter.update(torch.ones(2), torch.tensor([0.0, timesteps * (1 - 2 ** -23)]))  # an EDM's are between two numbers
    assert meter.read()[0] == 1


# ---- the learning rate

def rates(schedule, warmup=0, total=100):
    cfg = {"lr": 2.0, "warmup": warmup, "lr_schedule": schedule}
    return [learning_rate(step, cfg, total) for step in range(total)]


def test_warmup_rises_evenly_to_lr():
    assert set(rates("constant")) == {2.0}
    found = rates("constant", warmup=9)
    assert found[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert set(found[9:]) == {2.0}


def test_cosine_goes_down_to_zero_and_is_flat_at_both_ends():
    found = rates("cosine")
    assert found[0] == 2 and found[50] == pytest.approx(1)  # half way down at half time
    assert found[25] == pytest.approx(2 * (0.5 + 0.5 * 2 ** -0.5))
    assert all(a > b > 0 for a, b in zip(found, found[1:])) and found[0] - found[5] < 0.02 and found[-6] < 0.02
    assert learning_rate(100, {"lr": 2.0, "warmup": 0, "lr_schedule": "cosine"}, 100) == pytest.approx(0)
    assert rates("cosine", warmup=99)[50] == pytest.approx(1 * 51 / 100)  # both together


def test_trapezoid_is_constant_then_goes_down_to_zero_in_a_straight_line():
    found = rates("trapezoid", warmup=9)
    assert found[:10] == pytest.approx([0.2 * k for k in range(1, 11)]) and set(found[9:51]) == {2.0}
    assert found[50:] == pytest.approx([2 * (100 - step) / 50 for step in range(50, 100)])
