"""sample.py: every kind of output, the same images whatever the batches, and what it refuses."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from helpers import Place, one_line
from libs import RunError, UsageError, load_model, sampling_settings
from libs.common.pictures import folder_names, write_folder
from libs.data.images import read_images, to_uint8
from libs.models import sample_images
from libs.samplers import image_generator

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
    (["--num", "0"], ["--num", "from 1 to 10"]),
    (["--sampler", "eular"], ["eular", "euler"]),
    (["--labels", "0,2"], ["label 2", "0 to 1"]),
    (["--labels", "cat"], ["--labels", "cat"]),
    (["--eta", "1", "--sampler", "heun"], ["eta", "heun"]),
    (["--guidance-interval", "3"], ["guidance_interval", "['3']", "a list of 2"]),
    (["--guidance-scale", "-1"], ["guidance_scale", "-1"]),
    (["--output", "a.jpg"], ["--output", "a.jpg", ".png", ".npz"]),
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


@pytest.mark.parametrize("name", ["a.png", "a.npz", "a/"])
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
