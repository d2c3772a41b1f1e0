"""txt2img.py from the command line, with a small random model; its config; the memory that is free."""

import os

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import random_sd_checkpoint
import txt2img
from helpers import one_line
from libs.common import memory
from libs.common.errors import RunError, UsageError
from libs.config import CODE, defaults_of
from libs.stable_diffusion.checkpoint import UNET
from libs.stable_diffusion.config import SETTINGS, load_config
from libs.stable_diffusion.files import read_tensors
from libs.tiny_autoencoder import build_decoder
from sd_parity import SMALL, small_checkpoint


@pytest.fixture(scope="module")
def model(open_clip, tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def draw(model, tmp_path, monkeypatch, capsys):
    """draw(flags): run the script in an empty folder; returns what it printed."""
    config = {"devices": ["cpu"], "model": SMALL, "taesd_decoder": str(tmp_path / "decoder.pth"),
              "sample_cfg": {"steps": 2, "height": 64, "width": 72}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)

    def draw(*flags):
        txt2img.main(["small.yaml", "--ckpt", model, *map(str, flags)])
        return capsys.readouterr().out
    return draw


def pictures(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix == ".png")


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_one_picture_and_its_settings(draw, tmp_path):
    printed = draw("--prompt", "a photograph of ä cat \udce9", "--negative-prompt", "blurry " * 80, "--seed", 5,
                   "--sampler", "ddim", "--steps", 5, "--guidance-scale", 4.5)
    picture = Image.open(tmp_path / "txt2img.png")
    assert picture.size == (72, 64) and picture.mode == "RGB" and pixels("txt2img.png").std() > 20
    assert picture.text == {  # \udce9: Latin-1 from a terminal in UTF-8
        "prompt": "a photograph of ä cat ?", "negative_prompt": "blurry " * 80, "seed": "5", "sampler": "ddim",
        "steps": "5", "guidance_scale": "4.5", "size": "72x64", "checkpoint": "small.safetensors", "weights": "plain",
        "dtype": "fp32", "vae": "kl"}
    assert "plain weights" in printed and "s a picture" in printed
    assert "prompt too long by 5 tokens, which are cut off: blurry blurry" in printed
    with pytest.raises(UsageError) as error:
        draw("--prompt", "a cat")
    assert "txt2img.png exists" in one_line(error)


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


def test_steps_of_the_config_are_for_its_sampler():
    def steps(*flags):
        return txt2img.read_config(txt2img.parse_args(["configs/sd15.yaml", "--ckpt", "x", "--prompt", "x", *flags]))[
            "sample_cfg"]["steps"]
    assert (steps("--sampler", "dpmpp_2m"), steps("--sampler", "euler"), steps("--steps", "3")) == (20, None, 3)


def test_taesd(draw, tmp_path):
    torch.save(build_decoder().state_dict(), tmp_path / "decoder.pth")
    draw("--prompt", "a cat")
    draw("--prompt", "a cat", "--vae", "taesd", "--output", "tiny.png")
    assert abs(pixels("tiny.png") - pixels("txt2img.png")).max() > 5 and Image.open("tiny.png").text["vae"] == "taesd"


@pytest.mark.parametrize("flags, says", [
    (["--height", 100], "height: 100 is not a multiple of 8"), (["--sampler", "dmpp_2m"], "did you mean dpmpp_2m?"),
    (["--output", "a.jpg"], "must end in .png"), (["--guidance-scale", "nan"], "guidance_scale"),
    (["--ckpt", "no.ckpt"], "no file no.ckpt"), (["--sampler", "ddim", "--steps", 600], "right are 5 to 250"),
    (["--vae", "taesd"], "taesd_decoder: no file"),
    (["--prompts", "x.txt"], "not allowed with")])
def test_mistakes(draw, tmp_path, flags, says):
    with pytest.raises(UsageError) as error:
        draw("--prompt", "a cat", *flags)
    assert says in one_line(error) and not pictures(tmp_path)


@pytest.mark.parametrize("content, says", [(b"", "no line with text"), (b"\xff\xfe", "cannot read"), (None, "no regular file")])
def test_files_without_prompts(draw, tmp_path, content, says):
    if content is None:
        (tmp_path / "p.txt").symlink_to(os.devnull)
    else:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UsageError) as error:
        draw("--prompts", "p.txt")
    assert says in one_line(error)


