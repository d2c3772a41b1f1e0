"""sample.py as a user runs it: every kind of output, the same images whatever the batches, and what it refuses."""

import math
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from libs.common.cli import run
from helpers import Place
from libs import load_model, sampling_options
from libs.diffusion import Diffusion
from libs.drawing import interpolated_noise
from libs.data.images import read_images, to_uint8
from libs.common.pictures import folder_names, grid, write_folder, write_gif
from libs.samplers import image_generator
from libs.common.seeds import image_noise
from libs.unet import UNet

CLASSES = ["cat", "dog"]
MODEL = ["model.label_dropout=0.1", "model.scale_betas=true", "model.prediction=v", "model.timesteps=30"]


@pytest.fixture
def place(tmp_path):
    """An untrained model of two classes at 3 x 16 x 16, T = 30, which can be guided."""
    place = Place(tmp_path)
    place.model = place.checkpoint(*MODEL, classes=CLASSES)
    return place


@pytest.fixture
def call(place, monkeypatch, capsys):
    """call(arguments) -> (exit status, standard output, standard error) of sample.py in this process."""
    def call(*arguments, checkpoint=None):
        monkeypatch.chdir(place.root)
        words = [checkpoint or place.model, *arguments, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        with pytest.raises(SystemExit) as e:
            run(sample.main)
        return e.value.code or 0, *capsys.readouterr()
    return call


@pytest.fixture
def drawn(place, call):
    """drawn(arguments) -> the ImageSet of an .npz file."""
    def drawn(*arguments):
        status, _, err = call(*arguments, "--output", "drawn.npz", "--overwrite")
        assert status == 0, err
        return read_images(str(place.root / "drawn.npz"))
    return drawn


def pixels(picture):
    """Pillow image -> int C x H x W."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).int()


def cell(picture, row, column, size=16):
    """Of a grid with one pixel between the images."""
    top, left = 1 + row * (size + 1), 1 + column * (size + 1)
    return picture[:, top:top + size, left:left + size]


def close(a, b):
    """Equal but for the rounding to a grey level."""
    return (a.int() - b.int()).abs().max() <= 1


def one_by_one(place, labels, **given):
    """The images that the library draws for these labels, each alone, number k from its own generator."""
    model, config = load_model(str(place.model))
    options = sampling_options(config, **given)
    return to_uint8(torch.cat([model.sample(torch.tensor([label]), generator=image_generator(0, [k]), **options)
                               for k, label in enumerate(labels)]))


# ---- every kind of output has the same images

def test_the_grid_has_a_row_for_each_class(place, call):
    status, out, err = call("--num", "3", "--output", "a.png")
    assert status == 0 and "drawing 6 images into a.png" in out and "ddim, 2 steps, 2 network calls" in out, err
    expected = one_by_one(place, [0, 1, 0, 1, 0, 1])
    picture = pixels(Image.open(place.root / "a.png"))
    assert picture.shape == (3, 2 * 17 + 1, 3 * 17 + 1)
    for k in range(6):
        assert close(cell(picture, k % 2, k // 2), expected[k]), k


@pytest.mark.parametrize("way", [["--sampler", "ddpm"], ["--eta", "1"],
                                 ["--sampler", "euler_ancestral", "--steps", "3"],
                                 ["--sampler", "heun", "--steps", "3", "--S-churn", "2"]])
def test_image_k_is_the_same_whatever_the_batch(place, drawn, way):
    one, six = (drawn("--num", "3", "--batch-size", size, *way).images for size in ("1", "6"))
    assert close(one, six) and not close(one[:1], one[2:3])
    other = drawn("--num", "3", "--seed", "1", *way).images
    assert not close(one, other)


def test_a_file_has_images_and_labels_and_more_only_adds(place, drawn):
    few, many = drawn("--num", "2", "--labels", "1,0,1"), drawn("--num", "5", "--labels", "1,0,1")
    assert few.shape == (6, 3, 16, 16) and few.labels.tolist() == [1, 0, 1] * 2
    assert close(few.images, one_by_one(place, [1, 0, 1] * 2))
    assert many.labels.tolist() == [1, 0, 1] * 5 and close(many.images[:6], few.images)


@pytest.mark.parametrize("classes, folders", [(CLASSES, True), (None, False), (["T-shirt/top", "dog"], False)])
def test_a_folder_of_pngs_is_read_as_the_file_is(place, call, drawn, classes, folders):
    checkpoint = place.checkpoint(*MODEL, **({"classes": classes} if classes else {}))
    expected = drawn("--num", "2")
    (place.root / "pngs").mkdir()
    for name in ("pngs", "new/"):  # an empty folder, and none
        status, out, err = call("--num", "2", "--output", name, checkpoint=checkpoint)
        assert status == 0 and ("a folder for each class" in out) == folders, err
        found = read_images(str(place.root / name), classes=classes if folders else None)
        order = [0, 2, 1, 3] if folders else [0, 1, 2, 3]
        assert torch.equal(found.take().images, expected.images[order])
        assert (found.labels is not None) == folders and (not folders or found.labels.tolist() == [0, 0, 1, 1])
    status, _, err = call("--num", "2", "--output", "new", "--overwrite")
    assert status == 2 and "must be new or empty" in err
    assert not list(place.root.glob("*.partial"))


def test_gif_goes_from_the_noise_to_the_grid(place, call):
    assert call("--steps", "4", "--gif", "--num", "2")[0] == 0
    assert call("--steps", "4", "--num", "2")[0] == 0  # samples.gif and samples.png
    with Image.open(place.root / "samples.gif") as film:
        assert film.n_frames == 5 and film.info["loop"] == 0
        frames, milliseconds = [], []
        for k in range(5):
            film.seek(k)
            frames.append(pixels(film))
            milliseconds.append(film.info["duration"])
    assert milliseconds == [100] * 4 + [2000]
    # 256 colours a frame: pixels are near what they were
    noise = to_uint8(image_noise(0, range(4), (3, 16, 16)) / 2 + 0.5)
    assert (cell(frames[0], 1, 0) - noise[1].int()).abs().float().mean() < 20
    end = pixels(Image.open(place.root / "samples.png"))
    distances = [(frame - end).abs().float().mean() for frame in frames]
    assert distances[-1] < 20 and distances[-1] < distances[0] / 3


def test_grey_frames_stay_grey(tmp_path):
    frames = torch.randint(256, (3, 6, 1, 16, 16), dtype=torch.uint8)
    write_gif(str(tmp_path / "a.gif"), [grid(images, 3) for images in frames])
    with Image.open(tmp_path / "a.gif") as film:
        for k, images in enumerate(frames):
            film.seek(k)
            for i, image in enumerate(images):
                # 256 greys and transparency share 256 colours
                assert (cell(pixels(film), i // 3, i % 3) - image.int()).abs().max() <= 4


def test_a_long_denoising_is_thinned_out(place, call, monkeypatch):
    monkeypatch.setattr(sample, "FRAMES", 4)
    status, out, err = call("--sampler", "ddpm", "--output", "a.gif", "--num", "1")
    assert status == 0 and "5 frames" in out, err
    with Image.open(place.root / "a.gif") as film:
        assert film.n_frames == 5


# ---- interpolation

def test_interpolated_noise_is_standard_normal_all_the_way():
    start, end = torch.randn(2, 3, 4, 64, 64, dtype=torch.float64)
    z = interpolated_noise(start, end, 5)
    assert z.shape == (5, 3, 4, 64, 64) and torch.equal(z[0], start)
    torch.testing.assert_close(z[-1], end)
    torch.testing.assert_close(z[2], (start + end) / 2 ** 0.5)
    torch.testing.assert_close(z[1], math.cos(math.pi / 8) * start + math.sin(math.pi / 8) * end)
    # 49,152 values: their variance is 1 +- 0.0064, and that of a straight line's middle would be 1/2
    assert (z.flatten(1).var(1) - 1).abs().max() < 5 * 0.0064


def test_interpolation_goes_from_one_image_to_the_next(place, call, drawn):
    ends = drawn("--num", "2").images
    assert call("--interpolate", "5", "--output", "i.png", "--batch-size", "3")[0] == 0
    picture = pixels(Image.open(place.root / "i.png"))
    assert picture.shape == (3, 2 * 17 + 1, 5 * 17 + 1)
    model, config = load_model(str(place.model))
    start, end = image_noise(0, range(4), model.img_shape).chunk(2)
    middle = model.sample(torch.tensor([0, 1]), noise=(start + end) / 2 ** 0.5, **sampling_options(config))
    for row in (0, 1):
        assert close(cell(picture, row, 0), ends[row]) and close(cell(picture, row, 4), ends[2 + row])
        assert close(cell(picture, row, 2), to_uint8(middle)[row])


# ---- the sheet

def test_sheet_compares_the_ways_on_the_same_noise(place, call, drawn, monkeypatch):
    seen, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *rest: seen.append(len(x)) or forward(self, x, *rest))
    status, out, err = call("--compare", "ddim:3,heun:2,ddpm", "--guidance-scale", "2", "--output", "s.png")
    assert status == 0, err
    calls = [2 * 3, 2 * 3, 2 * 30]
    for line, n in zip(("ddim, 3 steps", "heun, 2 steps", "ddpm, 30 steps"), calls):
        assert f"{line}, {n} network calls an image" in out
    assert sum(seen) == 2 * sum(calls)  # two images
    sheet = pixels(Image.open(place.root / "s.png"))
    for k, way in enumerate((["ddim", "--steps", "3"], ["heun", "--steps", "2"], ["ddpm"])):
        images = drawn("--sampler", *way, "--guidance-scale", "2", "--num", "1").images
        top = 20 + k * (20 + 4 * 18)
        assert sheet[:, top - 20:top].min() < 128 and sheet[:, top - 20, 0].min() == 255  # black words on white
        for column in (0, 1):  # enlarged four times
            left = 4 * (1 + 17 * column)
            assert close(sheet[:, top + 4:top + 68:4, left:left + 64:4], images[column])
    assert sheet.shape[1] == 3 * (20 + 4 * 18)


def test_the_bar_ends_at_the_end(place, call, monkeypatch):
    bars = []

    class Bar(sample.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

        def __init__(self, **options):
            super().__init__(**{**options, "disable": False})

    monkeypatch.setattr(sample, "tqdm", Bar)
    status, _, err = call("--compare", "ddim:3,heun:4", "--num", "3", "--batch-size", "4")
    assert status == 0 and "left" in err and "100 %" in err
    assert bars[0][1] == 6 * (3 + 7) and bars[0][0] == pytest.approx(bars[0][1])


# ---- settings reach the sampler; a run folder is a checkpoint

def test_settings_reach_the_sampler(place, drawn):
    plain = drawn("--num", "1").images
    for flags, given in ((["--no-clip"], {"clip": False}),
                         (["--spacing", "quadratic", "--steps", "4"], {"spacing": "quadratic", "steps": 4}),
                         (["--guidance-scale", "3"], {"guidance_scale": 3.0}),
                         (["--guidance-scale", "3", "--guidance-interval", "0.1,1", "--steps", "6"],
                          {"guidance_scale": 3.0, "guidance_interval": (0.1, 1.0), "steps": 6})):
        images = drawn("--num", "1", *flags).images
        assert close(images, one_by_one(place, [0, 1], **given)) and not close(images, plain), flags


def test_a_run_folder_is_as_good_as_its_checkpoint(place, call):
    assert call("--num", "1", "--output", "a.png", checkpoint=place.model.parent)[0] == 0
    assert call("--num", "1", "--output", "b.png")[0] == 0
    assert (place.root / "a.png").read_bytes() == (place.root / "b.png").read_bytes()


# ---- what is refused, before anything is drawn

@pytest.mark.parametrize("arguments, words", [
    (["--steps", "0"], ["--steps", "1 is the least"]),
    (["--steps", "31"], ["steps", "31", "30"]),
    (["--num", "0"], ["--num"]),
    (["--sampler", "eular"], ["eular", "euler"]),
    (["--labels", "0,2"], ["label 2", "0 to 1"]),
    (["--labels", "cat"], ["--labels", "cat"]),
    (["--labels", "1" + "0" * 30], ["--labels"]),
    (["--eta", "2"], ["eta", "2", "0 and 1"]),
    (["--eta", "1", "--sampler", "heun"], ["eta", "heun"]),
    (["--S-churn", "1"], ["S_churn", "ddim"]),
    (["--spacing", "even"], ["--spacing", "quadratic"]),
    (["--guidance-interval", "3"], ["--guidance-interval", "3"]),
    (["--guidance-interval", "5,1"], ["guidance_interval", "5"]),
    (["--guidance-scale", "-1"], ["guidance_scale", "-1"]),
    (["--compare", "ddim:x"], ["--compare", "ddim:x"]),
    (["--compare", "ddim:3,heum:2"], ["heum", "heun"]),
    (["--compare", "ddim:0"], ["steps", "0"]),
    (["--compare", "ddim:3", "--steps", "3"], ["--compare", "--steps"]),
    (["--compare", "ddim:3", "--output", "a.npz"], ["--output", "a.npz", ".png", "--compare"]),
    (["--compare", "ddim:3", "--gif"], ["--compare", "--gif"]),
    (["--gif", "--output", "a.png"], ["--output", "a.png", ".gif"]),
    (["--interpolate", "1"], ["--interpolate", "2 is the least"]),
    (["--interpolate", "3", "--num", "2"], ["--interpolate", "--num"]),
    (["--interpolate", "3", "--sampler", "ddpm"], ["--interpolate", "ddpm"]),
    (["--interpolate", "3", "--eta", "0.5"], ["--interpolate", "ddim"]),
    (["--interpolate", "3", "--sampler", "euler_ancestral"], ["--interpolate", "euler_ancestral"]),
    (["--interpolate", "3", "--sampler", "heun", "--S-churn", "1"], ["--interpolate", "heun"]),
    (["--output", "a.jpg"], ["--output", "a.jpg", ".png", ".npz", ".gif"]),
    (["--output", "nowhere/a.png"], ["--output", "nowhere"]),
    (["--output", "nowhere/pngs/"], ["--output", "nowhere"]),
    (["--output", "images"], ["--output", "images", "empty"]),
    (["--output", "tiny.yaml/"], ["--output", "tiny.yaml"]),
    (["--output", "there.png"], ["there.png", "--overwrite"]),
])
def test_what_is_refused(place, call, monkeypatch, arguments, words):
    (place.root / "there.png").write_bytes(b"mine")
    monkeypatch.setattr(Diffusion, "sample", lambda *a, **k: pytest.fail("drawn"))
    before = place.files()
    status, out, err = call(*arguments)
    assert status == 2 and len(err.splitlines()) == 1 and all(w in err for w in words), err
    assert place.files() == before and (place.root / "there.png").read_bytes() == b"mine" and "drawing" not in out


def test_guidance_of_a_model_that_cannot_be_guided(place, call):
    status, _, err = call("--guidance-scale", "2", checkpoint=place.checkpoint())
    assert status == 2 and "label_dropout" in err and len(err.splitlines()) == 1
    status, _, err = call(checkpoint=place.root)
    assert status == 2 and "model_final.pth.tar" in err and len(err.splitlines()) == 1


def test_overwrite_replaces(place, call):
    for name in ("a.png", "a.npz", "a.gif"):
        (place.root / name).write_bytes(b"old")
        assert call("--num", "1", "--output", name, "--overwrite")[0] == 0
        assert (place.root / name).read_bytes()[:3] != b"old"


# ---- outputs are whole or not there

@pytest.mark.parametrize("name", ["a.png", "a.npz", "a.gif", "a/"])
def test_a_failure_at_the_end_leaves_nothing(place, call, monkeypatch, name):
    def replace(*paths):
        raise OSError(28, "No space left on device")

    before = place.files()
    monkeypatch.setattr(os, "replace", replace)
    status, _, err = call("--num", "1", "--output", name)
    assert status == 1 and "No space left" in err and len(err.splitlines()) == 1
    assert place.files() == before


def test_folders_keep_to_their_place(tmp_path):
    assert folder_names(CLASSES, 2) == CLASSES
    for name in ("a", "..", "../b", "/b", "b\\c", "C:", "", ".b"):
        assert folder_names(["a", name], 2) is None, name
    assert folder_names(None, 2) is None and folder_names(["a"], 2) is None
    write_folder(str(tmp_path / "x"), torch.full((2, 1, 8, 8), 7, dtype=torch.uint8), CLASSES)
    assert sorted(tmp_path.rglob("*.png")) == [tmp_path / "x/cat/00000.png", tmp_path / "x/dog/00001.png"]
