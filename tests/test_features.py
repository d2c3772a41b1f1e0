"""Feature extractors of the classifier and the autoencoder, and the cache of real features."""

import gzip
import os

import numpy as np
import pytest
import torch

from helpers import Evil, one_line, picture
from libs import UsageError, features
from libs.evaluation.classifier import accuracy, file_hash, load_classifier
from libs.evaluation.features import extract_features, load_extractor, real_statistics
from libs.evaluation.fid import FeatureStatistics, frechet_distance
from libs.data.images import ImageSet, to_channels
from libs.tiny_autoencoder import TAESD


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pictures(n, size):
    return torch.stack([torch.from_numpy(np.array(picture(k, size, size))) for k in range(n)]).permute(0, 3, 1, 2)


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


# ---------------------------------------------------------------- one face

def test_every_number_can_say_what_it_was_measured_with(classifier, autoencoder, taesd):
    found = [(e.name, e.metric, e.dim, e.hash) for e in (classifier, autoencoder)]
    assert found == [("classifier", "FD (classifier)", 128, file_hash()),
                     ("autoencoder", "FD (autoencoder)", 128, file_hash(taesd[1]))]
    assert not any(p.requires_grad for e in (classifier, autoencoder) for p in e.network.parameters())
    refused("unknown 'vgg'; it is one of classifier, inception, autoencoder", load_extractor, "vgg")


@pytest.mark.parametrize("name, shape", [("classifier", (69, 1, 28, 28)), ("autoencoder", (69, 3, 32, 48))])
def test_a_row_depends_on_its_image_alone(request, name, shape):
    extractor, images = request.getfixturevalue(name), noise(*shape)
    whole = extractor(images)
    assert (whole.shape, whole.dtype, whole.device.type) == ((69, extractor.dim), torch.float32, "cpu")
    seen = []
    parts = extract_features(extractor, images.split(40), seen.append)
    assert seen == [40, 29] and whole.std(0).mean() > 0.01
    for found in (parts, extractor(images.flip(0)).flip(0)):
        assert (found - whole).abs().max() < 1e-4 * whole.std(0).mean()
    assert extract_features(extractor, []).shape == (0, extractor.dim)


@pytest.mark.parametrize("name", ["classifier", "autoencoder"])
def test_what_is_no_batch_of_uint8_images_is_refused(request, name):
    extractor = request.getfixturevalue(name)
    refused("images are torch.float32, .* must be uint8, 0 to 255", extractor, torch.rand(2, 1, 28, 28))
    refused("C of 1 or 3", extractor, noise(2, 4, 32, 32))
    refused("C of 1 or 3", extractor, noise(1, 28, 28))


# ---------------------------------------------------------------- the classifier

def test_classifier_features_are_those_of_the_judge(classifier):
    images = noise(5, 1, 28, 28)
    model = load_classifier()
    features, floats = classifier(images), images.float() / 255
    assert torch.allclose(features, model.features(floats), rtol=1e-5, atol=1e-6)
    assert torch.allclose(classifier.logits(features), model(floats), rtol=1e-5, atol=1e-5)


def test_the_classifier_reads_digits_alone(classifier):
    refused(r"classifier: images are \(2, 1, 32, 32\); must be B x 1 x 28 x 28", classifier, noise(2, 1, 32, 32))
    refused(r"classifier: images are \(2, 3, 28, 28\)", classifier, noise(2, 3, 28, 28))
    refused("classifier: no file nowhere.pth", load_extractor, "classifier", weights="nowhere.pth")


