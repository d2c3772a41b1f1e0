"""Images -> the features that sets of images are compared by: one interface to four networks.

A Frechet distance has a name only with its extractor: "FID" is the Inception network's alone.
"""

import io
import os

import torch
import torch.nn.functional as F

from .. import config
from ..common.cli import progress_bar
from ..common.errors import RunError, UsageError, display_path, first_line
from ..common.files import atomic_file, matches, read_tensors, save_tensors
from ..data.images import to_channels
from ..tiny_autoencoder import DOWNSCALE, LATENT_CHANNELS, build_encoder, in_parts, load_weight_file
from .classifier import WEIGHTS, file_hash, load_classifier
from .mobilenet import WEIGHTS as MOBILENET, load_mobilenet, recognised

# the Inception network of Heusel et al. 2017, converted to PyTorch; its name ends in the first 8 digits of its SHA-256
INCEPTION_URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                 "weights-inception-2015-12-05-6726825d.pth")
INCEPTION_HASH = "6726825d"
BATCH = 32  # images in a network at a time, whatever the batch size: Inception needs 20 MB for each


class Extractor:
    """Images to features.

    Attributes:
        name: the name for `load_extractor`.
        metric: the name of a Frechet distance of these features.
        dim: D, features per image.
        hash: first 12 hex digits of the weight file's SHA-256, to stand beside every number.
        network: the frozen module, on `device`.
    """

    def _load(self, path, network, device):
        self.hash, self.device = file_hash(path), device
        self.network = network.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def __call__(self, images):
        """uint8 B x C x H x W, C 1 or 3, on any device -> B x D float32 on the CPU. Row k depends on image k alone.

        Raises UsageError for a size that the network does not take.
        """
        # the 10 bits of TF32, cuDNN's default, would show in the third digit of a feature
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            parts = [self._features(part.to(self.device)).float().cpu() for part in images.split(BATCH)]
        return torch.cat(parts)

    def recognised(self, features, labels, classes):
        """See `mobilenet.recognised`. None: the network knows no photographs."""
        return None


class ClassifierExtractor(Extractor):
    """The digit classifier before its last layer: 128 numbers."""

    name, metric = "classifier", "FD (classifier)"
    classes = [str(digit) for digit in range(10)]

    def __init__(self, weights=None, device="cpu"):
        path = weights or WEIGHTS
        self._load(path, load_classifier(path), device)
        self.dim = self.network.feature_dim

    def _features(self, images):
        if images.shape[1:] != (1, 28, 28):
            raise UsageError(f"classifier: images are {tuple(images.shape)}; must be B x 1 x 28 x 28")
        return self.network.features(images.float() / 255)

    @torch.no_grad()
    def logits(self, features):
        """Features B x 128 -> logits B x 10 on the CPU: accuracy without a second pass over the images."""
        return self.network.head(features.to(self.device)).cpu()


class MobileNetExtractor(Extractor):
    """MobileNet before its last layer: 768 numbers, grey as three equal channels. Takes any size."""

    name, metric = "mobilenet", "FD (MobileNet)"

    def __init__(self, weights=None, device="cpu"):
        path = weights or MOBILENET
        self._load(path, load_mobilenet(path), device)
        self.dim = self.network.feature_dim

    def _features(self, images):
        return self.network.features(to_channels(images, 3))

    @torch.no_grad()
    def recognised(self, features, labels, classes):
        return recognised(self.network.head(features.to(self.device)), labels, classes)


