"""The Inception extractor against torch-fidelity's own way from PNG files to FID, and against pytorch-fid's network.

The weights are random, of the true shapes: nothing here depends on a network or on the published file.
"""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import Evil, one_line, picture
from libs import RunError, UsageError, features
from libs.evaluation.classifier import file_hash
from libs.evaluation.features import InceptionExtractor, extract_features, fetch_inception, load_extractor
from libs.evaluation.fid import FeatureStatistics, frechet_distance
from libs.data.images import read_images


@pytest.fixture(scope="module")
def fidelity():
    return pytest.importorskip("torch_fidelity", reason="see requirements-extra.txt")


@pytest.fixture(scope="module")
def weights(fidelity, tmp_path_factory):
    """A weight file: torch-fidelity's network with weights that let the input through."""
    kind = sys.modules["torch_fidelity.feature_extractor_inceptionv3"]
    path = str(tmp_path_factory.mktemp("inception") / "random.pth")
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "load_state_dict_from_url", lambda *args, **options: None)
        patch.setattr(kind.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = kind.FeatureExtractorInceptionV3("random", ["2048"])
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.bias, 0, 0.1)
    torch.save(network.state_dict(), path)
    yield path
    os.remove(path)  # 91 MiB that pytest would keep


@pytest.fixture(scope="module")
def extractor(weights):
    return load_extractor("inception", weights=weights)


def by_fidelity(fidelity, weights, folder):
    """Features of a folder of PNG files by torch-fidelity's own data set and network."""
    from torch_fidelity.datasets import ImagesPathDataset
    network = fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "theirs", ["2048"], feature_extractor_weights_path=weights)
    data = ImagesPathDataset([os.path.join(folder, name) for name in sorted(os.listdir(folder))])
    return torch.cat([network(data[k][None])[0] for k in range(len(data))])


def save(folder, n, height, width, mode="RGB", first=0):
    folder.mkdir()
    for k in range(first, first + n):
        picture(k, height, width).convert(mode).save(folder / f"{k:02d}.png")
    return str(folder)


# ---------------------------------------------------------------- the same numbers

@pytest.mark.parametrize("height, width, mode", [(28, 28, "L"), (64, 64, "RGB"), (299, 299, "RGB"), (200, 350, "RGB")])
def test_features_are_those_of_torch_fidelity(tmp_path, fidelity, weights, extractor, height, width, mode):
    folder = save(tmp_path / "x", 2, height, width, mode)
    theirs, images = by_fidelity(fidelity, weights, folder), read_images(folder)
    assert images.shape == (2, 1 if mode == "L" else 3, height, width)
    spread = theirs.std(0).mean()  # between images: what a distance is made of
    assert spread > 0.01
    for batch_size in (1, 2):
        ours = extract_features(extractor, images.batches(batch_size))
        assert (ours.shape, ours.dtype) == ((2, 2048), torch.float32)
        assert (ours - theirs).abs().max() < 1e-4 * spread


def test_the_network_is_that_of_pytorch_fid(monkeypatch, weights, extractor):
    """At 299 x 299, where neither resizes; another implementation of every layer."""
    theirs = pytest.importorskip("pytorch_fid.inception", reason="see requirements-extra.txt")
    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *args, **options: state)
    network = theirs.InceptionV3(resize_input=False, normalize_input=False).eval()
    images = torch.stack([torch.from_numpy(np.array(picture(k, 299, 299))).permute(2, 0, 1) for k in range(2)])
    with torch.no_grad():
        want = network((images.float() - 128) / 128)[0].flatten(1)
    assert torch.allclose(extractor(images), want, rtol=1e-4, atol=1e-5)


def test_fid_of_two_folders_is_torch_fidelitys(tmp_path, fidelity, weights):
    class Early(InceptionExtractor):
        """An early layer: its 192 features cost a fifth."""
        layer = "192"

    folders = [save(tmp_path / "a", 14, 32, 32), save(tmp_path / "b", 11, 40, 24, first=50)]
    want = fidelity.calculate_metrics(input1=folders[0], input2=folders[1], cuda=False, fid=True, batch_size=8,
                                      feature_extractor_weights_path=weights, feature_layer_fid="192", cache=False,
                                      save_cpu_ram=True, verbose=False)["frechet_inception_distance"]
    ours = Early(weights)
    found = [FeatureStatistics(192).update(extract_features(ours, read_images(f).batches(7))) for f in folders]
    assert ours.dim == 192 and frechet_distance(*found) == pytest.approx(want, rel=1e-4) and want > 0.1


def test_only_the_published_weights_make_a_fid(monkeypatch, weights, extractor):
    assert (extractor.name, extractor.dim, extractor.hash) == ("inception", 2048, file_hash(weights))
    assert extractor.metric == "FD (Inception of other weights)"
    monkeypatch.setattr(features, "INCEPTION_HASH", file_hash(weights)[:8])
    assert InceptionExtractor(weights).metric == "FID"


# ---------------------------------------------------------------- bad input

def test_floats_are_refused(extractor):
    with pytest.raises(UsageError, match="inception: images are torch.float32.* must be uint8, 0 to 255") as error:
        extractor(torch.rand(2, 3, 64, 64))
    one_line(error)
    with pytest.raises(UsageError, match="C of 1 or 3"):
        extractor(torch.zeros(2, 2, 64, 64, dtype=torch.uint8))


