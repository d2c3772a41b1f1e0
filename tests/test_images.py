"""Sets of images: folders, .npz files, memory; to the pixel what Pillow and torchvision make of them."""

import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

from helpers import Evil, one_line, picture, tree
from libs import RunError, UsageError, build_dataset
from libs.common.files import atomic_file
from libs.data.folders import FileImages
from libs.data.images import ImageSet, read_images, to_channels, to_uint8, write_npz

CLASSES = ["cat", "dog", "wild"]


def flat(folder, images):
    """Write N x C x H x W uint8 as files of one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images):
        pixels = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{k:02d}.png")
    return str(folder)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def refused(path, match, channels=3):
    with pytest.raises(UsageError, match=match) as error:
        read_images(str(path), channels, CLASSES).take()
    one_line(error)


# ---------------------------------------------------------------- what is read

def test_a_flat_folder_is_read_in_the_order_of_its_names(tmp_path):
    images = noise(11, 3, 6, 9)
    root = flat(tmp_path / "x", images)
    for name in ("notes.txt", ".hidden.png", "._00.png"):
        (tmp_path / "x" / name).write_text("no image")
    (tmp_path / "x" / "logs").mkdir()
    found = read_images(root, 3, CLASSES)
    assert (found.shape, len(found), found.labels) == ((11, 3, 6, 9), 11, None)
    parts = list(found.batches(4))
    assert [len(p) for p in parts] == [4, 4, 3] and parts[0].dtype == torch.uint8
    assert torch.equal(torch.cat(parts), images) and torch.equal(found.take().images, images)
    flat(tmp_path / "x", noise(1, 3, 6, 9, seed=9))  # images stay on disk
    assert torch.equal(next(found.batches(2))[0], noise(1, 3, 6, 9, seed=9)[0])


def test_class_folders_give_labels_by_name(tmp_path):
    root = tree(tmp_path, {"": ["dog", "cat", "wild"]}, per_class=2)
    known = ["wild", "fox", "cat", "dog"]  # the order of another data set, and one class that is missing here
    found = read_images(root, 3, known)
    assert (found.classes, found.labels.tolist()) == (known, [2, 2, 3, 3, 0, 0])
    part = found.take(torch.tensor([4, 0]))
    assert (part.labels.tolist(), part.classes, part.shape) == ([0, 2], known, (2, 3, 40, 40))
    assert torch.equal(part.images[0], torch.from_numpy(np.array(picture(5))).permute(2, 0, 1))  # wild's first
    with pytest.raises(UsageError, match="class wild .* none of cat, dog"):
        read_images(root, 3, ["cat", "dog"])


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read_again(tmp_path, channels):
    images, labels = noise(7, channels, 5, 6), torch.tensor([3, 1, 4, 1, 5, 2, 0])
    path = str(tmp_path / "x.npz")
    write_npz(path, noise(2, 1, 4, 4))
    assert read_images(path, 1, CLASSES).labels is None
    write_npz(path, images, labels)
    found = read_images(path, channels, list("abcdef"))
    assert torch.equal(found.images, images) and torch.equal(found.labels, labels) and found.classes == list("abcdef")
    assert os.listdir(tmp_path) == ["x.npz"]
    with np.load(path, allow_pickle=False) as arrays:  # the layout of guided-diffusion's evaluation
        assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())
    assert torch.equal(read_images(path, 4 - channels, list("abcdef")).images, to_channels(images, 4 - channels))


def test_a_broken_write_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "x.npz")
    write_npz(path, noise(2, 1, 4, 4))
    before = open(path, "rb").read()
    with pytest.raises(RunError, match="no space") as error, atomic_file(path) as f:
        f.write(b"half")
        raise OSError("no space")
    one_line(error)
    with pytest.raises(KeyboardInterrupt), atomic_file(path):
        raise KeyboardInterrupt
    assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["x.npz"]
    with pytest.raises(RunError, match="cannot write"):
        write_npz(str(tmp_path / "nowhere" / "x.npz"), noise(2, 1, 4, 4))


@pytest.mark.parametrize("mode, channels", [("1", 3), ("L", 3), ("LA", 1), ("P", 1), ("RGB", 1), ("RGBA", 3), ("CMYK", 1)])
def test_channels_are_converted_as_pillow_does_it(tmp_path, mode, channels):
    image = picture(3, 24, 24).convert(mode)
    image.save(tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}")
    found = read_images(str(tmp_path), channels, CLASSES).take().images[0]
    want = image if mode in ("1", "L", "LA") else image.convert("RGB")
    want = np.array(want.convert("L" if channels == 1 else "RGB"))
    assert np.array_equal(found.squeeze(0).numpy() if channels == 1 else found.permute(1, 2, 0).numpy(), want)


def test_grey_from_rgb_is_pillows_for_every_value():
    colours = noise(3, 256, 256, seed=1)
    want = np.array(Image.fromarray(colours.permute(1, 2, 0).numpy()).convert("L"))
    assert np.array_equal(to_channels(colours, 1)[0].numpy(), want)


# ---------------------------------------------------------------- sets in memory, and of the training data

def test_a_set_of_a_data_set_is_its_centre(tmp_path):
    root = tree(tmp_path, {"": ["a", "b"]}, height=72, width=72)
    data, _, _ = build_dataset("ImageFolder", "test", root, img_size=64, value_range=(0, 1))
    found = ImageSet(data.images, data.labels, data.classes, data.img_size)
    assert found.shape == (6, 3, 64, 64) and data.images.shape[-1] == 72
    floats, labels = data.batch(torch.arange(6))
    assert torch.equal(torch.cat(list(found.batches(4))), to_uint8(floats)) and torch.equal(found.labels, labels)
    # the same files, decoded as they are asked for
    lazy = ImageSet(FileImages(sorted(str(p) for p in tmp_path.rglob("*.png")), 72), size=64)
    assert lazy.digest() == found.digest() and torch.equal(lazy.take().images, found.take().images)


def test_the_centre_of_an_oblong():
    images = noise(2, 1, 6, 9)
    assert torch.equal(next(ImageSet(images, size=4).batches()), images[:, :, 1:5, 2:6])
    assert torch.equal(next(ImageSet(images).batches()), images)


def test_the_digest_follows_the_pixels_alone():
    images = noise(120, 1, 6, 8)
    digest = ImageSet(images).digest()
    assert digest == ImageSet(images.clone(), torch.zeros(120), ["x"]).digest()
    changed = images.clone()
    changed[119, 0, 5, 7] ^= 1
    others = [changed, images[:-1], images.flip(0), images.reshape(120, 1, 8, 6), images.reshape(120, 3, 4, 4)]
    assert len({digest, *(ImageSet(x).digest() for x in others)}) == len(others) + 1


# ---------------------------------------------------------------- floats to uint8

@pytest.mark.parametrize("channels", [1, 3])
def test_uint8_is_what_save_image_writes(tmp_path, channels):
    edges = (torch.arange(256 * 4) / (255 * 4)).repeat(3)  # every level, halves and quarters between
    images = torch.cat([edges, torch.rand(3072 * 3) * 1.2 - 0.1]).reshape(-1, channels, 32, 32)
    for k, image in enumerate(images):
        save_image(image, str(tmp_path / f"{k:02d}.png"))  # which writes grey as RGB
    assert torch.equal(read_images(str(tmp_path), channels, CLASSES).take().images, to_uint8(images))
    assert to_uint8(torch.tensor([[-3.0, 0.0, 0.5, 1.0, 7.0]])).tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_images_that_are_not_finite_are_counted(bad):
    images = torch.zeros(5, 3, 4, 4)
    images[1, 2, 3, 3] = images[1, 0, 0, 0] = images[4, 0, 0, 0] = bad
    with pytest.raises(UsageError, match="2 of 5 images are not finite") as error:
        to_uint8(images)
    one_line(error)


# ---------------------------------------------------------------- bad input

def test_paths_that_hold_no_images(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: there is no such")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    refused(tmp_path / "empty", "empty has no images")
    tree(tmp_path / "both", {"": ["cat"]})
    picture(0).save(tmp_path / "both" / "a.png")
    refused(tmp_path / "both", "images and folders of images")
    refused(tmp_path / "both" / "a.png", "a.png is damaged or no .npz file")


def test_images_of_another_size_or_mode_are_named(tmp_path):
    picture(0, 20, 20).save(tmp_path / "a.png")
    picture(1, 30, 20).save(tmp_path / "b.png")
    refused(tmp_path, "b.png is 3 x 30 x 20, but .*a.png is 3 x 20 x 20")
    Image.fromarray(np.full((20, 20), 40000, dtype=np.uint16)).save(tmp_path / "b.png")
    refused(tmp_path, "b.png: Pillow's mode I;16")


@pytest.mark.parametrize("keep", [0, 1000])
def test_a_broken_image_file_is_named(tmp_path, keep):
    flat(tmp_path, noise(2, 3, 40, 40))
    (tmp_path / "01.png").write_bytes((tmp_path / "01.png").read_bytes()[:keep])
    refused(tmp_path, "broken image file .*01.png")


IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize("arrays, match", [
    (dict(arr_1=IMAGES), "no .npz file with an array arr_0"),
    (dict(arr_0=IMAGES / 255), "arr_0 is float64 2 x 4 x 4 x 3; must be uint8"),
    (dict(arr_0=IMAGES[..., 0]), "arr_0 is uint8 2 x 4 x 4; must be uint8 N x H x W x C"),
    (dict(arr_0=IMAGES[:0]), "arr_0 is uint8 0 x 4 x 4 x 3"),
    (dict(arr_0=IMAGES, labels=np.array([0])), r"labels is int64 of shape \(1,\); must be 2 integers"),
    (dict(arr_0=IMAGES, labels=np.array([0, 1.5])), "labels is float64"),
    (dict(arr_0=IMAGES, labels=np.array([-1, 1])), "labels run from -1 to 1; must be from 0 to 2"),
    (dict(arr_0=IMAGES, labels=np.array([0, 3])), "labels run from 0 to 3; must be from 0 to 2"),
])
def test_bad_arrays(tmp_path, arrays, match):
    refused(npz(tmp_path / "x.npz", **arrays), "x.npz.* " + match)


def test_damaged_npz_files(tmp_path):
    path = npz(tmp_path / "x.npz", arr_0=noise(50, 8, 8, 1).numpy())
    content = bytearray(open(path, "rb").read())
    for bad in (b"", content[:1000], content[:1500] + bytes([content[1500] ^ 1]) + content[1501:]):
        with open(path, "wb") as f:
            f.write(bad)
        refused(path, "x.npz is damaged")


def test_a_member_of_an_npz_file_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as z:
        z.writestr("arr_0", b"bytes")
    refused(tmp_path / "x.npz", "arr_0 is bytes")


def test_no_code_in_an_npz_file_is_run(tmp_path):
    mark, evil = tmp_path / "mark", np.empty(1, dtype=object)
    evil[0] = Evil(mark)
    refused(npz(tmp_path / "x.npz", arr_0=evil), "Object arrays cannot be loaded")
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as z:
        z.writestr("../arr_0.npy", "beside the folder")
    refused(tmp_path / "y.npz", "y.npz is damaged")
    assert not mark.exists() and not (tmp_path.parent / "arr_0.npy").exists()
