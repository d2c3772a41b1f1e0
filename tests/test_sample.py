"""sample.py: every kind of output, the same images whatever the batches, and what it refuses."""

import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from helpers import Place, one_line
from libs import RunError, UsageError, load_model, sampling_settings
from libs.common.pictures import folder_names, grid, write_folder, write_gif
from libs.common.seeds import image_noise
from libs.data.images import read_images, to_uint8
from libs.models import sample_images
from libs.samplers import image_generator
from libs.unet import UNet
from sample import interpolated_noise

CLASSES = ["cat", "dog"]
MODEL = ["model.label_dropout=0.1", "model.prediction=v", "model.timesteps=30", "model.beta_schedule=cosine"]
ZOOM = 4  # small images are enlarged


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An untrained model of two classes at 3 x 16 x 16, T = 30, which can be guided."""
    place = Place(tmp_path)
    place.model = place.checkpoint(*MODEL, classes=CLASSES)
    monkeypatch.chdir(tmp_path)
    return place


@pytest.fixture
def call(place):
    def call(*arguments, checkpoint=None):
        return sample.main([str(x) for x in (checkpoint or place.model, *arguments, "--device", "cpu")])
    return call


@pytest.fixture
def drawn(call):
    """drawn(arguments) -> the ImageSet of an .npz file."""
    def drawn(*arguments):
        call(*arguments, "--output", "drawn.npz", "--overwrite")
        return read_images("drawn.npz", 3, CLASSES)
    return drawn


def pixels(picture):
    """Pillow image -> int C x H x W, less the enlargement."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).int()[:, ::ZOOM, ::ZOOM]


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
    settings = sampling_settings(model, config, **given)
    return to_uint8(torch.cat([sample_images(model, torch.tensor([label]), settings, generator=image_generator(0, [k]))
                               for k, label in enumerate(labels)]))


# ---- every kind of output has the same images