class InceptionExtractor(Extractor):
    """The standard Inception-v3 of FID, from torch-fidelity: 2048 numbers, grey as three equal channels.

    The network itself resizes to 299 x 299, as TensorFlow 1 did; with another resize it would not be FID.
    """

    name, layer = "inception", "2048"

    def __init__(self, weights=None, device="cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise UsageError("inception: needs torch-fidelity: pip install -r requirements-extra.txt") from None
        path = weights or fetch_inception()
        if not os.path.isfile(path):
            raise UsageError(f"inception: no file {display_path(path)}; its weights are at {INCEPTION_URL}")
        try:
            safe = io.BytesIO()  # torch-fidelity unpickles any file: give it our own pickle of the tensors
            torch.save(read_tensors(path), safe)
            safe.seek(0)
            network = FeatureExtractorInceptionV3(self.name, [self.layer], feature_extractor_weights_path=safe)
        except Exception as e:  # a foreign file fails in torch in many ways, all with the same meaning
            raise UsageError(f"inception: {display_path(path)} is no weight file of FID's Inception "
                             f"({first_line(e)})") from None
        self._load(path, network, device)
        self.dim = int(self.layer)
        self.metric = "FID" if self.hash.startswith(INCEPTION_HASH) else "FD (Inception of other weights)"

    def _features(self, images):
        return self.network(to_channels(images, 3))[0]


class AutoencoderExtractor(Extractor):
    """TAESD's latents, averaged over a grid of 4 x 4 cells: mean and standard deviation of 4 channels, 128 numbers.

    16 cells keep the layout; within a cell, the mean sees colour and the deviation sees detail, which blur removes.
    More numbers would ask for more images (a covariance needs several times D of them). For comparing models of this
    repository with each other: nobody else's numbers are of this kind.
    """

    name, metric, grid = "autoencoder", "FD (autoencoder)", 4
    dim = 2 * LATENT_CHANNELS * grid ** 2

    def __init__(self, weights=None, device="cpu"):
        path = weights or os.path.join(os.path.dirname(WEIGHTS), "taesd_encoder.pth")
        network = build_encoder().to(memory_format=torch.channels_last)
        load_weight_file(network, path, "autoencoder")
        self._load(path, network, device)

    def _features(self, images):
        height, width = images.shape[2:]
        least = DOWNSCALE * self.grid
        if height % DOWNSCALE or width % DOWNSCALE or min(height, width) < least:
            raise UsageError(f"autoencoder: images are {height} x {width}; must be multiples of {DOWNSCALE}, "
                             f"at least {least}")
        latents = in_parts(self.network, to_channels(images, 3).float() / 255).cpu().double()
        mean, square = (F.adaptive_avg_pool2d(x, self.grid) for x in (latents, latents.square()))
        return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt()], 1).flatten(1)


EXTRACTORS = {kind.name: kind for kind in (ClassifierExtractor, MobileNetExtractor, InceptionExtractor,
                                           AutoencoderExtractor)}


def load_extractor(name, device="cpu", weights=None):
    """An `Extractor` by name: "classifier", "mobilenet", "inception" or "autoencoder".

    Args:
        weights: its weight file. None: the one in pretrained/, or for "inception" the published one, which is fetched
            (91 MiB) on first use.

    Raises:
        UsageError: missing package, a weight file that is missing or another network's.
        RunError: the weights cannot be fetched.
    """
    return EXTRACTORS[name](weights, device)


def fetch_inception():
    """Path of the Inception weights in the cache of torch.hub, where torch-fidelity keeps them too.

    A download with another hash is discarded. Raises RunError when the weights cannot be fetched.
    """
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(INCEPTION_URL))
    if not os.path.isfile(path):
        print(f"fetching the Inception weights (91 MiB) to {display_path(path)}", flush=True)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, path, hash_prefix=INCEPTION_HASH, progress=False)
        except Exception as e:  # no network, a proxy's error page, a full disk
            raise RunError(f"the Inception weights cannot be fetched ({first_line(e)}): "
                           f"put {INCEPTION_URL} at {path}") from None
    return path


def extract_features(extractor, batches, progress=None):
    """Features N x D, float32, of an iterable of uint8 batches B x C x H x W.

    progress: called with the number of images after each batch.
    """
    features = []
    for batch in batches:
        features.append(extractor(batch))
        if progress:
            progress(len(batch))
    return torch.cat(features)


def cached_features(extractor, images, what):
    """Features N x D, float32, of an ImageSet: read from the project's cache, or made and kept there.

    The cache is found by the images' pixels and the extractor's weights, so other data, another size or number of
    images, and another extractor each have a file of their own. A damaged file is made again.

    what: the images' name in the line of progress, such as "train images".
    """
    digest = images.digest()
    key = f"{extractor.name} {extractor.hash} {extractor.dim} {digest}"
    folder = os.path.join(config.CACHE, "features")
    path = os.path.join(folder, f"{extractor.name}-{extractor.hash}-{len(images)}-{digest[:12]}.pt")
    if os.path.isfile(path):
        try:
            saved = read_tensors(path)
            if saved["key"] == key and matches(saved["features"], torch.empty(len(images), extractor.dim)):
                return saved["features"]
            raise ValueError("of other images or another extractor")
        except Exception as e:  # a damaged file makes zipfile and torch raise almost anything
            print(f"features: {display_path(path)} is damaged or another file ({first_line(e)}): made again")
    with progress_bar(len(images), "image", f"features of the {what}") as bar:
        features = extract_features(extractor, images.batches(200), bar.update)
    try:
        os.makedirs(folder, exist_ok=True)
        with atomic_file(path) as f:
            save_tensors({"key": key, "features": features}, f)
    except (OSError, RunError) as e:  # a full disk does not stop the run
        print(f"features are not kept for the next time: {first_line(e)}")
    return features
