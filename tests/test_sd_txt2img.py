"""txt2img.py as a user types it, with a small random model."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import txt2img
from helpers import one_line
from libs.config import CODE
from libs.common.errors import RunError, UsageError
from libs.stable_diffusion import memory
from libs.stable_diffusion.checkpoint import UNET
from libs.stable_diffusion.config import DEFAULTS, load_config
from libs.stable_diffusion.files import read_tensors
from libs.tiny_autoencoder import build_decoder
from sd_parity import SMALL, small_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("open_clip")
    return small_checkpoint(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def draw(model, tmp_path, monkeypatch, capsys):
    """draw(flags): run the script in an empty folder; returns what it printed."""
    config = {"devices": ["cpu"], "model": SMALL, "taesd_decoder": str(tmp_path / "decoder.pth"),
              "sample_cfg": {"steps": 2, "height": 64, "width": 72}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)

    def draw(*flags):
        monkeypatch.setattr(sys, "argv", ["txt2img.py", "small.yaml", "--ckpt", model, *map(str, flags)])
        txt2img.main()
        return capsys.readouterr().out
    return draw


def pictures(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix == ".png")


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_one_picture_and_its_settings(draw, tmp_path):
    said = draw("--prompt", "a photograph of ä cat", "--negative-prompt", "blurry", "--seed", 5, "--sampler", "ddim",
                "--steps", 5, "--guidance-scale", 4.5)
    picture = Image.open(tmp_path / "txt2img.png")
    assert picture.size == (72, 64) and picture.mode == "RGB" and pixels("txt2img.png").std() > 20
    assert picture.text == {
        "prompt": "a photograph of ä cat", "negative_prompt": "blurry", "seed": "5", "sampler": "ddim", "steps": "5",
        "guidance_scale": "4.5", "size": "72x64", "checkpoint": "small.safetensors", "weights": "plain",
        "dtype": "fp32", "vae": "kl"}
    assert "12 tensors of the noise schedule" in said and "s a picture" in said and "GiB" in said
    assert pictures(tmp_path) == ["txt2img.png"]


def test_many_pictures_in_any_batch(draw, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  two dogs \n", encoding="utf-8")
    draw("--prompts", "prompts.txt", "--num", 2, "--seed", 7, "--output", "a.png")
    draw("--prompts", "prompts.txt", "--num", 2, "--seed", 7, "--output", "b.png", "--batch-size", 3)
    draw("--prompt", "two dogs", "--seed", 8, "--output", "c.png")
    assert pictures(tmp_path) == [f"{x}_{k:03d}.png" for x in "ab" for k in range(4)] + ["c.png"]
    for a, b in [*((f"a_{k:03d}.png", f"b_{k:03d}.png") for k in range(4)), ("a_003.png", "c.png")]:
        assert abs(pixels(a) - pixels(b)).max() <= 1
        assert Image.open(a).text == Image.open(b).text
    assert [(Image.open(f"a_{k:03d}.png").text[key]) for k in range(4) for key in ("prompt", "seed")] == [
        "a cat", "7", "a cat", "8", "two dogs", "7", "two dogs", "8"]
    assert len({pixels(f"a_{k:03d}.png").tobytes() for k in range(4)}) == 4


def test_too_long_a_prompt_is_said(draw):
    assert "prompt too long by 5 tokens, which are cut off: cat cat" in draw("--prompt", "cat " * 80)
    assert "too long" not in draw("--prompt", "cat " * 75, "--overwrite")


def test_steps_of_the_config_are_for_its_sampler(draw):
    assert "dpmpp_2m, 2 steps" in draw("--prompt", "a cat", "--sampler", "dpmpp_2m")
    assert "euler, 50 steps" in draw("--prompt", "a cat", "--sampler", "euler", "--overwrite")


def test_a_prompt_that_is_no_text(draw):
    draw("--prompt", "caf\udce9")  # Latin-1 from a terminal in UTF-8
    assert Image.open("txt2img.png").text["prompt"] == "caf?"


def test_taesd(draw, tmp_path):
    torch.save(build_decoder().state_dict(), tmp_path / "decoder.pth")
    draw("--prompt", "a cat")
    draw("--prompt", "a cat", "--vae", "taesd", "--output", "tiny.png")
    assert abs(pixels("tiny.png") - pixels("txt2img.png")).max() > 5 and Image.open("tiny.png").text["vae"] == "taesd"


@pytest.mark.parametrize("flags, says", [
    (["--height", 100], "height: 100 is not a multiple of 8"), (["--sampler", "dmpp_2m"], "did you mean dpmpp_2m?"),
    (["--output", "a.jpg"], "must end in .png"), (["--output", "no/a.png"], "cannot write into"),
    (["--guidance-scale", "nan"], "guidance_scale"), (["--dtype", "fp8"], "dtype is 'fp8'"),
    (["--steps", 0], "too few"), (["--sampler", "ddim", "--steps", 1000], "steps: 1000"),
    (["--ckpt", "no.ckpt"], "no file no.ckpt"), (["--sampler", "ddim", "--steps", 600], "right are 5 to 250"),
    (["--vae", "taesd", "--ckpt", "no.ckpt"], "taesd_decoder: no file"),  # before the model
    (["--prompts", "x.txt"], "not allowed with")])
def test_mistakes(draw, tmp_path, flags, says):
    with pytest.raises(UsageError) as error:
        draw("--prompt", "a cat", *flags)
    assert says in one_line(error) and not pictures(tmp_path)


def test_averaged_or_plain_weights(draw, model, tmp_path):
    tensors = read_tensors(model)
    averages = {"model_ema." + name[len("model."):].replace(".", ""): 0.9 * t
                for name, t in tensors.items() if name.startswith(UNET)}
    torch.save(tensors | averages, tmp_path / "both.ckpt")
    torch.save({k: v for k, v in tensors.items() if not k.startswith(UNET)} | averages, tmp_path / "averages.ckpt")
    draw("--prompt", "a cat", "--output", "none.png", "--weights", "ema")  # which this file has not
    for name, flags in (("default", []), ("ema", ["--weights", "ema"]), ("plain", ["--weights", "plain"])):
        said = draw("--prompt", "a cat", "--ckpt", "both.ckpt", "--output", f"{name}.png", *flags)
        assert ("686 tensors of plain weights, as the averaged ones are taken" in said) == (name != "plain")
    said = draw("--prompt", "a cat", "--ckpt", "averages.ckpt", "--output", "only.png")
    assert "averaged weights taken" in said and "plain weights" not in said
    for name, weights in dict(none="plain", default="ema", ema="ema", plain="plain", only="ema").items():
        assert Image.open(f"{name}.png").text["weights"] == weights
    for same, other in (("none", "plain"), ("default", "ema"), ("ema", "only")):
        assert (pixels(f"{same}.png") == pixels(f"{other}.png")).all()
    assert abs(pixels("ema.png") - pixels("plain.png")).max() > 5


def test_numbers_that_are_not_finite_are_no_picture(draw, model, tmp_path):
    tensors = read_tensors(model)
    tensors[UNET + "out.2.bias"] = torch.full((4,), 1e5)  # more than half precision knows
    torch.save(tensors, tmp_path / "large.ckpt")
    with pytest.raises(RunError) as error:
        draw("--prompt", "a cat", "--ckpt", "large.ckpt", "--dtype", "fp16")
    assert "drawing in fp16 gave values that are not finite" in one_line(error) and not pictures(tmp_path)
    assert "--dtype bf16 or fp32" in str(error.value)
    draw("--prompt", "a cat", "--ckpt", "large.ckpt", "--dtype", "bf16")


def test_files_are_not_replaced_unasked(draw, tmp_path):
    (tmp_path / "txt2img_001.png").write_text("mine")
    with pytest.raises(UsageError) as error:
        draw("--prompt", "a cat", "--num", 2)
    assert "txt2img_001.png exists" in one_line(error) and pictures(tmp_path) == ["txt2img_001.png"]
    draw("--prompt", "a cat", "--num", 2, "--overwrite")
    assert Image.open(tmp_path / "txt2img_001.png").size == (72, 64)


@pytest.mark.parametrize("content, says", [(b"", "no line with text"), (None, "cannot read"),
                                           (b"\xff\xfe", "cannot read")])
def test_prompts_that_are_none(draw, tmp_path, content, says):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UsageError) as error:
        draw("--prompts", "p.txt")
    assert says in one_line(error)


def test_too_little_memory_is_said_before_the_work(draw, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "memory_available", lambda device: 2 ** 29)
    monkeypatch.setattr(txt2img, "load_checkpoint", lambda *args: pytest.fail("loaded"))
    with pytest.raises(UsageError) as error:
        draw("--prompt", "a cat", "--height", 2048, "--width", 2048)
    message = one_line(error)
    assert "drawing 1 x 2048 x 2048 pixels in fp32 takes about" in message and "has 0.5 GiB free" in message


# ---- the config

def test_the_config_says_what_the_defaults_are():
    defaults = load_config("configs/sd15.yaml")
    assert defaults["model"] == DEFAULTS["model"]
    given = yaml.safe_load(open(os.path.join(CODE, "..", "configs", "sd15.yaml")))
    assert given["model"] == DEFAULTS["model"]
    assert defaults["sample_cfg"] == DEFAULTS["sample_cfg"] | {"steps": 20}


@pytest.mark.parametrize("content, says", [
    ("sampel_cfg: {}", "unknown key sampel_cfg; did you mean sample_cfg?"),
    ("sample_cfg: {stpes: 3}", "did you mean sample_cfg.steps?"), ("sample_cfg: 3", "sample_cfg is a section"),
    ("model: {unet: {dim: 3}}", "model.unet.dim is 3"), ("sample_cfg: {negative_prompt: 3}", "a piece of text"),
    ("devices: [gpu]", "devices is ['gpu']"), ("ema: 1", "true or false"),
    ("model: {unet: {dim: 48}}", "model.unet.dim is 48; it must be a multiple of 32"),
    ("model: {unet: {num_heads: 7}}", "num_heads is 7; it must be a divisor of the channels of each level"),
    ("model: {unet: {context_dim: 700}}", "context_dim is 700; it must be model.text_encoder.width, 768"),
    ("model: {autoencoder: {dim: 48}}", "model.autoencoder.dim is 48; it must be a multiple of 32"),
    ("model: {autoencoder: {dim_mults: [1, 2]}}", "dim_mults is [1, 2]; it must be a list of 4"),
    ("model: {text_encoder: {heads: 7}}", "heads is 7; it must be a divisor of model.text_encoder.width, 768")])
def test_config_mistakes(tmp_path, content, says):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        load_config(str(path))
    assert says in one_line(error)


# ---- the commands

def test_a_random_checkpoint_and_a_picture_of_it(draw, tmp_path):
    def python(*arguments):
        return subprocess.run([sys.executable, *map(str, arguments)], cwd=CODE, capture_output=True, text=True,
                              timeout=300)

    made = python("../tests/random_sd_checkpoint.py", tmp_path / "r.ckpt", "--half", "--config", tmp_path / "small.yaml")
    assert made.returncode == 0 and "saved" in made.stdout, made.stderr
    command = ("txt2img.py", tmp_path / "small.yaml", "--ckpt", tmp_path / "r.ckpt", "--prompt", "a cat", "--output",
               tmp_path / "r.png")
    drawn = python(*command)
    assert drawn.returncode == 0 and Image.open(tmp_path / "r.png").size == (72, 64), drawn.stderr
    again = python(*command)
    assert again.returncode == 2 and again.stderr.startswith("txt2img.py: error: --output")
    assert again.stderr.count("\n") == 1
    wrong = python("../tests/random_sd_checkpoint.py", tmp_path / "r.bin")
    assert wrong.returncode == 2 and "must end in .safetensors or .ckpt" in wrong.stderr
