"""The Inception extractor against torch-fidelity's own way from PNG files to FID, and against pytorch-fid's network.

The weights are random, of the true shapes: nothing here depends on the internet or on the published file.
"""

import os
import sys

import numpy as np
import pytest
import torch

from helpers import Evil, one_line, picture
from libs import RunError, UsageError
from libs.data.images import read_images
from libs.evaluation import features
from libs.evaluation.classifier import file_hash
from libs.evaluation.features import InceptionExtractor, extract_features, fetch_inception, load_extractor
from libs.evaluation.fid import fit_gaussian, frechet_distance


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


@pytest.fixture(scope="module")
def theirs(fidelity, weights):
    return fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "theirs", ["2048"], feature_extractor_weights_path=weights)


def save(folder, n, height, width, mode="RGB", first=0):
    folder.mkdir()
    for k in range(first, first + n):
        picture(k, height, width).convert(mode).save(folder / f"{k:02d}.png")
    return str(folder)


# ---------------------------------------------------------------- the same numbers

@pytest.mark.parametrize("height, width, mode", [(28, 28, "L"), (200, 350, "RGB")])
def test_features_are_those_of_torch_fidelity(tmp_path, theirs, extractor, height, width, mode):
    from torch_fidelity.datasets import ImagesPathDataset
    folder = save(tmp_path / "x", 2, height, width, mode)
    data = ImagesPathDataset([os.path.join(folder, name) for name in sorted(os.listdir(folder))])
    want = torch.cat([theirs(data[k][None])[0] for k in range(2)])
    found = extract_features(extractor, read_images(folder, 1 if mode == "L" else 3, []).batches(2))
    spread = want.std(0).mean()  # between images: what a distance is made of
    assert spread > 0.01 and (found.shape, found.dtype) == ((2, 2048), torch.float32)
    assert (found - want).abs().max() < 1e-4 * spread


def test_the_network_is_that_of_pytorch_fid(monkeypatch, weights, extractor):
    """At 299 x 299, where neither resizes; another implementation of every layer."""
    theirs = pytest.importorskip("pytorch_fid.inception", reason="see requirements-extra.txt")
    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *args, **options: state)
    network = theirs.InceptionV3(resize_input=False, normalize_input=False).eval()
    image = torch.from_numpy(np.array(picture(0, 299, 299))).permute(2, 0, 1)[None]
    with torch.no_grad():
        want = network((image.float() - 128) / 128)[0].flatten(1)
    assert torch.allclose(extractor(image), want, rtol=1e-4, atol=1e-5)


def test_fid_of_two_folders_is_torch_fidelitys(tmp_path, fidelity, weights):
    class Early(InceptionExtractor):
        """An early layer: its 192 features cost a fifth."""
        layer = "192"

    folders = [save(tmp_path / "a", 3, 32, 32), save(tmp_path / "b", 3, 40, 24, first=50)]
    want = fidelity.calculate_metrics(input1=folders[0], input2=folders[1], cuda=False, fid=True, batch_size=8,
                                      feature_extractor_weights_path=weights, feature_layer_fid="192", cache=False,
                                      save_cpu_ram=True, verbose=False)["frechet_inception_distance"]
    ours = Early(weights)
    found = [fit_gaussian(extract_features(ours, read_images(f, 3, []).batches(4))) for f in folders]
    assert ours.dim == 192 and frechet_distance(*found) == pytest.approx(want, rel=1e-4) and want > 0.1


def test_only_the_published_weights_make_a_fid(monkeypatch, weights, extractor):
    assert (extractor.name, extractor.dim, extractor.hash) == ("inception", 2048, file_hash(weights))
    assert extractor.metric == "FD (Inception of other weights)"
    monkeypatch.setattr(features, "INCEPTION_HASH", file_hash(weights)[:8])
    assert InceptionExtractor(weights).metric == "FID"


# ---------------------------------------------------------------- weights that are missing

def test_weights_that_are_not_inceptions(tmp_path, fidelity):
    path, mark = str(tmp_path / "x.pth"), tmp_path / "mark"
    for content in ({"x": torch.zeros(3)}, {"x": Evil(mark)}):
        torch.save(content, path)
        with pytest.raises(UsageError, match="x.pth is no weight file of FID's Inception") as error:
            load_extractor("inception", weights=path)
        one_line(error)
    assert not mark.exists()


def test_a_missing_package_is_named_before_anything_is_fetched(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setattr(features, "fetch_inception", lambda: pytest.fail("fetched"))
    with pytest.raises(UsageError, match="torch-fidelity: pip install -r requirements-extra.txt") as error:
        load_extractor("inception")
    one_line(error)


def test_the_url_is_torch_fidelitys(fidelity):
    assert features.INCEPTION_URL == sys.modules["torch_fidelity.feature_extractor_inceptionv3"].URL_INCEPTION_V3
    assert features.INCEPTION_URL.endswith(f"-{features.INCEPTION_HASH}.pth")


def test_weights_are_fetched_once_and_only_the_right_ones(monkeypatch, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"the weights")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(features, "INCEPTION_URL", (tmp_path / "weights.pth").as_uri())
    cached = tmp_path / "home" / "hub" / "checkpoints" / "weights.pth"
    with pytest.raises(RunError, match="cannot be fetched .*invalid hash") as error:
        fetch_inception()
    assert one_line(error).endswith(f"put {features.INCEPTION_URL} at {cached}") and not os.listdir(cached.parent)
    monkeypatch.setattr(features, "INCEPTION_HASH", file_hash(tmp_path / "weights.pth")[:8])
    assert fetch_inception() == str(cached) and cached.read_bytes() == b"the weights"
    (tmp_path / "weights.pth").unlink()
    assert fetch_inception() == str(cached)
