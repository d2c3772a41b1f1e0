"""Image folders: splits, classes, sizes and modes, and what bad files are answered with."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import one_line, picture, tree
from libs import UsageError, build_dataloader, build_dataset
from libs.datasets import ImageDataset
from libs.data.folders import decode


def load(root, split="train", name="ImageFolder", img_size=16, **options):
    return build_dataset(name, split, str(root), img_size, **options)


# ---- image folders

@pytest.mark.parametrize("splits", [{"train": ["b", "a", "c"], "test": ["c", "b", "a"]},
                                    {"train": ["b", "a", "c"], "val": ["a", "b", "c"]}], ids=["v2", "v1"])
def test_folder_splits(tmp_path, splits):
    root = tree(tmp_path, splits)
    for split in ("train", "test", "val"):
        dataset, num_classes, img_shape = load(root, split)
        assert (len(dataset), num_classes, img_shape) == (9, 3, (3, 16, 16))
        assert dataset.classes == ["a", "b", "c"] and dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert (dataset.augment, dataset.flip) == (split == "train", True)


def test_plain_tree(tmp_path):
    root = tree(tmp_path, {"": ["dog", "cat"]}, per_class=2)
    (tmp_path / ".cache").mkdir()  # hidden folders are no classes
    dataset, num_classes, _ = load(root)
    assert num_classes == 2 and dataset.classes == ["cat", "dog"] and dataset.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(UsageError, match="no folder test or val"):
        load(root, "test")


def test_labels_go_with_their_images(tmp_path):
    """Every class has its own grey level, so that a label tells which folder an image came from."""
    for k, name in enumerate(["x", "y", "z"]):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (20, 20), (80 * k + i,) * 3).save(tmp_path / name / f"{i}.png")
    dataset, _, _ = load(tmp_path)
    for images, labels in build_dataloader(dataset, 5, 0):
        assert torch.equal(((images + 1) * 127.5).round().long()[:, 0, 0, 0] // 80, labels)


def test_test_split_with_fewer_classes_is_matched_by_name(tmp_path):
    root = tree(tmp_path, {"train": ["a", "b", "c"], "test": ["c"]})
    dataset, num_classes, _ = load(root, "test")
    assert num_classes == 3 and dataset.classes == ["a", "b", "c"] and set(dataset.labels.tolist()) == {2}


def test_test_split_with_a_class_of_its_own(tmp_path):
    root = tree(tmp_path, {"train": ["a", "b"], "test": ["a", "zebra"]})
    with pytest.raises(UsageError) as error:
        load(root, "test")
    assert "zebra" in one_line(error) and "a, b" in one_line(error)


@pytest.mark.parametrize("name, low, high", [("AFHQ", 0, 1), ("MiniImageNet", 0, 1), ("ImageFolder", -1, 1)])
def test_value_ranges(tmp_path, name, low, high):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((36, 36, 3), np.uint8)
    pixels[:, 18:] = 255
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    dataset, _, _ = load(tmp_path, name=name, img_size=32)
    image, _ = dataset[0]
    assert (image.min().item(), image.max().item()) == (low, high)
    for asked in ((0, 1), (-1, 1), (0, 255)):
        image, _ = load(tmp_path, name=name, img_size=32, value_range=asked)[0][0]
        assert (image.min().item(), image.max().item()) == pytest.approx(asked)


@pytest.mark.parametrize("name", ["AFHQ", "MiniImageNet", "ImageFolder"])
def test_photographs_are_128_and_held_at_144(tmp_path, name):
    dataset, _, img_shape = build_dataset(name, "train", tree(tmp_path, {"": ["a"]}, 1))
    assert img_shape == (3, 128, 128) and dataset.images.shape == (1, 3, 144, 144)
    assert dataset.images.dtype == torch.uint8


@pytest.mark.parametrize("size", [8, 20, 64])
def test_stored_at_nine_eighths(tmp_path, size):
    dataset, _, img_shape = load(tree(tmp_path, {"": ["a"]}, 1), img_size=size)
    assert dataset.images.shape[-1] == size * 9 // 8 and dataset[0][0].shape == img_shape == (3, size, size)


def numbered(n=4, side=18):
    """Images in which no two pixels are alike, so that a crop tells where it was cut."""
    return (torch.arange(n * 3 * side * side) % 251).to(torch.uint8).reshape(n, 3, side, side)


def as_bytes(images):
    """[-1, 1] back to uint8, exactly."""
    x = (images.double() + 1) * 127.5
    assert (x - x.round()).abs().max() < 1e-4
    return x.round().byte()


def test_random_crop_is_a_crop_of_the_stored_image():
    stored = numbered()
    dataset = ImageDataset(stored, torch.zeros(4).long(), ["a"], img_size=16, augment=True)
    seen = set()
    for seed in range(30):
        images, _ = dataset.batch(torch.arange(4), torch.Generator().manual_seed(seed))
        for image, whole in zip(as_bytes(images), stored):
            places = [(i, j) for i in range(3) for j in range(3)
                      if torch.equal(image, whole[:, i:i + 16, j:j + 16])]
            assert len(places) == 1
            seen.update(places)
    assert len(seen) == 9  # every place, both borders too


def test_test_images_are_the_centre():
    stored = numbered()
    dataset = ImageDataset(stored, torch.zeros(4).long(), ["a"], img_size=16)
    assert torch.equal(as_bytes(dataset.batch(torch.arange(4))[0]), stored[:, :, 1:17, 1:17])
    odd = ImageDataset(stored, torch.zeros(4).long(), ["a"], img_size=15)
    assert torch.equal(as_bytes(odd.batch(torch.arange(4))[0]), stored[:, :, 1:16, 1:16])


def test_half_are_flipped_each_on_its_own():
    stored = numbered(1).expand(2000, -1, -1, -1)
    dataset = ImageDataset(stored, torch.zeros(2000).long(), ["a"], augment=True, flip=True)
    images = as_bytes(dataset.batch(torch.arange(2000), torch.Generator().manual_seed(0))[0])
    flipped = (images == stored.flip(-1)).flatten(1).all(1)
    assert ((images == stored).flatten(1).all(1) ^ flipped).all()
    assert 900 < flipped.sum() < 1100  # 4.5 standard deviations
    dataset.flip = False
    assert torch.equal(as_bytes(dataset.batch(torch.arange(9))[0]), stored[:9])


def test_flip_only_where_a_mirror_image_is_one_too(tmp_path):
    root = tree(tmp_path, {"train": ["a"], "test": ["a"]})
    assert load(root)[0].flip and not load(root, "test")[0].augment


# ---- image files

@pytest.mark.parametrize("height, width", [(40, 80), (80, 40), (37, 53), (10, 200), (1, 1)])
def test_not_square(tmp_path, height, width):
    """The middle of the long side is kept: a mark in the middle stays there, the ends are cut off."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 255 * (np.abs(np.arange(height) - (height - 1) / 2) <= height / 4)[:, None]
    pixels[..., 1] = 255 * (np.abs(np.arange(width) - (width - 1) / 2) <= min(height, width))[None]
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = decode(str(tmp_path / "x.png"), 18)
    assert image.shape == (3, 18, 18) and image.dtype == torch.uint8
    if width > height > 1:
        assert image[1].min() == 255 and image[0, 9].min() > 250 and image[0, 0].max() < 5


