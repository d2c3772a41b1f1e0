"""The homework's own code is the code that runs, and it has the names and signatures that a grader calls."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import libs
import train
from helpers import SMALL, tree
from libs import DDIM, DDPM, EDM, blocks
from libs.common.pictures import image_grid
from libs.config import CODE
from libs.tiny_autoencoder import TAESD
from libs.training import run_folder
from libs.training.update import Trainer
from libs.unet import UNet

MNIST = os.path.join(CODE, "..", "configs", "mnist.yaml")
METHODS = ("q_sample", "compute_loss", "p_sample", "p_sample_loop")


# ---- what train.py runs

@pytest.fixture(scope="module")
def data(request, tmp_path_factory):
    """--set arguments for real MNIST where REAL_DATA has it, else for a few small pictures."""
    if os.environ.get("REAL_DATA"):
        return [f"dataset.data_folder={request.getfixturevalue('mnist_folder')}", "dataset.limit=16"]
    folder = tmp_path_factory.mktemp("data")
    tree(folder, {"": ["cat", "dog"]}, per_class=8, height=30, width=30)
    return ["dataset.name=ImageFolder", f"dataset.data_folder={folder}", "dataset.img_size=28"]


@pytest.fixture(scope="module")
def traced(data, tmp_path_factory):
    """A short run of configs/mnist.yaml: the run folder, and what each method was given and returned, in order."""
    calls = {name: [] for name in (*METHODS, "backward")}
    runs = tmp_path_factory.mktemp("runs")

    def record(cls, name):
        method = getattr(cls, name)

        def recorder(self, *args, **kwargs):
            result = method(self, *args, **kwargs)
            calls[name].append((args, kwargs, result))
            return result

        patch.setattr(cls, name, recorder)

    settings = [*data, f"output_folder={runs}", "devices=[cpu]", "loader.batch_size=8", "model.timesteps=6",
                "model.dim=8", "model.dim_mults=[1, 2]", "train_cfg.epochs=1", "train_cfg.num_eval_samples=2"]
    with pytest.MonkeyPatch.context() as patch:
        for name in METHODS:
            record(DDPM, name)
        record(Trainer, "backward")
        train.main([MNIST, *(word for setting in settings for word in ("--set", setting))])
    folder, = runs.iterdir()
    return folder, calls


def test_training_minimises_what_compute_loss_returns(traced):
    _, calls = traced
    assert len(calls["backward"]) == len(calls["compute_loss"]) == len(calls["q_sample"]) == 2  # 16 images, 8 at once
    for (args, _, _), (_, _, result) in zip(calls["backward"], calls["compute_loss"]):
        assert args[0] is result[0] and args[0].shape == () and args[0].requires_grad


def test_grids_are_drawn_by_algorithm_2(traced):
    folder, calls = traced
    loops = calls["p_sample_loop"]
    assert len(loops) == 2 and len(calls["p_sample"]) == 2 * 6  # a grid of the averaged weights, then of the raw ones
    assert [t_index for (_, _, _, t_index), _, _ in calls["p_sample"][:6]] == [5, 4, 3, 2, 1, 0]
    grid = (image_grid(loops[0][2], 2) * 255 + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    with Image.open(folder / "sample-0.png") as f:
        assert np.array_equal(np.asarray(f.convert("RGB")), grid.expand(*grid.shape[:2], 3))


@pytest.mark.parametrize("setting", ["steps=3", "eta=0.5", "spacing=quadratic"])
def test_grids_take_the_sampler_that_a_setting_of_it_implies(data, tmp_path, monkeypatch, setting):
    drawn = []
    monkeypatch.setattr(run_folder, "sample_grid",
                        lambda model, config, settings, *_: drawn.append(settings) or torch.zeros(3, 4, 4))
    settings = [*data, f"output_folder={tmp_path}", "devices=[cpu]", "loader.batch_size=8", "model.dim=8",
                "model.dim_mults=[1]", "model.attn_levels=[]", "train_cfg.epochs=1", f"sample_cfg.{setting}"]
    train.main([MNIST, *(word for setting in settings for word in ("--set", setting))])
    key, value = setting.split("=")
    assert {(way["sampler"], str(way[key])) for way in drawn} == {("ddim", value)}


def test_run_folder_has_the_handouts_files(traced):
    folder, _ = traced
    assert {p.name for p in folder.iterdir()} == {"config.txt", "logs", "epoch_000.pth.tar", "sample-0.png",
                                                  "model_final.pth.tar"}


class Halves(DDPM):
    """A student's sampler: overrides p_sample alone, with the handout's four arguments."""

    def p_sample(self, x, label, t, t_index):
        self.seen.append((label.tolist(), t.tolist(), t_index))
        return x / 2


def test_p_sample_loop_uses_an_overridden_p_sample():
    model = Halves(**{**SMALL, "timesteps": 3}).eval()
    model.seen = []
    images = model.p_sample_loop(torch.tensor([3, 1]), noise=torch.ones(2, 1, 8, 8))
    assert not images.requires_grad
    assert model.seen == [([3, 1], [i, i], i) for i in (2, 1, 0)]
    assert torch.allclose(images, torch.full((2, 1, 8, 8), (1 / 8 + 1) / 2))


# ---- names and signatures

def test_keys_of_the_course():
    config = libs.load_config(MNIST)
    assert {"devices", "dtype", "model_name", "output_folder"} <= config.keys()
    for section, keys in {
        "dataset": "name split data_folder", "loader": "batch_size num_workers",
        "model": "img_shape timesteps num_classes dim context_dim dim_mults attn_levels use_vae vae_encoder_weights "
                 "vae_decoder_weights",
        "train_cfg": "lr epochs num_eval_samples",
    }.items():
        assert set(keys.split()) <= config[section].keys(), section


def test_data_for_the_model(data):
    config = libs.load_config(MNIST, data)["dataset"]
    dataset, num_classes, img_shape = libs.build_dataset(config["name"], "train", config["data_folder"],
                                                         config["img_size"], (-1, 1))
    image, label = dataset[0]
    assert image.shape == tuple(img_shape) and image.dtype == torch.float32 and 0 <= label < num_classes
    assert -1 <= image.min() < 0 < image.max() <= 1
    images, labels = next(iter(libs.build_dataloader(dataset, 4, 0)))
    assert images.shape == (4, *img_shape) and labels.shape == (4,)


def test_blocks():
    x, t_emb, context = torch.randn(2, 16, 8, 8), torch.randn(2, 32), torch.randn(2, 1, 12)
    assert blocks.SinusoidalPE(16)(torch.tensor([0, 7])).shape == (2, 16)
    assert blocks.LabelEmbedding(10, 12)(torch.tensor([0, 9])).shape == (2, 1, 12)
    assert blocks.ResBlock(16, 24, 32)(x, t_emb).shape == (2, 24, 8, 8)
    assert blocks.Attention(16)(x.flatten(2).mT).shape == (2, 64, 16)
    assert blocks.CrossAttention(16, 12)(x.flatten(2).mT, context).shape == (2, 64, 16)
    assert blocks.SpatialTransformer(16, 12)(x, context).shape == x.shape
    assert blocks.Upsample(16)(x).shape == (2, 16, 16, 16)
    assert blocks.Downsample(16)(x).shape == (2, 16, 4, 4)


def test_unet():
    model = UNet(8, 12, 10, in_channels=3, out_channels=6, dim_mults=(1, 2), attn_levels=(0,), init_dim=16,
                 num_groups=8, num_heads=2)
    assert model(x=torch.randn(2, 3, 8, 8), label=torch.tensor([0, 9]), time=torch.tensor([0, 5])).shape == (2, 6, 8, 8)
    for name in ("time_embd", "label_embd", "conv_in", "encoder", "mid_res_block1", "mid_attn", "mid_res_block2",
                 "decoder", "final_conv"):
        assert isinstance(getattr(model, name), nn.Module), name


def test_unet_keeps_its_channels():
    model = UNet(8, 12, 10)
    assert (model.in_channels, model.out_channels) == (3, 3)


def test_ddpm():
    model = DDPM((1, 8, 8), 50, 8, 8, 4, (1, 2), (0,), False, None, None)
    x, label, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 3]), torch.tensor([0, 49])
    assert isinstance(model.model, UNet) and model.vae is None
    assert torch.allclose(model.linear_beta_schedule(50).float(), model.betas)
    assert model.quadratic_beta_schedule(50).shape == (50,)
    assert model._extract(model.betas, t, x.shape).flatten().tolist() == model.betas[t].tolist()
    assert model._extract(model.betas, t, x.shape).shape == (2, 1, 1, 1)
    assert {"betas", "alphas_cumprod", "sqrt_recip_alphas", "posterior_variance"} <= dict(model.named_buffers()).keys()
    assert torch.equal(model.q_sample(x_start=x, t=t, noise=x), model.q_sample(x, t, x))
    assert model.compute_loss(x_start=x, label=label, t=t).shape == model.compute_loss(x, label, t, x).shape == ()
    assert model.p_sample(x, label, torch.full((2,), 7), 7).shape == x.shape
    assert model.p_sample_loop(label).shape == x.shape


def test_other_models():
    labels, settings = torch.tensor([0, 1, 3]), ((1, 8, 8), 50, 8, 8, 4, (1, 2), (0,), False, None, None)
    assert DDIM(*settings).p_sample_loop(labels).shape == EDM(*settings).p_sample_loop(labels).shape == (3, 1, 8, 8)
    taesd = TAESD(None, None)
    latents = taesd.encoder(torch.rand(2, 3, 32, 16))
    assert latents.shape == (2, 4, 4, 2) and taesd.decoder(latents).shape == (2, 3, 32, 16)
    latent = DDPM((3, 32, 32), 3, 8, 8, 4, (1, 2), (0,), True, None, None)
    assert isinstance(latent.vae, TAESD) and latent.p_sample_loop(labels).shape == (3, 3, 32, 32)


def test_training_tools(tmp_path):
    model = nn.Linear(2, 2)
    ema = libs.ModelEMA(model, 0.999)
    with torch.no_grad():
        model.weight += 1
    ema.update(model)
    assert torch.allclose(model.weight - ema.module.weight, torch.full((2, 2), 0.1))  # the first decay is 1 / 10
    meter = libs.AverageMeter()
    meter.update(1.0)
    meter.update(4.0, n=2)
    assert (meter.val, meter.avg, meter.count) == (4.0, 3.0, 3)
    meter.reset()
    assert meter.count == 0
    libs.save_checkpoint({"epoch": 1, "state_dict": model.state_dict()}, True, str(tmp_path), "checkpoint.pth.tar")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pth.tar", "model_final.pth.tar"]
    state = torch.load(tmp_path / "model_final.pth.tar", weights_only=True)
    assert torch.equal(state["state_dict"]["weight"], model.weight)
