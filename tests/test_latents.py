"""Latents encoded once: the same numbers as encoding anew, and a cache that is never taken for another."""

import os

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

import train
from helpers import Place, one_line, tree
from libs import DDPM, RunError, build_dataset, config
from libs.common import memory
from libs.data import folders, latents
from libs.data.latents import LatentDataset, cached_latents, kept_views
from libs.datasets import BatchLoader, ImageDataset

CPU = torch.device("cpu")


def autoencoder(seed=0):
    """A latent diffusion model whose random encoder makes latents about as large as the real one's."""
    torch.manual_seed(seed)
    model = DDPM(img_shape=(3, 32, 32), timesteps=5, dim=8, context_dim=8, num_classes=2, dim_mults=(1, 2),
                 attn_levels=(0,), use_vae=True)
    with torch.no_grad():
        for p in model.vae.encoder.parameters():
            p *= 2
    return model


class Data:
    """A folder of eight images, its settings and what was logged about its latents."""

    def __init__(self, root, cache):
        self.root, self.cache, self.lines = str(root), cache, []

    def settings(self, crops=1, limit=None):
        return {"name": "ImageFolder", "split": "train", "data_folder": self.root, "limit": limit,
                "latent_crops": crops}

    def images(self, limit=None):
        return build_dataset("ImageFolder", "train", self.root, 32, (0, 1), limit)[0]

    def latents(self, model, **settings):
        self.lines.clear()
        return cached_latents(model, self.images(settings.get("limit")), self.settings(**settings), CPU,
                              self.lines.append)

    def file(self):
        path, = self.cache.iterdir()
        return path


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "BATCH", 3)  # so that there are several, the last of them smaller
    monkeypatch.setattr(config, "CACHE", str(tmp_path / "cache"))
    return Data(tree(tmp_path / "data", {"": ["a", "b"]}, per_class=4, height=40, width=40), tmp_path / "cache/latents")


# ---- the numbers

@pytest.mark.parametrize("on_disk", [False, True])
def test_as_encoded_directly(data, monkeypatch, on_disk):
    """By slices and the encoder alone, from images in memory or on disk; the second time from the cache."""
    model = autoencoder()
    stored = data.images().images  # 8 x 3 x 36 x 36
    if on_disk:
        monkeypatch.setattr(folders, "available_memory", lambda: 100)
    dataset = data.images()
    assert isinstance(dataset.images, torch.Tensor) != on_disk
    found = data.latents(model, crops=3)
    assert found.latents.shape == (8, 6, 4, 4, 4) and found.latents.dtype == np.float32 and len(found) == 8
    assert torch.equal(found.labels, dataset.labels) and found.classes == ["a", "b"]
    for i in range(8):
        views = []
        for corner, mirrored in kept_views(dataset, torch.tensor([i]), 3):
            row, col = corner[:, 0]
            x = stored[i, :, row:row + 32, col:col + 32].float() / 255
            views.append(model.vae.encoder((x.flip(-1) if mirrored else x)[None])[0])
        assert np.abs(found.latents[i] - torch.stack(views).numpy()).max() < 1e-4
        assert torch.pdist(torch.stack(views).flatten(1), torch.inf).min() > 0.01  # another view would be noticed
    assert len(data.lines) == 1 and "encoding 8 images, 6 views of each, once" in data.lines[0]
    monkeypatch.setattr(model, "encode", None)
    again = data.latents(model, crops=3)
    assert len(data.lines) == 1 and "6 views of each image, from" in data.lines[0]
    assert np.array_equal(found.latents, again.latents)