def test_accuracy_and_distance_of_real_digits_from_one_pass(classifier, real_data, tmp_path):
    raw = []
    for name, skip in (("t10k-images-idx3-ubyte.gz", 16), ("t10k-labels-idx1-ubyte.gz", 8)):
        with gzip.open(os.path.join(real_data, "mnist", "MNIST", "raw", name)) as f:
            raw.append(torch.frombuffer(bytearray(f.read()[skip:]), dtype=torch.uint8))
    digits = ImageSet(raw[0].reshape(-1, 1, 28, 28), raw[1].long()).take(torch.arange(1000))
    statistics, found = real_statistics(classifier, digits, str(tmp_path))
    hits = (classifier.logits(found).argmax(1) == digits.labels).sum().item() / 1000
    assert hits == accuracy(load_classifier(), digits.images, digits.labels) and hits > 0.98
    # half the digits against the other half, and against the same ones blurred
    halves = [FeatureStatistics(128).update(part) for part in found.split(500)]
    blurred = torch.nn.functional.avg_pool2d(digits.images[500:].float(), 3, 1, 1).byte()
    far = frechet_distance(halves[0], FeatureStatistics(128).update(extract_features(classifier, blurred.split(100))))
    assert statistics.n == 1000 and far > 5 * frechet_distance(*halves)


# ---------------------------------------------------------------- the autoencoder

@pytest.mark.parametrize("height, width", [(32, 32), (64, 96), (128, 128)])
def test_autoencoder_features_are_means_and_deviations_of_cells(autoencoder, taesd, height, width):
    images = noise(2, 3, height, width)
    latents = taesd[0].encoder(images.float() / 255).double().numpy()
    rows, cols = height // 32, width // 32  # latent pixels per cell
    cells = latents.reshape(2, 4, 4, rows, 4, cols)
    want = np.concatenate([cells.mean((3, 5)), cells.std((3, 5))], 1).reshape(2, 128)
    assert np.allclose(autoencoder(images).numpy(), want, rtol=1e-4, atol=1e-5 * abs(want).max())


def test_uneven_cells_and_grey_images_are_taken_too(autoencoder):
    images = pictures(3, 40)
    found = autoencoder(images)
    assert found.shape == (3, 128) and found.isfinite().all()
    grey = to_channels(images, 1)
    assert torch.equal(autoencoder(grey), autoencoder(grey.repeat(1, 3, 1, 1)))
    assert not torch.allclose(autoencoder(grey), found, rtol=1e-2)


@pytest.mark.parametrize("height, width", [(24, 64), (64, 24), (64, 60), (28, 28)])
def test_sizes_that_do_not_fit_the_autoencoder(autoencoder, height, width):
    refused(f"images are {height} x {width}; must be multiples of 8, at least 32", autoencoder,
            noise(1, 3, height, width))


def test_weights_that_are_not_the_encoders(tmp_path, taesd):
    refused("autoencoder: no file .*nowhere.pth; .*download_dataset.sh taesd", load_extractor, "autoencoder",
            weights="taesd_nowhere.pth")
    path, mark = str(tmp_path / "x.pth"), tmp_path / "mark"
    torch.save(taesd[0].decoder.state_dict(), path)
    refused("does not hold the weights", load_extractor, "autoencoder", weights=path)
    torch.save({"x": Evil(mark)}, path)
    refused("no file of plain weights", load_extractor, "autoencoder", weights=path)
    assert not mark.exists()


# ---------------------------------------------------------------- the cache of real features

class Counting:
    """The classifier, counting the images that it reads."""

    def __init__(self, extractor):
        self.extractor, self.images = extractor, 0

    def __getattr__(self, name):
        return getattr(self.extractor, name)

    def __call__(self, images):
        self.images += len(images)
        return self.extractor(images)


@pytest.fixture
def cache(tmp_path, classifier):
    """run(images) -> (statistics, features, images read by the network, lines said)."""
    folder = tmp_path / "cache"

    def run(images, extractor=classifier):
        counting, said, seen = Counting(extractor), [], []
        statistics, features = real_statistics(counting, images, str(folder), progress=seen.append, say=said.append)
        assert sum(seen) == counting.images
        return statistics, features, counting.images, said
    run.folder = folder
    return run


