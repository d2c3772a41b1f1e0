"""Feature extractors of the classifier and the autoencoder, and the cache of real features."""

import os

import numpy as np
import pytest
import torch

from helpers import Evil, one_line, picture
from libs import UsageError, config
from libs.data.images import ImageSet, to_channels
from libs.evaluation.classifier import WEIGHTS, file_hash, load_classifier
from libs.evaluation.features import cached_features, extract_features, load_extractor
from libs.tiny_autoencoder import TAESD


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def classifier():
    return load_extractor("classifier")


@pytest.fixture(scope="module")
def taesd(tmp_path_factory):
    """(TAESD with random weights, the file of its encoder)."""
    torch.manual_seed(5)
    model, path = TAESD(), str(tmp_path_factory.mktemp("taesd") / "encoder.pth")
    for layer in model.encoder.modules():  # as they come, a network as deep as this one hardly sees its input
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(model.encoder.state_dict(), path)
    return model, path


@pytest.fixture(scope="module")
def autoencoder(taesd):
    return load_extractor("autoencoder", weights=taesd[1])


def refused(match, function, *args, **options):
    with pytest.raises(UsageError, match=match) as error:
        function(*args, **options)
    one_line(error)


def test_names_and_hashes_stand_beside_the_numbers(classifier, autoencoder, taesd):
    found = [(e.name, e.metric, e.dim, e.hash) for e in (classifier, autoencoder)]
    assert found == [("classifier", "FD (classifier)", 128, file_hash()),
                     ("autoencoder", "FD (autoencoder)", 128, file_hash(taesd[1]))]
    assert not any(p.requires_grad for e in (classifier, autoencoder) for p in e.network.parameters())


@pytest.mark.parametrize("name, shape", [("classifier", (69, 1, 28, 28)), ("autoencoder", (35, 3, 32, 48))])
def test_a_row_depends_on_its_image_alone(request, name, shape):
    extractor, images = request.getfixturevalue(name), noise(*shape)
    whole, counts = extractor(images), []
    assert (whole.shape, whole.dtype, whole.device.type) == ((shape[0], extractor.dim), torch.float32, "cpu")
    parts = extract_features(extractor, images.split(33), counts.append)
    assert sum(counts) == shape[0] and whole.std(0).mean() > 0.01
    for found in (parts, extractor(images.flip(0)).flip(0)):
        assert (found - whole).abs().max() < 1e-4 * whole.std(0).mean()


def test_classifier_features_are_those_of_the_judge(classifier):
    images = noise(5, 1, 28, 28)
    model = load_classifier()
    features, floats = classifier(images), images.float() / 255
    assert torch.allclose(features, model.features(floats), rtol=1e-5, atol=1e-6)
    assert torch.allclose(classifier.logits(features), model(floats), rtol=1e-5, atol=1e-5)
    refused(r"classifier: images are \(2, 3, 28, 28\); must be B x 1 x 28 x 28", classifier, noise(2, 3, 28, 28))


@pytest.mark.parametrize("height, width", [(32, 32), (64, 96)])
def test_autoencoder_features_are_means_and_deviations_of_cells(autoencoder, taesd, height, width):
    images = noise(2, 3, height, width)
    latents = taesd[0].encoder(images.float() / 255).double().numpy()
    rows, cols = height // 32, width // 32  # latent pixels per cell
    cells = latents.reshape(2, 4, 4, rows, 4, cols)
    want = np.concatenate([cells.mean((3, 5)), cells.std((3, 5))], 1).reshape(2, 128)
    assert np.allclose(autoencoder(images).numpy(), want, rtol=1e-4, atol=1e-5 * abs(want).max())


def test_uneven_cells_and_grey_images_are_taken_too(autoencoder):
    images = torch.stack([torch.from_numpy(np.array(picture(k, 40, 40))) for k in range(3)]).permute(0, 3, 1, 2)
    found = autoencoder(images)
    assert found.shape == (3, 128) and found.isfinite().all()
    grey = to_channels(images, 1)
    assert torch.equal(autoencoder(grey), autoencoder(grey.repeat(1, 3, 1, 1)))
    assert not torch.allclose(autoencoder(grey), found, rtol=1e-2)
    for height, width in ((24, 64), (64, 60)):
        refused(f"images are {height} x {width}; must be multiples of 8, at least 32", autoencoder,
                noise(1, 3, height, width))


