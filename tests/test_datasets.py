"""What comes out of ImageDataset and the loader."""

import pytest
import torch

from helpers import differences, one_line, tree
from libs import UsageError, build_dataloader, build_dataset
from libs.common import memory
from libs.data import folders
from libs.data.folders import FileImages
from libs.datasets import BatchLoader, ImageDataset


def load(root, split="train", name="ImageFolder", img_size=16, **options):
    return build_dataset(name, split, str(root), img_size, **options)


# ---- images that stay on disk

def test_from_disk_as_from_memory(tmp_path, monkeypatch, capsys):
    root = tree(tmp_path, {"": ["a", "b"]}, per_class=5, height=50, width=70)
    memory, _, _ = load(root)
    monkeypatch.setattr(folders, "available_memory", lambda: 100)
    disk, _, _ = load(root)
    assert isinstance(disk.images, FileImages) and isinstance(memory.images, torch.Tensor)
    assert "read from disk" in capsys.readouterr().out
    assert disk.img_shape == memory.img_shape and len(disk) == len(memory)
    loaders = build_dataloader(memory, 4, 0, seed=1), build_dataloader(disk, 4, 3, seed=1)
    assert disk.images.num_workers == 3
    for (a, la), (b, lb) in zip(*loaders, strict=True):
        assert torch.equal(a, b) and torch.equal(la, lb)
    (tmp_path / "b" / "3.png").write_bytes(b"")
    with pytest.raises(UsageError, match="3.png"):
        disk.batch(torch.arange(10))


@pytest.mark.parametrize("on_disk", [False, True])
def test_limit_is_spread_over_the_set_and_reads_nothing_else(tmp_path, monkeypatch, on_disk):
    root = tree(tmp_path, {"": ["a", "b"]}, per_class=5)
    everything, decode, read = load(root)[0], folders.decode, []
    monkeypatch.setattr(folders, "decode", lambda path, size: read.append(path) or decode(path, size))
    if on_disk:
        monkeypatch.setattr(folders, "available_memory", lambda: 100)
    few, chosen = load(root, limit=4)[0], [0, 3, 6, 9]
    assert torch.equal(few.images[torch.arange(4)], everything.images[chosen]) and len(read) == 4
    assert torch.equal(few.labels, everything.labels[chosen]) and few.classes == ["a", "b"]
    assert len(load(root, limit=11)[0]) == 10


@pytest.mark.parametrize("free, moves", [(2 * 23 * 81, True), (2 * 23 * 81 - 1, False)])
def test_images_move_to_a_device_that_they_fill_by_half_at_most(monkeypatch, capsys, free, moves):
    """On a "meta" device, whose memory is what this test says."""
    dataset, asked = numbered(), []
    monkeypatch.setattr(memory, "available_memory", lambda device: asked.append(str(device)) or free)
    assert dataset.to("cpu") is dataset and not asked  # they are there
    assert dataset.to("meta") is dataset and asked == ["meta"]
    assert [x.device.type for x in (dataset.images, dataset.labels)] == ["meta" if moves else "cpu"] * 2
    out = capsys.readouterr().out
    assert out.count("\n") == (not moves) and ("they stay on the host" in out) == (not moves)
    if not moves:
        (images, labels), = build_dataloader(dataset, 23)
        assert images.shape == (23, 1, 8, 8) and sorted(labels.tolist()) == list(range(23))


# ---- views

def test_a_batch_is_cut_out_and_mirrored_as_drawn():
    """The order of the draws is what makes a resumed run see what the one before it would have seen."""
    images = torch.randint(0, 256, (9, 3, 12, 12), dtype=torch.uint8)
    dataset = ImageDataset(images, torch.zeros(9).long(), ["a"], 8, augment=True, flip=True, value_range=(0, 1))
    index, generator = torch.tensor([5, 0, 8, 5, 3, 2]), torch.Generator().manual_seed(4)
    rows, cols = torch.randint(0, 5, (2, 6), generator=generator).tolist()
    mirrored = (torch.rand(6, generator=generator) < 0.5).tolist()
    assert len(set(rows)) > 1 and len(set(cols)) > 1 and len(set(mirrored)) == 2
    wanted = [images[i, :, r:r + 8, c:c + 8] / 255 for i, r, c in zip(index.tolist(), rows, cols)]
    wanted = torch.stack([x.flip(-1) if m else x for x, m in zip(wanted, mirrored)])
    for part in (slice(None), slice(0, 3), slice(3, 6)):
        found = dataset.batch(index, torch.Generator().manual_seed(4), part)[0]
        assert torch.allclose(found, wanted[part], atol=1e-6)