def test_real_features_are_made_once(cache, classifier):
    images = ImageSet(noise(130, 1, 28, 28))
    statistics, features, read, said = cache(images)
    assert (read, said, statistics.n) == (130, [], 130)
    assert torch.allclose(features, classifier(images.images), rtol=1e-5, atol=1e-5)
    assert np.allclose(statistics.cov.numpy(), np.cov(features.double().numpy().T), rtol=1e-9, atol=1e-12)
    again, kept, read, said = cache(ImageSet(images.images.clone(), torch.zeros(130)))
    assert (read, said, again.n) == (0, [], 130) and torch.equal(kept, features) and kept.dtype == torch.float32
    assert torch.equal(again.mean, statistics.mean) and torch.equal(again.cov, statistics.cov)
    assert [p.suffix for p in cache.folder.iterdir()] == [".pt"]  # nothing half written


@pytest.fixture
def another(tmp_path):
    """A classifier of other weights."""
    saved = torch.load(features.WEIGHTS, weights_only=True)
    saved["state_dict"]["body.0.weight"] *= 1.5
    torch.save(saved, tmp_path / "other.pth")
    return load_extractor("classifier", weights=str(tmp_path / "other.pth"))


def test_other_data_and_another_extractor_are_made_anew(cache, classifier, another):
    images = noise(20, 1, 28, 28)
    cache(ImageSet(images))
    other = images.clone()
    other[7, 0, 3, 3] ^= 1
    for changed in (other, images[:19], images.flip(0)):
        _, found, read, said = cache(ImageSet(changed))
        assert (read, said) == (len(changed), [])
        assert torch.allclose(found, classifier(changed), rtol=1e-5, atol=1e-5)
    assert another.hash != classifier.hash
    _, found, read, _ = cache(ImageSet(images), another)
    assert read == 20 and not torch.allclose(found, classifier(images), rtol=0.1)
    assert len(list(cache.folder.iterdir())) == 5
    assert cache(ImageSet(images))[2] == 0  # the first is still there


def spoil_half(path, content):
    path.write_bytes(content[:len(content) // 2])


def spoil_bit(path, content):
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:])


def spoil_text(path, content):
    path.write_text("no cache")


def spoil_keys(path, content):
    torch.save({"x": torch.zeros(3)}, path)


def spoil_length(path, content):
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "features": saved["features"][:-1]}, path)


def spoil_statistics(path, content):
    saved = torch.load(path, weights_only=True)
    saved["statistics"]["mean"][3] = float("nan")
    torch.save(saved, path)


def spoil_pickle(path, content):
    torch.save({"x": Evil(path.with_suffix(".mark"))}, path)


@pytest.mark.parametrize("spoil", [spoil_half, spoil_bit, spoil_text, spoil_keys, spoil_length, spoil_statistics,
                                   spoil_pickle])
def test_a_damaged_cache_is_made_again_and_this_is_said(cache, spoil):
    images = ImageSet(noise(20, 1, 28, 28))
    _, want, _, _ = cache(images)
    path, = cache.folder.iterdir()
    spoil(path, path.read_bytes())
    _, features, read, said = cache(images)
    assert read == 20 and torch.equal(features, want)
    assert len(said) == 1 and "\n" not in said[0] and path.name in said[0] and "made again" in said[0]
    assert cache(images)[2:] == (0, [])
    assert list(cache.folder.iterdir()) == [path]  # no mark of a pickle that ran either


@pytest.mark.parametrize("foreign", ["images", "extractor"])
def test_a_foreign_cache_under_this_name_is_made_again(cache, classifier, another, foreign):
    images = ImageSet(noise(20, 1, 28, 28))
    if foreign == "images":
        cache(ImageSet(noise(20, 1, 28, 28, seed=1)))
    else:
        cache(images, another)
    path, = cache.folder.iterdir()
    content = path.read_bytes()
    path.unlink()
    _, want, _, _ = cache(images)
    path, = cache.folder.iterdir()
    path.write_bytes(content)
    _, found, read, said = cache(images)
    assert read == 20 and torch.equal(found, want) and "of other images or another extractor" in said[0]


def test_a_cache_that_cannot_be_written_stops_nothing(cache):
    cache.folder.write_text("a file in the way")
    statistics, features, read, said = cache(ImageSet(noise(20, 1, 28, 28)))
    assert (read, statistics.n, features.shape) == (20, 20, (20, 128))
    assert len(said) == 1 and "not kept" in said[0]
    assert cache.folder.read_text() == "a file in the way"
