"""What comes out of ImageDataset and the loader."""

import pytest
import torch

from helpers import one_line, tree
from libs import UsageError, build_dataloader, build_dataset
from libs import folders
from libs.datasets import KNOWN, BatchLoader, ImageDataset
from libs.data.folders import FileImages


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
    assert torch.equal(disk.to("cpu").batch(torch.tensor([7]), torch.Generator().manual_seed(0))[0],
                       memory.batch(torch.tensor([7]), torch.Generator().manual_seed(0))[0])


def test_broken_image_on_disk_is_named_when_it_comes(tmp_path, monkeypatch):
    root = tree(tmp_path, {"": ["a"]})
    (tmp_path / "a" / "broken.png").write_bytes(b"")
    monkeypatch.setattr(folders, "available_memory", lambda: 100)
    dataset, _, _ = load(root)
    with pytest.raises(UsageError, match="broken.png"):
        dataset.batch(torch.arange(4))


@pytest.mark.parametrize("on_disk", [False, True])
def test_limit_is_spread_over_the_set_and_reads_nothing_else(tmp_path, monkeypatch, on_disk):
    root = tree(tmp_path, {"": ["a", "b"]}, per_class=5)
    everything, decode, read = load(root)[0], folders.decode, []
    monkeypatch.setattr(folders, "decode", lambda path, size: read.append(path) or decode(path, size))
    if on_disk:
        monkeypatch.setattr(folders, "available_memory", lambda: 100)
    some, chosen = load(root, limit=4)[0], [0, 3, 6, 9]
    assert torch.equal(some.images[torch.arange(4)], everything.images[chosen]) and len(read) == 4
    assert torch.equal(some.labels, everything.labels[chosen]) and some.classes == ["a", "b"]
    assert len(load(root, limit=11)[0]) == 10


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


def test_views_without_augmentation_are_the_centre():
    images = torch.randint(0, 256, (3, 1, 13, 13), dtype=torch.uint8)
    dataset = ImageDataset(images, torch.zeros(3).long(), ["a"], 8, flip=True, value_range=(0, 255))
    before = torch.get_rng_state()
    assert torch.equal(dataset.batch(torch.arange(3))[0], images[:, :, 2:10, 2:10].float())
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn


# ---- the loader

def some(n=23, **options):
    """Image i has the label i, and its number in its pixels."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 9, 9).contiguous()
    images[:, :, :, 0] = 255  # so that a flip and a crop show
    return ImageDataset(images, torch.arange(n), range(n), img_size=8, augment=True, flip=True, **options)


def test_len_and_getitem():
    dataset = some()
    assert len(dataset) == 23
    image, label = dataset[3]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and type(label) is int and label == 3
    assert dataset[-1][1] == 22
    with pytest.raises(IndexError):  # which also ends a for loop
        dataset[23]
    assert [label for _, label in dataset] == list(range(23))


def test_labels_outside_the_classes():
    for labels in ([0, 1, 2], [0, -1, 1]):
        with pytest.raises(UsageError) as error:
            ImageDataset(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor(labels), ["a", "b"])
        assert str(min(labels)) in one_line(error) and str(max(labels)) in one_line(error)
        assert "2 classes" in one_line(error)


@pytest.mark.parametrize("batch_size", [1, 5, 23])
def test_every_epoch_is_another_permutation(batch_size):
    loader = build_dataloader(some(), batch_size, 0)
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
    loader = BatchLoader(some(), 10)
    seen = {int(k) for epoch in range(20) for _, labels in loader.epoch(epoch) for k in labels}
    assert seen == set(range(23))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) and torch.equal(k, m) for (x, k), (y, m) in zip(a, b))


def test_order_is_a_function_of_seed_and_epoch():
    a, b, other = BatchLoader(some(), 4, seed=7), BatchLoader(some(), 4, seed=7), BatchLoader(some(), 4, seed=8)
    list(a.epoch(0)), torch.rand(5)  # what was drawn before does not matter
    assert same(list(a.epoch(3)), list(b.epoch(3)))
    assert not same(list(a.epoch(3)), list(b.epoch(4)))
    assert not same(list(a.epoch(3)), list(other.epoch(3)))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(BatchLoader(some(), 4).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_start_gives_the_tail_of_the_same_epoch(start):
    loader = BatchLoader(some(), 4, seed=2)
    assert same(list(loader.epoch(6, start)), list(loader.epoch(6))[start:])


def test_iterating_counts_the_epochs():
    loader = BatchLoader(some(), 4)
    assert same(list(loader), list(loader.epoch(0))) and same(list(loader), list(loader.epoch(1)))


def test_batch_larger_than_the_data_set():
    loader = build_dataloader(some(5), 64, 4)
    (images, labels), = loader
    assert len(loader) == 1 and len(images) == 5 and sorted(labels.tolist()) == list(range(5))


def test_every_known_name_has_a_shape():
    for shape, classes in KNOWN.values():
        assert len(shape) == 3 and shape[1] == shape[2] and (classes is None or classes > 1)