@pytest.mark.parametrize("mode, name", [("L", "x.png"), ("P", "x.png"), ("P", "x.gif"), ("RGBA", "x.png"),
                                        ("LA", "x.png"), ("CMYK", "x.jpg"), ("RGB", "x.jpg"), ("L", "x.jpg"),
                                        ("RGB", "x.bmp"), ("RGB", "x.webp"), ("RGB", "x.tif"), ("1", "x.png")])
def test_every_mode_becomes_rgb(tmp_path, mode, name):
    path = str(tmp_path / name)
    original = picture(1).convert(mode)
    original.save(path)
    image = decode(path, 40)
    wanted = np.asarray(original.convert("RGB"), float).transpose(2, 0, 1)
    assert image.shape == (3, 40, 40)
    assert np.abs(image.numpy() - wanted).mean() < 6  # JPEG and WebP lose a little


def test_sixteen_bits_of_grey_keep_their_levels(tmp_path):
    levels = np.linspace(0, 65535, 40 * 40).reshape(40, 40)
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "x.png")
    image = decode(str(tmp_path / "x.png"), 40)
    assert np.abs(image[0].numpy() - levels / 257).max() < 3


@pytest.mark.parametrize("orientation, turn", [(1, 0), (3, 180), (6, 270), (8, 90)])
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


# ---- folders and files that cannot be

def test_missing_folder(tmp_path):
    with pytest.raises(UsageError) as error:
        load(tmp_path / "nowhere")
    assert "dataset.data_folder" in one_line(error) and "nowhere" in one_line(error)


def test_no_class_folders(tmp_path):
    picture(1).save(tmp_path / "x.png")
    with pytest.raises(UsageError, match="no class folders"):
        load(tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_class_folder(tmp_path, split):
    root = tree(tmp_path, {"train": ["a", "b"], "test": ["a", "b"]})
    for file in (tmp_path / split / "b").iterdir():
        file.unlink()
    with pytest.raises(UsageError) as error:
        load(root, split)
    assert os.path.join(split, "b") in one_line(error) and "no images" in one_line(error)


def broken_file(kind):
    whole = io.BytesIO()
    picture(1, 80, 80).save(whole, "JPEG", quality=95)
    whole = whole.getvalue()
    return {"text": b"this is no image", "empty": b"", "truncated": whole[:len(whole) // 2],
            "header": whole[:20], "zeros": bytes(1000)}[kind]


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "header", "zeros"])
def test_broken_image_is_named(tmp_path, kind):
    root = tree(tmp_path, {"": ["a", "b"]})
    (tmp_path / "b" / "broken.jpg").write_bytes(broken_file(kind))
    with pytest.raises(UsageError) as error:
        load(root)
    assert str(tmp_path / "b" / "broken.jpg") in one_line(error)


def test_a_folder_called_like_an_image(tmp_path):
    root = tree(tmp_path, {"": ["a"]})
    (tmp_path / "a" / "folder.png").mkdir()
    with pytest.raises(UsageError, match="folder.png"):
        load(root)


@pytest.mark.parametrize("name, split, said", [("Mnist", "train", "'Mnist'"), ("MNIST", "training", "'training'")])
def test_unknown_name_or_split(tmp_path, name, split, said):
    with pytest.raises(UsageError) as error:
        build_dataset(name, split, str(tmp_path / "data"))
    assert said in one_line(error) and not (tmp_path / "data").exists()
