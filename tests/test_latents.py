"""Latents encoded once: the same numbers as encoding anew, and a cache that is never taken for another."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

from helpers import one_line, tree
from libs import DDPM, RunError, UsageError, build_dataset, folders, latents
from libs.config import CODE
from libs.datasets import BatchLoader, ImageDataset
from libs.data.latents import LatentDataset, cached_latents, kept_views
from libs.tiny_autoencoder import build_decoder, build_encoder

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "BATCH", 3)  # so that there are several, the last of them smaller
    return tree(tmp_path / "data", {"": ["a", "b"]}, per_class=4, height=40, width=40)


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
    """A folder of images, its settings and what was said about its latents."""

    def __init__(self, root, crops=3, split="train", limit=None):
        self.root, self.lines = str(root), []
        self.settings = {"name": "ImageFolder", "split": split, "data_folder": self.root, "limit": limit,
                         "latent_crops": crops}
        self.cache = os.path.join(self.root, ".latents")

    def images(self):
        data = self.settings
        return build_dataset(data["name"], data["split"], data["data_folder"], 32, (0, 1), data["limit"])[0]

    def latents(self, model, dataset=None):
        self.lines.clear()
        return cached_latents(model, dataset or self.images(), self.settings, CPU, self.lines.append)

    def file(self):
        name, = os.listdir(self.cache)
        return os.path.join(self.cache, name)


def directly(model, image, corner, mirrored, size=32):
    """Image 3 x S x S uint8 -> its latent, by slices and the encoder alone."""
    row, col = corner
    x = image[:, row:row + size, col:col + size].float() / 255
    return model.vae.encoder((x.flip(-1) if mirrored else x)[None])[0]


# ---- the numbers

@pytest.mark.parametrize("on_disk", [False, True])
def test_as_encoded_directly(root, monkeypatch, on_disk):
    model, data = autoencoder(), Data(root)
    stored = data.images().images  # 8 x 3 x 36 x 36
    if on_disk:
        monkeypatch.setattr(folders, "available_memory", lambda: 100)
    dataset = data.images()
    assert isinstance(dataset.images, torch.Tensor) != on_disk
    found = data.latents(model, dataset)
    assert found.latents.shape == (8, 6, 4, 4, 4) and found.latents.dtype == np.float32
    assert torch.equal(found.labels, dataset.labels) and found.classes == ["a", "b"] and len(found) == 8
    for i in range(8):
        wanted = torch.stack([directly(model, stored[i], corner[:, 0], mirrored[0])
                              for corner, mirrored in kept_views(dataset, torch.tensor([i]), 3)])
        assert np.abs(found.latents[i] - wanted.numpy()).max() < 1e-4
        assert torch.pdist(wanted.flatten(1), torch.inf).min() > 0.01  # so that another view would be noticed
    assert "encoding 8 images, 6 views each, once" in data.lines[0] and len(data.lines) == 1
    assert ".latents" in data.lines[0]
    assert os.path.getsize(data.file()) == latents.HEAD + found.latents.nbytes  # on disk
    assert latents._map(data.file(), (8, 6, 4, 4, 4)).tobytes() == found.latents.tobytes()


def test_the_loss_is_that_of_the_image(root):
    """From the loader to compute_loss(encoded=True)."""
    model, data = autoencoder().eval(), Data(root)
    dataset, found = data.images(), data.latents(model)
    x, label = found.batch(torch.tensor([6, 1]), torch.Generator().manual_seed(0))
    view = torch.randint(6, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    images = []
    for i, v in zip((6, 1), view):
        corner, mirrored = kept_views(dataset, torch.tensor([i]), 3)[v]
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
    found = torch.tensor([corners(dataset, i, 1)[0] for i in range(2000)])  # a number is all that decides
    assert (found.float().mean(0) - 1).abs().max() < 5 * (2 / 3 / 2000) ** 0.5


@pytest.mark.parametrize("side, options, views", [
    (9, {"augment": True, "flip": True}, 8), (9, {"augment": True}, 4), (8, {"augment": True, "flip": True}, 2),
    (8, {"augment": True}, 1), (13, {"flip": True}, 1)])
def test_as_many_views_as_the_augmentation_has(side, options, views):
    found = kept_views(stack(side, **options), torch.arange(5), 4)
    assert len(found) == views and sum(int(mirrored.sum()) for _, mirrored in found) == (views // 2 * 5
                                                                                         if options.get("flip") else 0)
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
    torch.manual_seed(0)
    before = torch.get_rng_state()
    tail = list(BatchLoader(numbered(), 3, seed=1).epoch(7, start=1))
    whole = list(BatchLoader(numbered(), 3, seed=1).epoch(7))[1:]
    assert all(torch.equal(a, b) for one, other in zip(tail, whole, strict=True) for a, b in zip(one, other))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_share_of_a_batch_is_a_slice_of_it():
    whole = list(BatchLoader(numbered(), 4, seed=3).epoch(2))
    halves = [list(BatchLoader(numbered(), 4, seed=3, share=lambda n: part).epoch(2))
              for part in (slice(0, 2), slice(2, 4))]
    for (x, labels), (a, la), (b, lb) in zip(whole, *halves, strict=True):
        assert torch.equal(x, torch.cat([a, b])) and torch.equal(labels, torch.cat([la, lb]))


# ---- the cache

def count_calls(model, monkeypatch):
    calls, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda images: calls.append(len(images)) or encode(images))
    return calls


@pytest.mark.parametrize("on_disk", [False, True])
def test_encoded_once(root, monkeypatch, on_disk):
    model, data = autoencoder(), Data(root)
    if on_disk:
        monkeypatch.setattr(folders, "available_memory", lambda: 100)
    first = data.latents(model)
    calls = count_calls(model, monkeypatch)
    again = data.latents(model)
    assert not calls and np.array_equal(first.latents, again.latents)
    assert len(data.lines) == 1 and "6 views of each image, from" in data.lines[0]
    cached_latents(model, data.images(), data.settings, CPU)  # a process that says nothing
    # settings have caches of their own
    other = Data(root, crops=2, limit=5).latents(model).latents
    assert other.shape == (5, 4, 4, 4, 4) and sum(calls) == 20 and len(os.listdir(data.cache)) == 2
    data.latents(model)
    assert sum(calls) == 20


def test_another_autoencoder(root):
    data = Data(root)
    first = data.latents(autoencoder()).latents.copy()
    other = autoencoder(seed=1)
    second = data.latents(other).latents
    assert len(data.lines) == 2 and os.path.basename(data.file()) in data.lines[0]
    assert "is of another autoencoder: encoded again" in data.lines[0] and "encoding 8 images" in data.lines[1]
    assert np.abs(first - second).max() > 0.1
    third = data.latents(other)
    assert len(data.lines) == 1 and np.array_equal(second, third.latents)
    os.remove(data.file())
    assert np.array_equal(second, data.latents(other).latents)  # made anew, they are the same


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("change", ["pixels", "more", "fewer", "renamed"])
def test_other_images(root, monkeypatch, change, on_disk):
    if on_disk:
        monkeypatch.setattr(folders, "available_memory", lambda: 100)
    model, data = autoencoder(), Data(root)
    before = data.latents(model).latents.copy()
    image = os.path.join(root, "a", "2.png")
    if change == "renamed":  # to the front: other images have the numbers now
        os.rename(image, os.path.join(root, "a", "+.png"))
    elif change == "fewer":
        os.remove(image)
    else:
        with open(os.path.join(root, "b", "1.png"), "rb") as f:
            other = f.read()
        with open(image if change == "pixels" else os.path.join(root, "a", "2b.png"), "wb") as f:
            f.write(other)
    after = data.latents(model).latents
    assert "is of other images: encoded again" in data.lines[0] and len(data.lines) == 2
    changed = {"pixels": [2], "renamed": [0, 1, 2]}.get(change)
    if changed:
        assert [i for i in range(8) if not np.array_equal(before[i], after[i])] == changed
    assert len(after) == {"more": 9, "fewer": 7}.get(change, 8)


@pytest.mark.parametrize("damage", ["one bit", "truncated", "longer", "empty", "text", "head", "a list", "zeros"])
def test_a_damaged_cache_is_made_again(root, damage):
    model, data = autoencoder(), Data(root)
    data.latents(model)
    path = data.file()
    with open(path, "rb") as f:
        good = f.read()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    bad = {"one bit": flipped, "truncated": good[:-4], "longer": good + b"\0\0\0\0", "empty": b"", "text": b"<html>",
           "head": b"x" + good[1:], "a list": b"[1]".ljust(latents.HEAD) + good[latents.HEAD:],
           "zeros": bytes(len(good))}[damage]
    # beside it and renamed, as another run would: what is mapped stays as it was
    with open(path + ".new", "wb") as f:
        f.write(bad)
    os.replace(path + ".new", path)
    found = data.latents(model)
    assert "is damaged: encoded again" in data.lines[0] and len(data.lines) == 2
    with open(path, "rb") as f:
        assert f.read() == good
    assert found.latents.tobytes() == good[latents.HEAD:]


def test_nothing_half_written_gets_the_name(root, monkeypatch):
    model, data = autoencoder(), Data(root)
    data.latents(model)
    with open(data.file(), "rb") as f:
        before = f.read()
    other, n = autoencoder(seed=1), []

    def interrupted(images):
        n.append(1)
        if len(n) == 8:  # in the second batch
            assert len(os.listdir(data.cache)) == 2
            raise KeyboardInterrupt
        return torch.zeros(len(images), 4, 4, 4)
    monkeypatch.setattr(other, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.latents(other)
    with open(data.file(), "rb") as f:  # the only one
        assert f.read() == before


def test_a_broken_image_on_disk_is_named(root, monkeypatch):
    with open(os.path.join(root, "b", "3.png"), "wb") as f:
        f.write(b"no image")
    monkeypatch.setattr(folders, "available_memory", lambda: 100)
    data = Data(root)
    with pytest.raises(UsageError) as error:
        data.latents(autoencoder())
    assert os.path.join("b", "3.png") in one_line(error) and os.listdir(data.cache) == []


def test_what_killed_runs_left_is_removed(root):
    model, data = autoencoder(), Data(root)
    data.latents(model)
    path = data.file()
    os.remove(path)
    for name, age in (("111", 2), ("222", 0)):
        with open(f"{path}.{name}.partial", "wb") as f:
            f.write(b"half")
        os.utime(f.name, (time.time() - 3600 * age,) * 2)
    data.latents(model)
    assert not os.path.exists(f"{path}.111.partial")
    assert os.path.exists(f"{path}.222.partial")  # perhaps of a run that is writing it now


# ---- no room

def fill_the_disk(monkeypatch):
    usage = latents.shutil.disk_usage(".")
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda folder: usage._replace(free=2 ** 10))


@pytest.mark.parametrize("kind", ["full", "a file in the way", "no permission"])
def test_in_memory_where_nothing_can_be_written(root, monkeypatch, kind):
    model, data = autoencoder(), Data(root)
    wanted = data.latents(model).latents.copy()
    os.remove(data.file())
    if kind == "full":
        fill_the_disk(monkeypatch)
    elif kind == "no permission":  # told so, as the tests may run as root
        monkeypatch.setattr(latents.os, "access", lambda *a: False)
    else:
        os.rmdir(data.cache)
        open(data.cache, "w").close()
    found = data.latents(model)
    assert np.array_equal(found.latents, wanted) and not isinstance(found.latents.base, np.memmap)
    line, = data.lines
    assert "into memory, for this run alone" in line and {"full": "0 MiB are free", "no permission": "no permission",
                                                         "a file in the way": "File exists"}[kind] in line
    assert os.path.isfile(data.cache) or os.listdir(data.cache) == []


def test_no_room_anywhere(root, monkeypatch):
    data = Data(root)
    fill_the_disk(monkeypatch)
    monkeypatch.setattr(latents, "available_memory", lambda: 2 ** 10)
    with pytest.raises(RunError) as error:
        data.latents(autoencoder())
    assert "0 MiB are free" in one_line(error) and "dataset.latent_crops=0" in one_line(error)


def test_the_disk_is_full_after_all(root):
    """A write beyond the process's file-size limit fails as one on a full disk does."""
    resource = pytest.importorskip("resource")
    data, before = Data(root), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (latents.HEAD + 5000, before[1]))
    try:
        with pytest.raises(RunError) as error:
            data.latents(autoencoder())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write" in one_line(error) and ".latents" in one_line(error) and os.listdir(data.cache) == []


