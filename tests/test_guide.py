"""Autoguidance: a weaker model that sampling leads away from, in closed form and through the scripts."""

import os

import pytest
import torch
from torch import nn

import evaluate
import export
import libs
import sample
import train
from helpers import SMALL, Place, one_line
from libs import UsageError, load_model, network_calls, sampling_settings
from libs.config import complete_config
from libs.data.images import read_images
from libs.models import MODELS, SAMPLERS, sample_images
from libs.samplers import image_generator
from libs.training.device import fast_sampling

CPU = torch.device("cpu")


class Gaussian(nn.Module):
    """In place of a model: the best denoiser of data N(0, std^2), and the noise levels that it was asked for."""

    def __init__(self, std):
        super().__init__()
        self.std, self.seen = std, []

    def denoise(self, x, sigma, label, guidance_scale=1.0):
        assert guidance_scale == 1
        self.seen.append(float(sigma))
        return x * self.std ** 2 / (self.std ** 2 + sigma ** 2)


def gaussian_pair(kind="EDM", std=0.5, guide_std=0.8):
    model = MODELS[kind](**SMALL).double().eval()
    model.postprocess = lambda x: x  # what the solver ended with
    model.denoise, model.guide = Gaussian(std).denoise, Gaussian(guide_std)
    return model


# ---- the formula

