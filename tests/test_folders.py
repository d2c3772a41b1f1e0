"""Image folders: splits, classes, sizes and modes, and the errors for bad files."""

import io
import os
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import one_line, picture, tree
from libs import UsageError, build_dataloader, build_dataset
from libs.data import folders
from libs.data.folders import decode
from libs.data.images import read_images


def load(root, split="train", name="ImageFolder", img_size=16, **options):
    return build_dataset(name, split, str(root), img_size, **options)


# ---- splits and classes

@pytest.mark.parametrize("test", ["test", "val"], ids=["AFHQ v2", "AFHQ v1"])
def test_folder_splits(tmp_path, test):
    root = tree(tmp_path, {"train": ["b", "a", "c"], test: ["c", "b", "a"]})
    for split in ("train", "test", "val"):
        dataset, num_classes, img_shape = load(root, split)
        assert (len(dataset), num_classes, img_shape) == (9, 3, (3, 16, 16))
        assert dataset.classes == ["a", "b", "c"] and dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert (dataset.augment, dataset.flip) == (split == "train", True)


@pytest.mark.parametrize("folder", ["", "train", "test"])
def test_a_folder_of_class_folders_is_taken_as_it_is_for_any_split(tmp_path, folder):
    tree(tmp_path, {folder: ["dog", "cat"]}, per_class=2)
    (tmp_path / folder / ".cache").mkdir()  # hidden folders are no classes
    for split in ("train", "test", "val"):
        dataset, num_classes, _ = load(tmp_path / folder, split, "AFHQ")
        assert num_classes == 2 and dataset.classes == ["cat", "dog"] and dataset.labels.tolist() == [0, 0, 1, 1]
        assert dataset.augment == (split == "train")
    if folder:
        with pytest.raises(UsageError, match="has no folder"):
            load(tmp_path, "test" if folder == "train" else "train")


