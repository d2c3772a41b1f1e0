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
from libs.data.folders import FileImages
from libs.common.files import atomic_file
from libs.data.images import ImageSet, read_images, to_channels, to_uint8, write_npz


def flat(folder, images, names="{:02d}.png"):
    """Write N x C x H x W uint8 as files of one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images):
        pixels = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / names.format(k))
    return str(folder)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- what is read

@pytest.mark.parametrize("channels", [1, 3])
def test_a_flat_folder_is_read_in_the_order_of_its_names(tmp_path, channels):
    images = noise(11, channels, 6, 9)
    found = read_images(flat(tmp_path / "x", images))
    assert (found.shape, len(found), found.labels, found.classes) == ((11, channels, 6, 9), 11, None, None)
    parts = list(found.batches(4))
    assert [len(p) for p in parts] == [4, 4, 3] and parts[0].dtype == torch.uint8
    assert torch.equal(torch.cat(parts), images) and torch.equal(found.take().images, images)


def test_class_folders_give_labels_by_name(tmp_path):
    root = tree(tmp_path, {"": ["dog", "cat", "wild"]}, per_class=2)
    found = read_images(root)
    assert (found.classes, found.labels.tolist()) == (["cat", "dog", "wild"], [0, 0, 1, 1, 2, 2])
    # in another set's order of classes, of which some are missing here
    known = ["wild", "fox", "cat", "dog"]
    found = read_images(root, classes=known)
    assert (found.classes, found.labels.tolist()) == (known, [2, 2, 3, 3, 0, 0])
    part = found.take(torch.tensor([4, 0]))
    assert (part.labels.tolist(), part.classes, part.shape) == ([0, 2], known, (2, 3, 40, 40))
    assert torch.equal(part.images[0], torch.from_numpy(np.array(picture(5))).permute(2, 0, 1))  # wild's first


def test_a_class_the_model_does_not_know_is_named(tmp_path):
    root = tree(tmp_path, {"": ["cat", "owl"]}, per_class=1)
    with pytest.raises(UsageError, match="class owl .* none of cat, dog") as error:
        read_images(root, classes=["cat", "dog"])
    one_line(error)


def test_files_that_are_no_images_are_passed_over(tmp_path):
    root = flat(tmp_path / "x", noise(2, 1, 4, 4))
    for name in ("notes.txt", ".hidden.png", "._00.png"):
        (tmp_path / "x" / name).write_text("no image")
    (tmp_path / "x" / "logs").mkdir()
    assert len(read_images(root)) == 2


@pytest.mark.parametrize("shape, key", [((5, 6, 7), "arr_0"), ((5, 6, 7, 1), "images"), ((5, 1, 6, 7), "arr_0"),
                                        ((5, 6, 7, 3), "arr_0"), ((5, 3, 6, 7), "images")])
def test_an_npz_file_in_every_layout(tmp_path, shape, key):
    array = noise(*shape).numpy()
    found = read_images(npz(tmp_path / "x.npz", **{key: array}, labels=np.arange(5, dtype=np.int32)))
    images = found.images.numpy()
    assert (found.labels.tolist(), found.labels.dtype, found.classes) == ([0, 1, 2, 3, 4], torch.int64, None)
    if len(shape) == 3:
        assert np.array_equal(images[:, 0], array)
    elif shape[1] in (1, 3):
        assert np.array_equal(images, array)
    else:
        assert images.shape == (5, shape[3], 6, 7)
        assert all(np.array_equal(images[:, c], array[..., c]) for c in range(shape[3]))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read_again(tmp_path, channels):
    images, labels = noise(7, channels, 5, 6), torch.tensor([3, 1, 4, 1, 5, 2, 0])
    path = str(tmp_path / "x.npz")
    write_npz(path, noise(2, 1, 4, 4))
    assert read_images(path).labels is None
    write_npz(path, images, labels)
    found = read_images(path, classes=list("abcdef"))
    assert torch.equal(found.images, images) and torch.equal(found.labels, labels) and found.classes == list("abcdef")
    assert os.listdir(tmp_path) == ["x.npz"]
    with np.load(path, allow_pickle=False) as arrays:  # the layout of guided-diffusion's evaluation
        assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())


def test_a_broken_write_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "x.npz")
    write_npz(path, noise(2, 1, 4, 4))
    before = open(path, "rb").read()
    with pytest.raises(RunError, match="no space") as error, atomic_file(path) as f:
        f.write(b"half")
        raise OSError("no space")
    one_line(error)
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as f:
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="^a bug"), atomic_file(path):  # not the disk's fault
        raise RuntimeError("a bug")
    assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["x.npz"]
    with pytest.raises(RunError, match="cannot write"):
        write_npz(str(tmp_path / "nowhere" / "x.npz"), noise(2, 1, 4, 4))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_converted_as_pillow_does_it(tmp_path, mode, channels):
    image = picture(3, 24, 24).convert(mode)
    suffix = "tif" if mode == "CMYK" else "png"
    image.save(tmp_path / f"x.{suffix}")
    found = read_images(str(tmp_path), channels=channels).take().images[0]
    want = np.array(image.convert("L" if channels == 1 else "RGB"))
    if channels == 1 and mode in ("P", "CMYK", "RGBA"):
        want = np.array(image.convert("RGB").convert("L"))
    assert np.array_equal(found.squeeze(0).numpy() if channels == 1 else found.permute(1, 2, 0).numpy(), want)


def test_grey_from_rgb_is_pillows_for_every_value():
    colours = noise(3, 256, 256, seed=1)
    want = np.array(Image.fromarray(colours.permute(1, 2, 0).numpy()).convert("L"))
    assert np.array_equal(to_channels(colours, 1)[0].numpy(), want)
    grey = noise(2, 1, 4, 4)
    assert torch.equal(to_channels(grey, 3), torch.cat([grey, grey, grey], 1))
    assert torch.equal(to_channels(grey, None), grey)


def test_an_npz_file_is_converted_when_asked(tmp_path):
    images = noise(1200, 3, 4, 5)
    path = npz(tmp_path / "x.npz", images=images.numpy())
    assert torch.equal(read_images(path).images, images)
    assert torch.equal(read_images(path, channels=1).images, to_channels(images, 1))


# ---------------------------------------------------------------- sets in memory, and of the training data

@pytest.mark.parametrize("split", ["train", "test"])
def test_a_set_of_a_data_set_is_its_centre(tmp_path, split):
    top = "" if split == "train" else "test"
    root = tree(tmp_path, {name: ["a", "b"] for name in {"": [""], "test": ["train", "test"]}[top]},
                height=72, width=72)
    data, _, _ = build_dataset("ImageFolder", split, root, img_size=64, value_range=(0, 1))
    data.augment = False
    found = ImageSet(data.images, data.labels, data.classes, data.img_size)
    assert found.shape == (6, 3, 64, 64) and data.images.shape[-1] == 72
    floats, labels = data.batch(torch.arange(6))
    assert torch.equal(torch.cat(list(found.batches(4))), to_uint8(floats)) and torch.equal(found.labels, labels)
    # the same files, decoded as they are asked for
    paths = sorted(str(p) for p in (tmp_path / top).rglob("*.png"))
    lazy = ImageSet(FileImages(paths, 72), size=64)
    assert lazy.digest() == found.digest() and torch.equal(lazy.take().images, found.take().images)


def test_the_centre_of_an_oblong():
    images = noise(2, 1, 6, 9)
    assert torch.equal(next(ImageSet(images, size=4).batches()), images[:, :, 1:5, 2:6])
    assert torch.equal(next(ImageSet(images).batches()), images)


def test_the_digest_follows_the_pixels_alone(tmp_path):
    images = noise(120, 1, 6, 8)
    digest = ImageSet(images).digest()
    assert digest == ImageSet(images.clone(), torch.zeros(120), ["x"]).digest()
    assert digest == read_images(flat(tmp_path / "x", images, "{:03d}.png")).digest()
    changed = images.clone()
    changed[119, 0, 5, 7] ^= 1
    others = [changed, images[:-1], images.flip(0), images.reshape(120, 1, 8, 6), images.reshape(120, 3, 4, 4)]
    digests = {digest, *(ImageSet(x).digest() for x in others)}
    assert len(digests) == len(others) + 1


def test_a_folder_is_not_held_in_memory(tmp_path):
    root = flat(tmp_path / "x", noise(6, 3, 4, 4))
    found = read_images(root)
    first, second = next(found.batches(3)), noise(1, 3, 4, 4, seed=9)
    flat(tmp_path / "x", second, "05.png")  # changed after the set was made
    assert torch.equal(first, noise(6, 3, 4, 4)[:3]) and torch.equal(list(found.batches(3))[1][2], second[0])


# ---------------------------------------------------------------- floats to uint8

def test_uint8_is_what_save_image_writes(tmp_path):
    edges = (torch.arange(256 * 4) / (255 * 4)).repeat(3)  # every level, halves and quarters between
    images = torch.cat([edges, torch.rand(3072 * 3) * 1.2 - 0.1]).reshape(4, 3, 32, 32)
    for k, image in enumerate(images):
        save_image(image, str(tmp_path / f"{k}.png"))
    assert torch.equal(read_images(str(tmp_path)).take().images, to_uint8(images))
    assert to_uint8(torch.tensor([[-3.0, 0.0, 0.5, 1.0, 7.0]])).tolist() == [[0, 0, 128, 255, 255]]


def test_a_drawn_digit_is_its_png_file(tmp_path):
    images = torch.rand(3, 1, 28, 28)
    for k, image in enumerate(images):
        save_image(image, str(tmp_path / f"{k}.png"))  # which writes grey as RGB
    assert torch.equal(read_images(str(tmp_path), channels=1).take().images, to_uint8(images))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_counted(bad):
    images = torch.zeros(5, 3, 4, 4)
    images[1, 2, 3, 3] = images[1, 0, 0, 0] = images[4, 0, 0, 0] = bad
    with pytest.raises(UsageError, match="2 of 5 images are not finite") as error:
        to_uint8(images)
    one_line(error)
    with pytest.raises(UsageError, match="must be floats"):
        to_uint8(images[:1].byte())


# ---------------------------------------------------------------- bad input

def refused(path, match, **options):
    with pytest.raises(UsageError, match=match) as error:
        read_images(path, **options).take()
    one_line(error)


def test_paths_that_hold_no_images(tmp_path):
    refused(str(tmp_path / "nowhere"), "nowhere: there is no such")
    refused(str(tmp_path / "x.npz"), "x.npz: there is no such")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), "empty has no images")
    (tmp_path / "empty" / "cat").mkdir()
    refused(str(tmp_path / "empty"), "empty has no images")
    picture(0).save(tmp_path / "a.png")
    refused(str(tmp_path / "a.png"), "a.png: must be a folder or an .npz")
    refused(str(tmp_path), "channels: 4; must be 1", channels=4)


def test_folders_that_could_be_read_in_two_ways(tmp_path):
    root = tree(tmp_path, {"": ["cat"]})
    (tmp_path / "dog").mkdir()
    refused(root, "dog has no images")
    picture(0).save(tmp_path / "a.png")
    refused(root, "images and folders of images")


@pytest.mark.parametrize("odd, match", [(picture(1, 30, 20), "b.png is 3 x 30 x 20, but .*a.png is 3 x 20 x 20"),
                                        (picture(1, 20, 20).convert("L"), "b.png is 1 x 20 x 20, but .*a.png is 3 x")])
def test_mixed_sizes_and_modes_are_named_before_anything_is_decoded(tmp_path, odd, match):
    picture(0, 20, 20).save(tmp_path / "a.png")
    odd.save(tmp_path / "b.png")
    with pytest.raises(UsageError, match=match) as error:
        read_images(str(tmp_path))
    one_line(error)


def test_a_mode_that_would_lose_something_is_named(tmp_path):
    picture(0).convert("RGBA").save(tmp_path / "a.png")
    refused(str(tmp_path), "a.png: Pillow's mode RGBA")
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / "a.png")
    refused(str(tmp_path), "a.png: Pillow's mode I;16", channels=1)


@pytest.mark.parametrize("keep", [0, 20, 1000])
def test_a_broken_image_file_is_named(tmp_path, keep):
    flat(tmp_path, noise(2, 3, 40, 40))
    content = (tmp_path / "01.png").read_bytes()
    (tmp_path / "01.png").write_bytes(content[:keep])
    refused(str(tmp_path), "broken image file .*01.png")


@pytest.mark.parametrize("arrays, match", [
    (dict(arr_1=np.zeros((2, 4, 4), np.uint8)), "neither an array images nor arr_0"),
    (dict(arr_0=np.zeros((2, 4, 4), np.float32)), "arr_0 is float32; must be uint8"),
    (dict(arr_0=np.full((2, 4, 4), np.nan)), "arr_0 is float64; must be uint8"),
    (dict(images=np.zeros((2, 4, 4), np.int64)), "images is int64; must be uint8"),
    (dict(arr_0=np.zeros((4, 4), np.uint8)), "arr_0 is 4 x 4; must be N x H x W"),
    (dict(arr_0=np.zeros((2, 4, 4, 2), np.uint8)), "arr_0 is 2 x 4 x 4 x 2; must be"),
    (dict(arr_0=np.zeros((2, 3, 4, 3), np.uint8)), "arr_0 is 2 x 3 x 4 x 3; must be"),
    (dict(arr_0=np.zeros((0, 4, 4), np.uint8)), "arr_0 is 0 x 4 x 4; must hold an image"),
    (dict(arr_0=np.array([{}, {}])), "no .npz file of plain arrays"),
    (dict(arr_0=np.zeros((2, 4, 4), np.uint8), labels=np.array([0])), r"labels is int64 of shape \(1,\); must be 2"),
    (dict(arr_0=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, 1.5])), "labels is float64"),
    (dict(arr_0=np.zeros((2, 4, 4), np.uint8), labels=np.array(["a", "b"])), "labels is <U1"),
    (dict(arr_0=np.zeros((2, 4, 4), np.uint8), labels=np.array([-1, 1])), "labels run from -1 to 1; must be at"),
    (dict(arr_0=np.zeros((2, 4, 4), np.uint8), labels=np.array([None, 1])), "no .npz file of plain arrays"),
])
def test_bad_arrays(tmp_path, arrays, match):
    refused(npz(tmp_path / "x.npz", **arrays), "x.npz.* " + match)


def test_labels_beyond_the_known_classes(tmp_path):
    path = npz(tmp_path / "x.npz", arr_0=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, 2]))
    refused(path, "labels run from 0 to 2; must be from 0 to 1", classes=["a", "b"])


def test_damaged_npz_files(tmp_path):
    path = npz(tmp_path / "x.npz", arr_0=noise(50, 8, 8).numpy())
    content = bytearray(open(path, "rb").read())
    for bad in (b"", b"no zip", content[:1000], content[:1500] + bytes([content[1500] ^ 1]) + content[1501:]):
        with open(path, "wb") as f:
            f.write(bad)
        refused(path, "x.npz is damaged")
    np.save(open(path, "wb"), noise(2, 4, 4).numpy())  # one bare array
    refused(path, "x.npz is damaged or no .npz file")


def test_no_code_in_an_npz_file_is_run(tmp_path):
    mark = tmp_path / "mark"
    evil = np.empty(1, dtype=object)
    evil[0] = Evil(mark)
    refused(npz(tmp_path / "x.npz", arr_0=evil), "Object arrays cannot be loaded")
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as z:
        z.writestr("../arr_0.npy", "beside the folder")
    refused(str(tmp_path / "y.npz"), "neither an array images nor arr_0")
    assert not mark.exists() and not (tmp_path.parent / "arr_0.npy").exists()


def test_bad_sets_are_not_written(tmp_path):
    for path, images, match in (("x.png", noise(2, 1, 4, 4), "must end in .npz"),
                                ("x.npz", torch.rand(2, 1, 4, 4), "images are torch.float32"),
                                ("x.npz", noise(2, 4, 4), "2 x 4 x 4; must be uint8 N x C")):
        with pytest.raises(UsageError, match=match) as error:
            write_npz(str(tmp_path / path), images)
        one_line(error)
    with pytest.raises(UsageError, match="size: 5; the images are only 4 x 6"):
        ImageSet(noise(2, 1, 4, 6), size=5)
    assert not os.listdir(tmp_path)