def test_weights_that_are_not_inceptions(tmp_path, fidelity):
    path, mark = str(tmp_path / "x.pth"), tmp_path / "mark"
    for content in ({"x": torch.zeros(3)}, torch.zeros(3), {"x": Evil(mark)}):
        torch.save(content, path)
        with pytest.raises(UsageError, match="x.pth is no weight file of FID's Inception") as error:
            load_extractor("inception", weights=path)
        one_line(error)
    assert not mark.exists()
    with pytest.raises(UsageError, match="inception: no file .*nowhere.pth; its weights are at https://"):
        load_extractor("inception", weights="nowhere.pth")


def test_a_missing_package_is_named_before_anything_is_fetched(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setattr(features, "fetch_inception", lambda: pytest.fail("fetched"))
    with pytest.raises(UsageError, match="torch-fidelity: pip install -r requirements-extra.txt") as error:
        load_extractor("inception")
    one_line(error)


# ---------------------------------------------------------------- fetching

@pytest.fixture
def mirrors(monkeypatch, tmp_path):
    """Two mirrors on disk, still empty, and an empty cache: (their files, the names in the cache)."""
    files = [tmp_path / "one" / "weights-6726825d.pth", tmp_path / "two" / "pt-6726825d.pth"]
    for file in files:
        file.parent.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(features, "INCEPTION_URLS", tuple(file.as_uri() for file in files))
    cache = tmp_path / "home" / "hub" / "checkpoints"
    return files, [cache / file.name for file in files]


@pytest.fixture
def content(monkeypatch, tmp_path):
    """What stands for the weights; its hash is taken for the published one."""
    (tmp_path / "content").write_bytes(b"the weights")
    monkeypatch.setattr(features, "INCEPTION_HASH", file_hash(str(tmp_path / "content"))[:8])
    return b"the weights"


def test_the_urls_are_those_of_the_two_packages(fidelity):
    pytorch_fid = pytest.importorskip("pytorch_fid.inception", reason="see requirements-extra.txt")
    theirs = sys.modules["torch_fidelity.feature_extractor_inceptionv3"].URL_INCEPTION_V3
    assert features.INCEPTION_URLS == (theirs, pytorch_fid.FID_WEIGHTS_URL)
    assert all(url.endswith(f"-{features.INCEPTION_HASH}.pth") for url in features.INCEPTION_URLS)


@pytest.mark.parametrize("working", [0, 1])
def test_weights_are_fetched_once_from_either_mirror(mirrors, content, working):
    files, cached = mirrors
    files[0].write_bytes(b"an error page")
    files[working].write_bytes(content)
    assert fetch_inception() == str(cached[working]) and cached[working].read_bytes() == content
    files[working].unlink()
    assert fetch_inception() == str(cached[working])
    assert os.listdir(cached[0].parent) == [cached[working].name]


def test_nothing_else_gets_the_name_of_the_weights(mirrors, content):
    files, cached = mirrors
    for file in files:
        file.write_bytes(content + b"!")
    with pytest.raises(RunError, match="cannot be fetched .*invalid hash") as error:
        fetch_inception()
    message = one_line(error)
    assert features.INCEPTION_URLS[0] in message and str(cached[0]) in message
    assert os.listdir(cached[0].parent) == []
    cached[1].write_bytes(b"half of them")
    with pytest.raises(UsageError, match="SHA-256 of .*pt-6726825d.pth starts with .*remove the file") as error:
        fetch_inception()
    one_line(error)


@pytest.mark.parametrize("urls", [("http://127.0.0.1:9/w-6726825d.pth",) * 2, None])
def test_without_a_network_it_says_where_the_file_belongs(monkeypatch, mirrors, fidelity, urls):
    urls = urls or features.INCEPTION_URLS  # mirrors that have no file
    monkeypatch.setattr(features, "INCEPTION_URLS", urls)
    with pytest.raises(RunError, match="cannot be fetched") as error:
        load_extractor("inception")
    path = str(mirrors[1][0].parent / os.path.basename(urls[0]))
    assert one_line(error).endswith(f": put {urls[0]} by hand at {path}")


def test_a_cache_that_cannot_be_made(monkeypatch, tmp_path, mirrors, content):
    mirrors[0][0].write_bytes(content)
    (tmp_path / "home").write_text("a file in the way")
    with pytest.raises(RunError, match="cannot be fetched .*[Nn]ot a directory|cannot be fetched .*exists") as error:
        fetch_inception()
    one_line(error)


def test_png_with_a_palette_is_read_as_torch_fidelity_reads_it(tmp_path, fidelity):
    from torch_fidelity.datasets import ImagesPathDataset
    for mode in ("1", "L", "P", "RGBA"):
        path = tmp_path / f"{mode}.png"
        picture(4).convert(mode).save(path)
    paths = sorted(str(p) for p in tmp_path.iterdir())
    theirs = torch.stack([ImagesPathDataset(paths)[k] for k in range(4)])
    assert torch.equal(read_images(str(tmp_path), channels=3).take().images, theirs)
    assert Image.open(paths[0]).mode == "1"