def test_the_loss_is_that_of_the_image(data):
    """From the loader to compute_loss(encoded=True)."""
    model = autoencoder().eval()
    dataset, found = data.images(), data.latents(model)
    x, label = found.batch(torch.tensor([6, 1]), torch.Generator().manual_seed(0))
    view = torch.randint(2, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    images = []
    for i, v in zip((6, 1), view):
        corner, mirrored = kept_views(dataset, torch.tensor([i]), 1)[v]
        images.append(dataset.view(dataset.images[i:i + 1], corner, mirrored))
    t, noise = torch.tensor([1, 4]), torch.randn(2, 4, 4, 4)
    losses = (model.compute_loss(torch.cat(images), label, t, noise),
              model.compute_loss(x, label, t, noise, encoded=found.encoded))
    assert label.tolist() == [1, 0] and abs(losses[0] - losses[1]) < 1e-4


def stack(side, n=5, **options):
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    return ImageDataset(images, torch.zeros(n).long(), ["a"], 8, **options)


def corners(dataset, i, crops):
    return [tuple(corner[:, 0].tolist()) for corner, _ in kept_views(dataset, torch.tensor([i]), crops)]


def test_no_crop_comes_twice():
    dataset = stack(10, augment=True)
    everywhere = {(row, col) for row in range(3) for col in range(3)}
    for i in range(5):
        assert len(set(corners(dataset, i, 4))) == 4 and set(corners(dataset, i, 4)) < everywhere
        assert len(corners(dataset, i, 50)) == 9 and set(corners(dataset, i, 50)) == everywhere
        assert corners(dataset, i, 50)[:4] == corners(dataset, i, 4)  # more crops are more, not others
    assert len({tuple(corners(dataset, i, 4)) for i in range(5)}) == 5
    found = torch.tensor([corners(dataset, i, 1)[0] for i in range(2000)])  # depends on the image's number alone
    assert (found.float().mean(0) - 1).abs().max() < 5 * (2 / 3 / 2000) ** 0.5


@pytest.mark.parametrize("side, options, views", [
    (9, {"augment": True, "flip": True}, 8), (9, {"augment": True}, 4), (8, {"augment": True, "flip": True}, 2),
    (13, {"flip": True}, 1)])
def test_as_many_views_as_the_augmentation_has(side, options, views):
    found = kept_views(stack(side, **options), torch.arange(5), 4)
    flipped = sum(int(mirrored.sum()) for _, mirrored in found)
    assert len(found) == views and flipped == (views // 2 * 5 if options.get("flip") else 0)
    assert all(corner.shape == (2, 5) and mirrored.shape == (5,) for corner, mirrored in found)
    if not options.get("augment"):
        assert found[0][0].unique().tolist() == [2]  # the centre


# ---- the loader

def numbered(n=10, views=6):
    """Value v + 100 i in view v of image i."""
    values = 100 * np.arange(n)[:, None] + np.arange(views)
    return LatentDataset(np.broadcast_to(values[:, :, None, None, None], (n, views, 4, 1, 1)).astype("<f4"),
                         torch.arange(n), range(n))


def test_batches_hold_one_view_of_each_image():
    loader, seen = BatchLoader(numbered(), 5, seed=1), set()
    for epoch in range(40):
        for x, labels in loader.epoch(epoch):
            assert x.shape == (5, 4, 1, 1) and torch.equal((x[:, 0, 0, 0] // 100).long(), labels)
            seen |= set(x[:, 0, 0, 0].tolist())
    assert len(seen) == 60  # in the end all views of all images
    before = torch.get_rng_state()
    rest = list(BatchLoader(numbered(), 3, seed=1).epoch(7, start=1))
    whole = list(BatchLoader(numbered(), 3, seed=1).epoch(7))[1:]
    assert all(torch.equal(a, b) for one, other in zip(rest, whole, strict=True) for a, b in zip(one, other))
    assert torch.equal(torch.get_rng_state(), before)
    half = list(BatchLoader(numbered(), 4, seed=3, share=lambda n: slice(n // 2, n)).epoch(2))
    for (x, labels), (y, part) in zip(BatchLoader(numbered(), 4, seed=3).epoch(2), half, strict=True):
        assert torch.equal(x[2:], y) and torch.equal(labels[2:], part)


def test_on_a_device_they_are_the_same_batches(data):
    """From a tensor, which the CPU's memory serves for here, as from the file."""
    found = data.latents(autoencoder())
    resident = LatentDataset(latents._read(found.latents, "cpu"), found.labels, found.classes)
    assert isinstance(resident.latents, torch.Tensor) and np.array_equal(resident.latents, found.latents)
    for share in (None, lambda n: slice(n // 2, n)):
        loaders = [BatchLoader(x, 4, seed=2, share=share) for x in (found, resident)]
        for epoch in range(3):
            for (x, label), (y, other) in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
                assert torch.equal(x, y) and x.dtype == y.dtype and torch.equal(label, other)


@pytest.mark.parametrize("free, moves", [(2 * 8 * 2 * 256, True), (2 * 8 * 2 * 256 - 1, False)])
def test_they_move_to_a_device_that_they_fill_by_half_at_most(data, monkeypatch, capsys, free, moves):
    """On a "meta" device, whose memory is what this test says."""
    found, asked = data.latents(autoencoder()), []
    on_disk = found.latents
    monkeypatch.setattr(memory, "available_memory", lambda device: asked.append(str(device)) or free)
    assert found.to(CPU) is found and found.latents is on_disk and not asked
    assert found.to("meta") is found and asked == ["meta"]
    out = capsys.readouterr().out
    if moves:
        assert (found.latents.device.type, found.labels.device.type) == ("meta", "meta") and not out
        assert found.latents.shape == on_disk.shape and found.latents.dtype == torch.float32
    else:
        assert found.latents is on_disk and found.labels.device == CPU
        assert out.count("\n") == 1 and "latents of 8 images need 0.0 GiB" in out and "they stay on the host" in out


# ---- the cache

def test_settings_and_folders_have_files_of_their_own(data, tmp_path, monkeypatch):
    model, calls = autoencoder(), []
    data.latents(model)
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda images: calls.append(len(images)) or encode(images))
    assert data.latents(model, crops=2, limit=5).latents.shape == (5, 4, 4, 4, 4)
    other = Data(tree(tmp_path / "other", {"": ["a", "b"]}, per_class=2), data.cache)
    other.latents(model)
    assert len(list(data.cache.iterdir())) == 3 and sum(calls) == 5 * 4 + 4 * 2
    data.latents(model), data.latents(model, crops=2, limit=5), other.latents(model)
    assert sum(calls) == 5 * 4 + 4 * 2


def test_another_autoencoder(data):
    first = data.latents(autoencoder()).latents.copy()
    other = autoencoder(seed=1)
    second = data.latents(other).latents
    assert len(data.lines) == 2 and "encoding again" in data.lines[0] and "encoding 8 images" in data.lines[1]
    assert np.abs(first - second).max() > 0.1
    data.file().unlink()
    assert np.array_equal(second, data.latents(other).latents)  # made anew, they are the same


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("change", ["pixels", "renamed", "fewer"])
def test_other_images(data, monkeypatch, change, on_disk):
    if on_disk:
        monkeypatch.setattr(folders, "available_memory", lambda: 100)
    model = autoencoder()
    before = data.latents(model).latents.copy()
    image = os.path.join(data.root, "a", "2.png")
    if change == "renamed":  # to the front: other images have the numbers now
        os.rename(image, os.path.join(data.root, "a", "+.png"))
    elif change == "fewer":
        os.remove(image)
    else:
        with open(os.path.join(data.root, "b", "1.png"), "rb") as f, open(image, "wb") as g:
            g.write(f.read())
    after = data.latents(model).latents
    assert "encoding again" in data.lines[0] and len(after) == (7 if change == "fewer" else 8)
    if change != "fewer":
        changed = [i for i in range(8) if not np.array_equal(before[i], after[i])]
        assert changed == {"pixels": [2], "renamed": [0, 1, 2]}[change]


@pytest.mark.parametrize("damage", ["truncated", "longer", "header"])
def test_a_damaged_cache_is_made_again(data, damage):
    model = autoencoder()
    data.latents(model)
    path = data.file()
    good = path.read_bytes()
    path.unlink()
    path.write_bytes({"truncated": good[:-4], "longer": good + b"\0\0\0\0", "header": b"x" + good[1:]}[damage])
    data.latents(model)
    assert "encoding again" in data.lines[0] and path.read_bytes() == good


@pytest.mark.parametrize("kind", ["full", "a file in the way"])
def test_no_room(data, monkeypatch, kind):
    if kind == "full":
        usage = latents.shutil.disk_usage(".")
        monkeypatch.setattr(latents.shutil, "disk_usage", lambda folder: usage._replace(free=2 ** 10))
    else:
        data.cache.parent.mkdir()
        data.cache.touch()
    with pytest.raises(RunError) as error:
        data.latents(autoencoder())
    message = one_line(error)
    assert {"full": "0 MiB free", "a file in the way": "File exists"}[kind] in message
    assert "dataset.latent_crops=0" in message


# ---- train.py

def test_train_writes_nothing_into_the_image_folder(tmp_path, monkeypatch, capsys):
    """torchvision's ImageFolder reads the same data before and after two runs, the second of them from the cache."""
    monkeypatch.setattr(config, "CACHE", str(tmp_path / "cache"))
    moved = []
    monkeypatch.setattr(LatentDataset, "to", lambda dataset, device: moved.append(device) or dataset)
    place = Place(tmp_path)
    sets = ["dataset.img_size=32", *(f"{key}={value}" for key, value in place.autoencoder().items())]
    before = ImageFolder(tmp_path / "images").samples
    files = sorted(tmp_path.glob("images/**/*"))
    for name, said in ("first", "encoding 4 images, 8 views of each"), ("second", "8 views of each image, from"):
        argv = [str(place.config), "--output", name, "--set", "train_cfg.epochs=1"]
        assert not train.main([*argv, *(word for item in sets for word in ("--set", item))])
        assert said in capsys.readouterr().out
    assert ImageFolder(tmp_path / "images").samples == before and sorted(tmp_path.glob("images/**/*")) == files
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 1 and moved == [CPU, CPU]