# ---- train.py

def test_the_first_of_two_processes_encodes(tmp_path):
    tree(tmp_path / "data", {"": ["a", "b"]}, per_class=4, height=40, width=40)
    torch.manual_seed(0)
    torch.save(build_encoder().state_dict(), tmp_path / "encoder.pth")
    torch.save(build_decoder().state_dict(), tmp_path / "decoder.pth")
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({
        "model_name": "EDM", "devices": ["cpu"], "output_folder": str(tmp_path / "logs"),
        "dataset": {"name": "ImageFolder", "data_folder": str(tmp_path / "data"), "img_size": 32},
        "loader": {"batch_size": 4}, "train_cfg": {"epochs": 2, "num_eval_samples": 1, "accumulate": 2},
        "model": {"dim": 8, "context_dim": 8, "dim_mults": [1, 2], "attn_levels": [], "timesteps": 10, "use_vae": True,
                  "vae_encoder_weights": str(tmp_path / "encoder.pth"),
                  "vae_decoder_weights": str(tmp_path / "decoder.pth")}, "sample_cfg": {"steps": 2}}))
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0"]
    said, losses = [], []
    for name, launcher in (("two", torchrun), ("one", [])):
        done = subprocess.run([sys.executable, *launcher, "train.py", str(config), "--output", name, "-p", "1"],
                              cwd=CODE, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        said.append([line for line in done.stdout.splitlines() if line.startswith("latents: ")])
        losses.append([float(line.split("  loss ")[1].split()[0]) for line in done.stdout.splitlines()
                       if "  loss " in line])
    assert len(said[0]) == 1 and "encoding 8 images, 8 views each" in said[0][0]
    assert len(said[1]) == 1 and "8 views of each image, from" in said[1][0]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert len(set(losses[0])) == 4


def test_in_double_precision():
    """`dtype: fp64` is for comparing runs to the last digit."""
    model, images = autoencoder(), torch.rand(2, 3, 32, 32)
    single = model.encode(images)
    assert torch.allclose(model.double().encode(images).float(), single, atol=1e-5)
    assert model.encode(images).dtype == torch.float64