def test_labels_go_with_their_images(tmp_path):
    """Every class has its own grey level, so that a label tells which folder an image came from."""
    for k, name in enumerate(["x", "y", "z"]):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (20, 20), (80 * k + i,) * 3).save(tmp_path / name / f"{i}.png")
    dataset, _, _ = load(tmp_path)
    for images, labels in build_dataloader(dataset, 5, 0):
        assert torch.equal(((images + 1) * 127.5).round().long()[:, 0, 0, 0] // 80, labels)


def test_test_classes_are_matched_by_name(tmp_path):
    root = tree(tmp_path, {"train": ["a", "b", "c"], "test": ["c"]})
    dataset, num_classes, _ = load(root, "test")
    assert num_classes == 3 and dataset.classes == ["a", "b", "c"] and set(dataset.labels.tolist()) == {2}
    tree(tmp_path, {"test": ["zebra"]})
    with pytest.raises(UsageError) as error:
        load(root, "test")
    assert "zebra" in one_line(error) and "a, b, c" in one_line(error)


@pytest.mark.parametrize("name, low, high", [("AFHQ", 0, 1), ("MiniImageNet", 0, 1), ("ImageFolder", -1, 1)])
def test_sizes_and_value_ranges(tmp_path, name, low, high):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((36, 36, 3), np.uint8)
    pixels[:, 18:] = 255
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    for size, stored in ((None, 144), (32, 36)):
        dataset, _, img_shape = load(tmp_path, name=name, img_size=size)
        assert img_shape == (3, size or 128, size or 128) == dataset[0][0].shape
        assert dataset.images.shape == (1, 3, stored, stored) and dataset.images.dtype == torch.uint8
        assert (dataset[0][0].min().item(), dataset[0][0].max().item()) == (low, high)
    for given in ((0, 1), (-1, 1), (0, 255)):
        image, _ = load(tmp_path, name=name, img_size=32, value_range=given)[0][0]
        assert (image.min().item(), image.max().item()) == pytest.approx(given)


# ---- image files

@pytest.mark.parametrize("height, width", [(40, 80), (10, 200), (80, 40), (1, 1)])
def test_not_square(tmp_path, height, width):
    """The middle of the long side is kept: a mark in the middle stays there, the ends are cut off."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 255 * (np.abs(np.arange(height) - (height - 1) / 2) <= height / 4)[:, None]
    pixels[..., 1] = 255 * (np.abs(np.arange(width) - (width - 1) / 2) <= min(height, width))[None]
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = decode(str(tmp_path / "x.png"), 18)
    assert image.shape == (3, 18, 18) and image.dtype == torch.uint8
    if width > height:
        assert image[1].min() == 255 and image[0, 9].min() > 250 and image[0, 0].max() < 5


@pytest.mark.parametrize("mode, name", [("L", "x.png"), ("P", "x.gif"), ("RGBA", "x.png"), ("LA", "x.png"),
                                        ("CMYK", "x.jpg"), ("RGB", "x.jpg"), ("RGB", "x.webp"), ("1", "x.png")])
def test_every_mode_becomes_rgb(tmp_path, mode, name):
    original = picture(1).convert(mode)
    original.save(tmp_path / name)
    image = decode(str(tmp_path / name), 40)
    wanted = np.asarray(original.convert("RGB"), float).transpose(2, 0, 1)
    assert image.shape == (3, 40, 40)
    assert np.abs(image.numpy() - wanted).mean() < 6  # JPEG and WebP lose a little


def test_sixteen_bits_of_grey_keep_their_levels(tmp_path):
    levels = np.linspace(0, 65535, 40 * 40).reshape(40, 40)
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "x.png")
    assert np.abs(decode(str(tmp_path / "x.png"), 40)[0].numpy() - levels / 257).max() < 3


@pytest.mark.parametrize("orientation, turn", [(3, 180), (6, 270)])
def test_a_camera_held_sideways(tmp_path, orientation, turn):
    """EXIF says how to turn the stored picture upright."""
    original = picture(3, 40, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    original.save(tmp_path / "x.jpg", exif=exif, quality=95)
    wanted = np.asarray(original.rotate(turn, expand=True), float).transpose(2, 0, 1)
    assert np.abs(decode(str(tmp_path / "x.jpg"), 40).numpy() - wanted).mean() < 4


def test_only_images_count_whatever_the_case(tmp_path):
    root = tree(tmp_path, {"": ["a"]}, per_class=2)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    picture(9).save(tmp_path / "a" / "Z.JPG", "JPEG")
    (tmp_path / "a" / "._0.png").write_bytes(bytes(100))  # what macOS leaves beside 0.png
    assert len(load(root)[0]) == 3


# ---- mistakes

def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UsageError) as error:
        load(tmp_path / "nowhere")
    assert "dataset.data_folder" in one_line(error) and "nowhere" in one_line(error)
    picture(1).save(tmp_path / "x.png")
    with pytest.raises(UsageError, match="no class folders"):
        load(tmp_path)
    root = tree(tmp_path, {"train": ["a"], "test": ["a"]})
    (tmp_path / "test" / "b").mkdir()
    (tmp_path / "train" / "b").mkdir()
    for split in ("train", "test"):
        with pytest.raises(UsageError) as error:
            load(root, split)
        assert os.path.join(split, "b") in one_line(error) and "no images" in one_line(error)


@pytest.mark.parametrize("kind", ["text", "truncated", "folder"])
def test_broken_image_is_named(tmp_path, kind):
    root = tree(tmp_path, {"": ["a", "b"]})
    path, whole = tmp_path / "b" / "broken.jpg", io.BytesIO()
    picture(1, 80, 80).save(whole, "JPEG", quality=95)
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"this is no image" if kind == "text" else whole.getvalue()[:len(whole.getvalue()) // 2])
    with pytest.raises(UsageError) as error:
        load(root)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("name, split, said", [("Mnist", "train", "'Mnist'"), ("MNIST", "training", "'training'")])
def test_unknown_name_or_split(tmp_path, name, split, said):
    with pytest.raises(UsageError) as error:
        build_dataset(name, split, str(tmp_path / "data"))
    assert said in one_line(error) and not (tmp_path / "data").exists()


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """As root, who runs many tests, may read everything, the system's answer is made up."""
    root, scandir = tree(tmp_path, {"": ["a", "b"]}), os.scandir

    def forbidden(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    for key, read in (("dataset.data_folder", load), ("images", lambda root: read_images(root, 3, ["a", "b"]))):
        with pytest.raises(UsageError, match=f"^{key}: cannot read the folder .*b .Permission denied") as error:
            read(root)
        one_line(error)


# ---- memory

def test_a_photograph_of_fifty_megapixels(tmp_path):
    Image.new("L", (8192, 6144), 77).save(tmp_path / "x.png")
    assert torch.equal(decode(str(tmp_path / "x.png"), 16), torch.full((3, 16, 16), 77, dtype=torch.uint8))


def test_few_pixels_are_decoded_at_once(tmp_path, monkeypatch):
    """Images of 3 megapixels where 7 are allowed: of eight threads two decode, and none waits for ever."""
    Image.new("1", (2000, 1250)).save(tmp_path / "x.png")
    monkeypatch.setattr(folders, "MEGAPIXELS", 7)
    monkeypatch.setattr(folders, "megapixels_left", threading.Semaphore(7))
    inside, most, lock = 0, 0, threading.Lock()

    def use(fails):
        nonlocal inside, most
        with folders.open_image(str(tmp_path / "x.png")):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            with lock:
                inside -= 1
            if fails:
                raise ValueError("broken")

    with folders.ThreadPoolExecutor(8) as pool:
        done = [pool.submit(use, k % 3 == 0) for k in range(16)]
    assert most == 2 and sum(isinstance(future.exception(), UsageError) for future in done) == 6
    Image.new("1", (2000, 3500)).save(tmp_path / "x.png")
    with pytest.raises(UsageError, match="2000 x 3500; must be below 7 megapixels"):
        decode(str(tmp_path / "x.png"), 16)


def test_pillow_does_not_warn(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # as folders.py has it; pytest sets filters of its own
        Image.new("1", (9500, 9500)).save(tmp_path / "x.png")  # from 89 megapixels on Pillow warns
        decode(str(tmp_path / "x.png"), 16)
    assert not caught