def test_weights_that_are_not_the_encoders(tmp_path, taesd):
    refused("autoencoder: no file .*nowhere.pth", load_extractor, "autoencoder", weights="taesd_nowhere.pth")
    path = str(tmp_path / "x.pth")
    torch.save(taesd[0].decoder.state_dict(), path)
    refused("is of another architecture", load_extractor, "autoencoder", weights=path)


# ---------------------------------------------------------------- the cache of real features

class Counting:
    """An extractor that counts the images it reads."""

    def __init__(self, extractor):
        self.extractor, self.images = extractor, 0

    def __getattr__(self, name):
        return getattr(self.extractor, name)

    def __call__(self, images):
        self.images += len(images)
        return self.extractor(images)


@pytest.fixture
def cached(tmp_path, classifier, monkeypatch, capsys):
    """cached(images) -> (features, images read by the network, lines printed)."""
    monkeypatch.setattr(config, "CACHE", str(tmp_path / "cache"))

    def cached(images, extractor=classifier):
        counting = Counting(extractor)
        features = cached_features(counting, ImageSet(images), "test images")
        return features, counting.images, capsys.readouterr().out
    cached.folder = tmp_path / "cache" / "features"
    return cached


def test_real_features_are_made_once(cached, classifier):
    images = noise(30, 1, 28, 28)
    features, read, out = cached(images)
    assert (read, out) == (30, "") and torch.allclose(features, classifier(images), rtol=1e-5, atol=1e-5)
    again, read, out = cached(images.clone())
    assert (read, out) == (0, "") and torch.equal(again, features) and again.dtype == torch.float32
    assert [p.suffix for p in cached.folder.iterdir()] == [".pt"]  # nothing half written


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_no_file_in_the_place_of_the_cache(cached, kind):
    images = noise(30, 1, 28, 28)
    features, _, _ = cached(images)
    path, = cached.folder.iterdir()
    path.unlink()
    (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    again, read, out = cached(images)
    assert read == 30 and torch.equal(again, features) and ("not kept" in out) == (kind == "folder")


def test_other_images_and_another_extractor_are_made_anew(cached, classifier, tmp_path):
    saved = torch.load(WEIGHTS, weights_only=True)
    saved["state_dict"]["body.0.weight"] *= 1.5
    torch.save(saved, tmp_path / "other.pth")
    another, images = load_extractor("classifier", weights=str(tmp_path / "other.pth")), noise(20, 1, 28, 28)
    cached(images)
    other = images.clone()
    other[7, 0, 3, 3] ^= 1
    for changed in (other, images[:19]):
        found, read, out = cached(changed)
        assert (read, out) == (len(changed), "")
        assert torch.allclose(found, classifier(changed), rtol=1e-5, atol=1e-5)
    found, read, _ = cached(images, another)
    assert read == 20 and not torch.allclose(found, classifier(images), rtol=0.1)
    assert len(list(cached.folder.iterdir())) == 4 and cached(images)[1] == 0  # the first is still there


def spoil_half(path, content):
    path.write_bytes(content[:len(content) // 2])


def spoil_bit(path, content):
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:])


def spoil_key(path, content):
    torch.save({**torch.load(path, weights_only=True), "key": "of other images"}, path)


def spoil_pickle(path, content):
    torch.save({"x": Evil(path.with_suffix(".mark"))}, path)


@pytest.mark.parametrize("spoil", [spoil_half, spoil_bit, spoil_key, spoil_pickle])
def test_a_damaged_or_foreign_cache_is_made_again(cached, spoil):
    images = noise(20, 1, 28, 28)
    want, _, _ = cached(images)
    path, = cached.folder.iterdir()
    spoil(path, path.read_bytes())
    features, read, out = cached(images)
    assert read == 20 and torch.equal(features, want)
    assert out.count("\n") == 1 and path.name in out and "made again" in out
    assert cached(images)[1:] == (0, "")
    assert list(cached.folder.iterdir()) == [path]  # no mark of a pickle that ran either


def test_a_cache_that_cannot_be_written_stops_nothing(cached):
    cached.folder.parent.write_text("a file in the way")
    features, read, out = cached(noise(20, 1, 28, 28))
    assert (read, features.shape) == (20, (20, 128)) and out.count("\n") == 1 and "not kept" in out