def test_weights_that_are_averaged_or_too_large(draw, model, tmp_path):
    tensors = read_tensors(model)
    averages = {"model_ema." + name[len("model."):].replace(".", ""): t
                for name, t in tensors.items() if name.startswith(UNET)}
    tensors[UNET + "out.2.bias"] = torch.full((4,), 1e5)  # out of the range of half precision
    torch.save(tensors | averages, tmp_path / "both.ckpt")
    draw("--prompt", "a cat", "--ckpt", "both.ckpt", "--dtype", "fp16")
    assert Image.open("txt2img.png").text["weights"] == "ema"
    with pytest.raises(RunError) as error:
        draw("--prompt", "a cat", "--ckpt", "both.ckpt", "--dtype", "fp16", "--weights", "plain", "--output", "b.png")
    assert "drawing in fp16 gave values that are not finite" in one_line(error)
    assert "--dtype bf16 or fp32" in str(error.value) and pictures(tmp_path) == ["txt2img.png"]


# ---- memory

def test_too_little_memory_is_reported_before_the_work(draw, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 2 ** 29)
    monkeypatch.setattr(txt2img, "load_checkpoint", lambda *args: pytest.fail("loaded"))
    with pytest.raises(UsageError) as error:
        draw("--prompt", "a cat", "--height", 2048, "--width", 2048)
    message = one_line(error)
    assert "memory: drawing 1 x 2048 x 2048 pixels in fp32 needs about 15." in message
    assert "0.5 GiB are free on cpu" in message


def test_available_memory(tmp_path, monkeypatch):
    files, read = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB\n"}, open
    monkeypatch.setattr(memory, "open", lambda path: read(tmp_path / os.path.basename(path)), raising=False)

    def available(**changes):
        for name, text in {**files, **changes}.items():
            (tmp_path / os.path.basename(name)).write_text(text)
        return memory.available_memory()

    assert available() == 2 ** 21
    limits = {"memory.max": "1000000\n", "memory.current": "400000\n"}  # of a container
    assert available(**limits) == 600_000
    limits["memory.stat"] = "anon 100000\nfile 300000\nfile_mapped 7\n"
    assert available(**limits) == 900_000
    assert available(**limits | {"memory.max": "max\n"}) == 2 ** 21


# ---- the config

def test_the_config_is_the_defaults():
    config = load_config("configs/sd15.yaml")
    assert config["model"] == defaults_of(SETTINGS)["model"]
    with open(os.path.join(CODE, "..", "configs", "sd15.yaml")) as f:
        assert yaml.safe_load(f) == {key: config[key] for key in ("model", "sample_cfg")}


@pytest.mark.parametrize("content, says", [
    ("sample_cfg: {stpes: 3}", "did you mean sample_cfg.steps?"), ("sample_cfg: 3", "sample_cfg is a section"),
    ("model: {unet: {dim: 3}}", "model.unet.dim is 3")])
def test_config_mistakes(tmp_path, content, says):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        load_config(str(path))
    assert says in one_line(error)


def test_a_random_checkpoint_and_a_picture_of_it(draw):
    random_sd_checkpoint.main(["r.ckpt", "--half", "--config", "small.yaml"])
    draw("--prompt", "a cat", "--ckpt", "r.ckpt")
    assert pixels("txt2img.png").std() > 20
    with pytest.raises(UsageError) as error:
        random_sd_checkpoint.main(["r.bin"])
    assert "must end in .safetensors or .ckpt" in one_line(error)