@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scale", [0.0, 1.5, 3.0])
def test_closed_form(kind, scale):
    """dx/dsigma = (x - D) / sigma, and x - D_w is x sigma^2 times w / (s^2 + sigma^2) + (1 - w) / (r^2 + sigma^2)."""
    model, labels = gaussian_pair(kind), torch.tensor([0, 1, 2])
    low, high, _ = model.sigma_range
    noise = torch.randn(3, *model.img_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    shrunk, shrunk_guide = (((std ** 2 + low ** 2) / (std ** 2 + high ** 2)) ** 0.5 for std in (0.5, 0.8))
    D, D_guide = (std ** 2 / (std ** 2 + low ** 2) for std in (0.5, 0.8))  # the last step, from the lowest level to 0
    expected = shrunk ** scale * shrunk_guide ** (1 - scale) * (D_guide + scale * (D - D_guide))
    drawn = model.sample(labels, "heun", 200, noise=noise, guidance_scale=scale)
    assert torch.allclose(drawn, expected * model.scale_noise(noise, high), rtol=1e-3, atol=0)


@pytest.mark.parametrize("sampler", ["heun", "euler", "euler_ancestral", "dpmpp_2m"])
def test_a_guide_that_is_no_worse_changes_nothing(sampler):
    model, labels = gaussian_pair(guide_std=0.5), torch.tensor([0, 3])
    plain, guided = (model.sample(labels, sampler, 6, generator=image_generator(0, range(2)), guidance_scale=scale)
                     for scale in (1.0, 4.0))
    assert torch.equal(plain, guided)


def test_interval_and_cost():
    """The guide is called where the model is guided and nowhere else, and costs a network call each time."""
    model, labels = gaussian_pair(), torch.tensor([0])
    config = complete_config({"model_name": "EDM", "sample_cfg": {"guide": "other.pth.tar", "guidance_scale": 2}})
    settings = sampling_settings(model, config, sampler="dpmpp_2m", steps=12, guidance_interval=[0.1, 5.0])
    levels = SAMPLERS["dpmpp_2m"].levels(model, 12)
    sample_images(model, labels, settings, generator=image_generator(0, range(1)))
    assert model.guide.seen == [float(sigma) for sigma in levels if 0.1 < sigma <= 5] and 0 < len(model.guide.seen) < 12
    assert network_calls(model, settings) == 12 + len(model.guide.seen)
    assert settings["guide"].count("/") == 1 and settings["guide"].endswith("/other.pth.tar")
    assert "guide" not in sampling_settings(model, config, guidance_scale=1.0)


def test_bf16_is_for_the_guides_network_too():
    model = MODELS["EDM"](**SMALL).eval()
    model.guide, seen = MODELS["EDM"](**{**SMALL, "dim_mults": (1,)}).eval(), []
    model.guide.model.conv_in.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
    labels, draws = torch.tensor([1]), []
    for precision in (None, torch.bfloat16, None):
        with fast_sampling(model, CPU, precision):
            draws.append(model.sample(labels, "heun", 2, generator=image_generator(0, range(1)), guidance_scale=2.0))
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3 + [torch.float32] * 3
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


# ---- files

@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model, place.model, and two that could guide it: place.guide and place.other."""
    place = Place(tmp_path)
    for name, overrides in (("model", ()), ("guide", ["model.dim=16"]), ("other", ["model.timesteps=20"])):
        torch.manual_seed(len(name))
        path = place.checkpoint("model_name=EDM", *overrides, classes=["cat", "dog"])
        setattr(place, name, path.rename(tmp_path / f"{name}.pth.tar"))
    monkeypatch.chdir(tmp_path)
    return place


def drawn(path, *arguments):
    sample.main([str(path), "--num", "1", "--device", "cpu", "--output", "drawn.npz", "--overwrite", *map(str, arguments)])
    return read_images("drawn.npz", 3, ["cat", "dog"]).images


def test_scripts(place, capsys):
    """--guide, and a checkpoint that export.py wrote one into."""
    plain, guided = drawn(place.model), drawn(place.model, "--guide", place.guide, "--guidance-scale", 3)
    assert f"guide {place.root.name}/guide.pth.tar" in capsys.readouterr().out
    model, _ = load_model(str(place.model), guide=str(place.guide))
    images = torch.cat([model.sample(torch.tensor([k]), "heun", 2, generator=image_generator(0, [k]), guidance_scale=3.0)
                        for k in (0, 1)])
    assert (images * 255 - guided).abs().max() <= 1 and not torch.equal(plain, guided)
    assert not torch.equal(guided, drawn(place.model, "--guide", place.other, "--guidance-scale", 3))

    export.main([str(place.model), "e.pth.tar", "--set", f"sample_cfg.guide={place.guide}", "--set",
                 "sample_cfg.guidance_scale=3"])
    assert torch.equal(drawn("e.pth.tar"), guided) and torch.equal(drawn("e.pth.tar", "--guidance-scale", 1), plain)


def test_a_guide_that_names_a_guide(place):
    """It is taken as it is without."""
    state = torch.load(place.guide, weights_only=True)
    state["config"]["sample_cfg"] |= {"guide": str(place.guide), "guidance_scale": 3.0}
    torch.save(state, place.root / "loop.pth.tar")
    flags = "--guidance-scale", 3, "--guide"
    assert torch.equal(drawn(place.model, *flags, place.root / "loop.pth.tar"), drawn(place.model, *flags, place.guide))


def test_training_leaves_the_guide_alone(place):
    """Grids are guided; the guide is in no checkpoint, and no weight learns otherwise."""
    settings = ["model_name=EDM", "train_cfg.epochs=1", "train_cfg.num_eval_samples=1"]
    for name, more in (("a", []), ("b", [f"sample_cfg.guide={place.guide}", "sample_cfg.guidance_scale=4"])):
        train.main([str(place.config), "-c", "1", "--output", name, *(
            x for s in [*settings, *more] for x in ("--set", s))])
    (a, b), grids = ([place.runs / f"tiny_{name}" / file for name in "ab"] for file in ("model_final.pth.tar", "sample-0.png"))
    a, b = (libs.load_checkpoint(str(path)) for path in (a, b))
    assert not any(key.startswith("guide") for key in (*a["state_dict"], *a["state_dict_ema"]))
    assert all(torch.equal(w, b["state_dict_ema"][key]) for key, w in a["state_dict_ema"].items())
    assert grids[0].read_bytes() != grids[1].read_bytes()


REFUSED = [
    ("model", ["--guide", "nowhere.pth.tar"], "no file .*nowhere.pth.tar"),
    ("model", ["--guide", "tiny.yaml"], "guide: checkpoint tiny.yaml is damaged or no checkpoint"),
    ("model", ["--guide", "guide.pth.tar", "--guidance-scale", "1"], "guide: at guidance_scale 1 it is not used"),
    ("model", ["--guide", "reverse.pth.tar"], "guide: its classes are dog, cat, those of model.pth.tar cat, dog"),
    ("latents", ["--guide", "others.pth.tar"], "guide: others.pth.tar was trained in the latents of another autoencoder"),
    ("model", ["--guide", "wide.pth.tar"], r"guide: wide.pth.tar has img_shape \(3, 32, 32\), the model .* \(3, 16, 16\)"),
    ("ddpm", ["--guide", "guide.pth.tar", "--sampler", "ddim"], "guide: only heun, euler, .* take it, not ddpm and ddim"),
    ("model", ["--guidance-scale", "3"], "label_dropout"),
]


def test_what_is_refused(place):
    place.checkpoint("model_name=EDM", "dataset.img_size=32").rename("wide.pth.tar")
    place.checkpoint("model_name=EDM", classes=["dog", "cat"]).rename("reverse.pth.tar")
    place.checkpoint().rename("ddpm.pth.tar")
    for name in ("latents", "others"):
        sets = [f"{key}={value}" for key, value in place.autoencoder().items()]
        path = place.checkpoint("model_name=EDM", "dataset.img_size=32", *sets)
        state = torch.load(path, weights_only=True)
        for half in ("encoder", "decoder"):  # each of the two has its own
            os.rename(f"{half}.pth", f"{name}_{half}.pth")
            state["config"]["model"][f"vae_{half}_weights"] = str(place.root / f"{name}_{half}.pth")
        torch.save(state, f"{name}.pth.tar")
    for checkpoint, arguments, message in REFUSED:
        with pytest.raises(UsageError, match=message) as error:
            drawn(f"{checkpoint}.pth.tar", "--guidance-scale", "2", *arguments)
        one_line(error)


def test_export_sets_nothing_of_the_training(place):
    with pytest.raises(UsageError, match="--set: 'model.dim=8': only sample_cfg and eval can be changed"):
        export.main([str(place.model), "e.pth.tar", "--set", "model.dim=8"])
    with pytest.raises(UsageError, match="sample_cfg.steps is 'many'"):
        export.main([str(place.model), "e.pth.tar", "--set", "sample_cfg.steps=many"])


def test_a_ddpms_own_loop_takes_no_guide():
    model = MODELS["DDPM"](**{**SMALL, "label_dropout": 0.1}).eval()
    model.guide = MODELS["EDM"](**SMALL).eval()
    with pytest.raises(UsageError, match="guide: only heun"):
        model.p_sample_loop(torch.tensor([0]), guidance_scale=2.0)


def test_images_take_no_guide(place):
    drawn(place.model)
    with pytest.raises(UsageError, match="--guide: drawn.npz holds images; nothing is drawn"):
        evaluate.main(["drawn.npz", "--config", str(place.config), "--guide", str(place.guide)])