@pytest.mark.parametrize("size, first", [(8, 2), (10, 1)])
def test_views_without_augmentation_are_the_centre(size, first):
    images = torch.randint(0, 256, (3, 1, 13, 13), dtype=torch.uint8)
    dataset = ImageDataset(images, torch.zeros(3).long(), ["a"], size, flip=True, value_range=(0, 255))
    before, window = torch.get_rng_state(), slice(first, first + size)
    assert torch.equal(dataset.batch(torch.arange(3))[0], images[:, :, window, window].float())
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn


def test_every_crop_comes_up_and_half_are_flipped():
    """No two pixels are alike, so that a crop tells where it was cut out."""
    stored = (torch.arange(3 * 10 * 10) % 251).to(torch.uint8).reshape(1, 3, 10, 10).expand(2000, -1, -1, -1)
    dataset = ImageDataset(stored, torch.zeros(2000).long(), ["a"], 8, augment=True, flip=True, value_range=(0, 255))
    images = dataset.batch(torch.arange(2000), torch.Generator().manual_seed(0))[0]
    counts = []
    for flips in (False, True):
        for row in range(3):
            for col in range(3):
                crop = stored[0, :, row:row + 8, col:col + 8].float()
                counts.append(int((images == (crop.flip(-1) if flips else crop)).flatten(1).all(1).sum()))
    assert sum(counts) == 2000 and min(counts) > 60 and max(counts) < 165  # 111 each, 5 standard deviations
    assert 890 < sum(counts[9:]) < 1110


# ---- the loader

def numbered(n=23, **options):
    """Image i has the label i, and its number in its pixels."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 9, 9).contiguous()
    images[:, :, :, 0] = 255  # so that a flip and a crop show
    return ImageDataset(images, torch.arange(n), range(n), img_size=8, augment=True, flip=True, **options)


def test_len_and_getitem():
    dataset = numbered()
    assert len(dataset) == 23
    image, label = dataset[3]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and type(label) is int and label == 3
    assert dataset[-1][1] == 22
    assert [label for _, label in dataset] == list(range(23))  # ended by an IndexError


def test_labels_outside_the_classes():
    for labels in ([0, 1, 2], [0, -1, 1]):
        with pytest.raises(UsageError) as error:
            ImageDataset(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor(labels), ["a", "b"])
        assert str(min(labels)) in one_line(error) and str(max(labels)) in one_line(error)
        assert "2 classes" in one_line(error)


@pytest.mark.parametrize("batch_size", [1, 5, 23])
def test_every_epoch_is_another_permutation(batch_size):
    loader = build_dataloader(numbered(), batch_size, 0)
    assert len(loader) == 23 // batch_size
    epochs = []
    for _ in range(3):
        batches = list(loader)
        assert len(batches) == len(loader) and all(len(labels) == batch_size for _, labels in batches)
        for images, labels in batches:  # the images are those of the labels
            assert torch.equal(((images[:, 0, 0, 4] + 1) * 127.5).round().long(), labels)
        epochs.append(torch.cat([labels for _, labels in batches]).tolist())
        assert len(set(epochs[-1])) == len(epochs[-1])  # no image twice
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_images_left_over_come_in_another_epoch():
    loader = BatchLoader(numbered(), 10)
    seen = {int(k) for epoch in range(20) for _, labels in loader.epoch(epoch) for k in labels}
    assert seen == set(range(23))


def test_order_is_a_function_of_seed_and_epoch():
    a, b, other = (BatchLoader(numbered(), 4, seed=seed) for seed in (7, 7, 8))
    before = torch.get_rng_state()
    epoch = list(a.epoch(3))
    assert torch.equal(torch.get_rng_state(), before)
    list(b.epoch(0)), torch.rand(5)  # what was drawn before does not matter
    assert not differences(epoch, list(b.epoch(3)))
    assert differences(epoch, list(b.epoch(4))) and differences(epoch, list(other.epoch(3)))
    for start in (1, 3, 5):  # the rest of the same epoch
        assert not differences(list(a.epoch(3, start)), epoch[start:])
    for epoch in (0, 1):  # iterating counts the epochs
        assert not differences(list(a), list(b.epoch(epoch)))


def test_batch_larger_than_the_data_set():
    loader = build_dataloader(numbered(5), 64, 4)
    (images, labels), = loader
    assert len(loader) == 1 and len(images) == 5 and sorted(labels.tolist()) == list(range(5))