def test_the_grid_has_a_row_for_each_class(place, call, capsys):
    call("--num", "3", "--output", "a.png")
    out = capsys.readouterr().out
    assert "drawing 6 images into a.png" in out and "ddim, 2 steps, 2 network calls" in out
    expected = one_by_one(place, [0, 1, 0, 1, 0, 1])
    picture = pixels(Image.open("a.png"))
    assert picture.shape == (3, 2 * 17 + 1, 3 * 17 + 1)
    assert all(close(cell(picture, k % 2, k // 2), expected[k]) for k in range(6))


@pytest.mark.parametrize("flags", [["--sampler", "ddpm"], ["--eta", "1"], ["--sampler", "euler_ancestral", "--steps", "3"],
                                   ["--sampler", "heun", "--steps", "3", "--S-churn", "2"]])
def test_image_k_is_the_same_whatever_the_batch(place, drawn, flags):
    one, six = (drawn("--num", "3", "--batch-size", size, *flags).images for size in ("1", "6"))
    assert close(one, six) and not close(one[:1], one[2:3])
    assert not close(one, drawn("--num", "3", "--seed", "1", *flags).images)


def test_a_larger_number_only_adds_images(place, drawn):
    few, many = drawn("--num", "2", "--labels", "1,0,1"), drawn("--num", "5", "--labels", "1,0,1")
    assert few.labels.tolist() == [1, 0, 1] * 2 and close(few.images, one_by_one(place, [1, 0, 1] * 2))
    assert many.labels.tolist() == [1, 0, 1] * 5 and close(many.images[:6], few.images)


@pytest.mark.parametrize("classes, folders", [(CLASSES, True), (None, False)])
def test_a_folder_of_pngs_is_read_as_the_file_is(place, call, drawn, classes, folders):
    checkpoint = place.checkpoint(*MODEL, **({"classes": classes} if classes else {}))
    expected = drawn("--num", "2")
    os.mkdir("pngs")
    for name in ("pngs", "new/"):  # an empty folder, and none
        call("--num", "2", "--output", name, checkpoint=checkpoint)
        found = read_images(name, 3, CLASSES)
        assert torch.equal(found.take().images, expected.images[[0, 2, 1, 3] if folders else [0, 1, 2, 3]])
        assert (found.labels is not None) == folders
    with pytest.raises(UsageError, match="must be new or empty"):
        call("--num", "2", "--output", "new", "--overwrite")


def test_folders_keep_to_their_place(tmp_path):
    assert folder_names(CLASSES, 2) == CLASSES
    for name in ("a", "..", "../b", "/b", "b\\c", "C:", "", ".b"):
        assert folder_names(["a", name], 2) is None, name
    write_folder(str(tmp_path / "x"), torch.full((2, 1, 8, 8), 7, dtype=torch.uint8), CLASSES)
    assert sorted(tmp_path.rglob("*.png")) == [tmp_path / "x/cat/00000.png", tmp_path / "x/dog/00001.png"]


def test_gif_goes_from_the_noise_to_the_grid(place, call, monkeypatch):
    monkeypatch.setattr(sample, "FRAMES", 4)
    call("--steps", "8", "--num", "2", "--output", "a.gif")
    call("--steps", "8", "--num", "2")  # samples.png
    frames, milliseconds = [], []
    with Image.open("a.gif") as film:
        assert film.n_frames == 5 and film.info["loop"] == 0
        for k in range(5):
            film.seek(k)
            frames.append(pixels(film))
            milliseconds.append(film.info["duration"])
    assert milliseconds == [100] * 4 + [2000]
    noise, end = to_uint8(image_noise(0, range(4), (3, 16, 16)) / 2 + 0.5), pixels(Image.open("samples.png"))
    # 256 colours a frame: pixels are near what they were
    assert (cell(frames[0], 1, 0) - noise[1].int()).abs().float().mean() < 20
    distances = [(frame - end).abs().float().mean() for frame in frames]
    assert distances[-1] < 20 and distances[-1] == min(distances) < distances[0] / 2


def test_grey_frames_stay_grey(tmp_path):
    frames = torch.randint(256, (3, 6, 1, 16, 16), dtype=torch.uint8)
    write_gif(str(tmp_path / "a.gif"), [grid(images, 3) for images in frames])
    with Image.open(tmp_path / "a.gif") as film:
        for k, images in enumerate(frames):
            film.seek(k)
            for i, image in enumerate(images):
                # 256 greys and transparency share 256 colours
                assert (cell(pixels(film), i // 3, i % 3) - image.int()).abs().max() <= 4


def test_interpolated_noise_is_standard_normal_all_the_way():
    start, end = torch.randn(2, 3, 4, 64, 64, dtype=torch.float64)
    z = interpolated_noise(start, end, 5)
    assert z.shape == (5, 3, 4, 64, 64) and torch.equal(z[0], start)
    torch.testing.assert_close(z[-1], end)
    torch.testing.assert_close(z[1], math.cos(math.pi / 8) * start + math.sin(math.pi / 8) * end)
    # 49,152 values: their variance is 1 +- 0.0064, and that of a straight line's middle would be 1/2
    assert (z.flatten(1).var(1) - 1).abs().max() < 5 * 0.0064


def test_interpolation_goes_from_one_image_to_the_next(place, call, drawn):
    ends = drawn("--num", "2").images
    call("--interpolate", "5", "--output", "i.png", "--batch-size", "3")
    picture = pixels(Image.open("i.png"))
    assert picture.shape == (3, 2 * 17 + 1, 5 * 17 + 1)
    model, config = load_model(str(place.model))
    start, end = image_noise(0, range(4), model.img_shape).chunk(2)
    middle = to_uint8(sample_images(model, torch.arange(2), sampling_settings(model, config), (start + end) / 2 ** 0.5))
    for row in (0, 1):
        assert close(cell(picture, row, 0), ends[row]) and close(cell(picture, row, 4), ends[2 + row])
        assert close(cell(picture, row, 2), middle[row])


def test_interpolation_is_without_fresh_noise(place, call):
    """Also where the sampler would add some: neighbours in a row stay similar."""
    call("--interpolate", "3", "--eta", "1", "--output", "a.png")
    call("--interpolate", "3", "--output", "b.png")
    assert torch.equal(*(pixels(Image.open(name)) for name in ("a.png", "b.png")))


def test_sheet_compares_samplers_on_the_same_noise(place, call, drawn, monkeypatch, capsys):
    bars, seen, forward = [], [], UNet.forward

    class Bar(sample.tqdm):
        def __init__(self, **options):
            super().__init__(**{**options, "disable": False})

        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(sample, "tqdm", Bar)
    monkeypatch.setattr(UNet, "forward", lambda self, x, *rest: seen.append(len(x)) or forward(self, x, *rest))
    call("--compare", "ddim:3,heun:2,ddpm", "--guidance-scale", "2", "--output", "s.png")
    calls, out = [2 * 3, 2 * 3, 2 * 30], capsys.readouterr().out
    for line, n in zip(("ddim, 3 steps", "heun, 2 steps", "ddpm, 30 steps"), calls):
        assert f"{line}, {n} network calls an image" in out
    assert sum(seen) == 2 * sum(calls) == bars[0][1] and bars[0][0] == pytest.approx(bars[0][1])  # two images
    picture = torch.from_numpy(np.array(Image.open("s.png"))).permute(2, 0, 1).int()
    assert picture.shape[1] == 3 * (20 + ZOOM * 18)
    for k, flags in enumerate((["ddim", "--steps", "3"], ["heun", "--steps", "2"], ["ddpm"])):
        images = drawn("--sampler", *flags, "--guidance-scale", "2", "--num", "1").images
        top = 20 + k * (20 + ZOOM * 18)
        assert picture[:, top - 20:top].min() < 128 and picture[:, top - 20, 0].min() == 255  # black words on white
        panel = picture[:, top:top + ZOOM * 18:ZOOM, ::ZOOM]
        assert close(cell(panel, 0, 0), images[0]) and close(cell(panel, 0, 1), images[1])


# ---- settings and checkpoints

def test_settings_reach_the_sampler(place, drawn):
    plain = drawn("--num", "1").images
    for flags, given in ((["--no-clip"], {"clip": False}),
                         (["--spacing", "quadratic", "--steps", "4"], {"spacing": "quadratic", "steps": 4}),
                         (["--guidance-scale", "3", "--guidance-interval", "0.1,1", "--steps", "6"],
                          {"guidance_scale": 3.0, "guidance_interval": (0.1, 1.0), "steps": 6})):
        images = drawn("--num", "1", *flags).images
        assert close(images, one_by_one(place, [0, 1], **given)) and not close(images, plain), flags


def test_a_run_folder_or_a_checkpoint_without_a_config(place, call):
    """Such as the course's script writes them: with --config."""
    state = torch.load(place.model, weights_only=True)
    torch.save({"state_dict": state["state_dict"], "epoch": 3}, "bare.pth.tar")
    changes = [f"{key}: {value}" for key, value in (x.removeprefix("model.").split("=") for x in MODEL)]
    text = place.config.read_text().replace("timesteps: 10", "\n  ".join([*changes, "num_classes: 2"]))
    place.config.write_text(text)
    call("--num", "1", "--output", "a.png")
    call("--num", "1", "--output", "b.png", checkpoint=place.model.parent)
    call("--num", "1", "--output", "c.png", "--config", place.config, checkpoint="bare.pth.tar")
    assert len({(place.root / f"{name}.png").read_bytes() for name in "abc"}) == 1
    with pytest.raises(UsageError, match="bare.pth.tar holds no configuration; .*--config"):
        call(checkpoint="bare.pth.tar")


# ---- what is refused, before anything is drawn

@pytest.mark.parametrize("arguments, words", [
    (["--steps", "31"], ["steps", "31", "30"]),
    (["--num", "0"], ["--num", "1 is the least"]),
    (["--sampler", "eular"], ["eular", "euler"]),
    (["--labels", "0,2"], ["label 2", "0 to 1"]),
    (["--labels", "cat"], ["--labels", "cat"]),
    (["--eta", "1", "--sampler", "heun"], ["eta", "heun"]),
    (["--guidance-interval", "3"], ["guidance_interval", "['3']", "a list of 2"]),
    (["--guidance-scale", "-1"], ["guidance_scale", "-1"]),
    (["--compare", "ddim:x"], ["sample_cfg.steps", "'x'"]),
    (["--compare", "ddim:3,heum:2"], ["heum", "heun"]),
    (["--compare", "ddim:3", "--steps", "3"], ["--compare", "--steps"]),
    (["--compare", "ddim:3", "--output", "a.npz"], ["--output", "a.npz", ".png", "--compare"]),
    (["--interpolate", "1"], ["--interpolate", "2 is the least"]),
    (["--interpolate", "3", "--num", "2"], ["--interpolate", "--num"]),
    (["--interpolate", "3", "--sampler", "ddpm"], ["--interpolate", "ddpm"]),
    (["--output", "a.jpg"], ["--output", "a.jpg", ".png", ".npz", ".gif"]),
    (["--output", "nowhere/pngs/"], ["--output", "nowhere"]),
    (["--output", "images"], ["--output", "images", "empty"]),
    (["--output", "tiny.yaml/"], ["--output", "tiny.yaml"]),
    (["--output", "there.png"], ["there.png", "--overwrite"]),
])
def test_what_is_refused(place, call, monkeypatch, capsys, arguments, words):
    (place.root / "there.png").write_bytes(b"mine")
    monkeypatch.setattr(sample, "draw_images", lambda *a, **k: pytest.fail("drawn"))
    before = place.files()
    with pytest.raises(UsageError) as error:
        call(*arguments)
    assert all(word in one_line(error) for word in words), error.value
    assert place.files() == before and "drawing" not in capsys.readouterr().out


def test_guidance_of_a_model_that_cannot_be_guided(place, call):
    with pytest.raises(UsageError, match="label_dropout"):
        call("--guidance-scale", "2", checkpoint=place.checkpoint())


@pytest.mark.parametrize("name", ["a.png", "a.npz", "a.gif", "a/"])
def test_outputs_are_whole_or_not_there(place, call, monkeypatch, name):
    if not name.endswith("/"):
        (place.root / name).write_bytes(b"old")
    before = place.files()

    def replace(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "replace", replace)
        with pytest.raises(RunError, match="No space left") as error:
            call("--num", "1", "--output", name, "--overwrite")
    assert one_line(error) and place.files() == before
    call("--num", "1", "--output", name, "--overwrite")
    assert name.endswith("/") or (place.root / name).read_bytes()[:3] != b"old"
