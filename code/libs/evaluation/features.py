"""Images -> the features that distances between sets of images are measured in: one face for three networks.

A Frechet distance has a name only with its extractor: "FID" is the Inception network's alone.
"""

import io
import os
import socket
import zipfile

import torch
import torch.nn.functional as F

from .classifier import WEIGHTS, file_hash, load_classifier
from ..common.errors import RunError, UsageError, first_line, display_path
from .fid import FeatureStatistics
from ..common.files import save_tensors, atomic_file
from ..data.images import to_channels
from ..tiny_autoencoder import DOWNSCALE, LATENT_CHANNELS, build_encoder, in_parts, load_weights

# the Inception network of Heusel et al. 2017, converted to PyTorch: one file, which two projects publish under two
# names. The names end in the first 8 digits of its SHA-256.
INCEPTION_URLS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
INCEPTION_HASH = "6726825d"
BATCH = 32  # images in a network at a time, however many are asked for: Inception needs 20 MB for each


class Extractor:
    """Images to features.

    Attributes:
        name: what `load_extractor` was asked for.
        metric: what a Frechet distance of these features is called.
        dim: D, features per image.
        hash: first 12 hex digits of the weight file's SHA-256, to stand beside every number.
        network: the frozen module, on `device`.
    """

    def _load(self, path, network, device):
        self.hash, self.device = file_hash(path), device
        self.network = network.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def __call__(self, images):
        """uint8 B x C x H x W, on any device -> B x D float32 on the CPU. Row k depends on image k alone.

        Raises UsageError where images are of another type, or of a size that the network does not take.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise UsageError(f"{self.name}: images are {images.dtype}, {tuple(images.shape)}; must be uint8, 0 to 255, "
                             "B x C x H x W with C of 1 or 3")
        # the 10 bits of TF32, cuDNN's default, would show in the third digit of a feature
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            parts = [self._features(part.to(self.device)).float().cpu() for part in images.split(BATCH)]
        return torch.cat(parts)


class ClassifierExtractor(Extractor):
    """The digit classifier, before its last layer: 128 numbers."""

    name, metric = "classifier", "FD (classifier)"
    classes = [str(digit) for digit in range(10)]

    def __init__(self, weights=None, device="cpu"):
        path = WEIGHTS if weights is None else weights
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


class InceptionExtractor(Extractor):
    """The standard Inception-v3 of FID, as torch-fidelity has it: 2048 numbers, grey as three equal channels.

    Resizing to 299 x 299 is the network's own, as TensorFlow 1 did it; another one would be another FID.
    """

    name, layer = "inception", "2048"

    def __init__(self, weights=None, device="cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise UsageError("inception: needs torch-fidelity: pip install -r requirements-extra.txt") from None
        path = fetch_inception() if weights is None else weights
        if not os.path.isfile(path):
            raise UsageError(f"inception: no file {display_path(path)}; its weights are at {INCEPTION_URLS[0]}")
        try:
            safe = io.BytesIO()  # torch-fidelity unpickles whatever it is given: give it our own pickle of the tensors
            torch.save(torch.load(path, map_location="cpu", weights_only=True), safe)
            safe.seek(0)
            network = FeatureExtractorInceptionV3(self.name, [self.layer], feature_extractor_weights_path=safe)
        except Exception as e:  # a foreign file fails in torch in many ways, all with the same meaning
            raise UsageError(f"inception: {display_path(path)} is no weight file of FID's Inception ({first_line(e)})") from None
        self._load(path, network, device)
        self.dim = int(self.layer)
        self.metric = "FID" if self.hash.startswith(INCEPTION_HASH) else "FD (Inception of other weights)"

    def _features(self, images):
        return self.network(to_channels(images, 3))[0]


class AutoencoderExtractor(Extractor):
    """TAESD's latents, summed up in 4 x 4 cells: 128 numbers, 4 channels of a mean and a standard deviation per cell.

    16 cells keep where things are; within a cell, the mean sees colour and the deviation detail, which blur takes
    away. More numbers would ask for more images (a covariance needs several times D of them). It compares models of
    this repository with each other; nobody else's numbers are of this kind.
    """

    name, metric, grid = "autoencoder", "FD (autoencoder)", 4
    dim = 2 * LATENT_CHANNELS * grid ** 2

    def __init__(self, weights=None, device="cpu"):
        path = os.path.join(os.path.dirname(WEIGHTS), "taesd_encoder.pth") if weights is None else weights
        network = build_encoder().to(memory_format=torch.channels_last)
        load_weights(network, path, "autoencoder")
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


EXTRACTORS = {kind.name: kind for kind in (ClassifierExtractor, InceptionExtractor, AutoencoderExtractor)}


def load_extractor(name, device="cpu", weights=None):
    """An `Extractor` by name: "classifier", "inception" or "autoencoder".

    Args:
        weights: its weight file. None: the one in pretrained/, or for "inception" the published one, which is fetched
            (91 MiB) on first use.

    Raises:
        UsageError: unknown name, missing package, a weight file that is missing or another network's.
        RunError: the weights cannot be fetched.
    """
    if name not in EXTRACTORS:
        raise UsageError(f"extractor: unknown {name!r}; it is one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](weights, device)


def fetch_inception():
    """Path of the Inception weights, in the cache of torch.hub, where torch-fidelity and pytorch-fid keep them too.

    Nothing gets that name which has another hash. Raises RunError when they cannot be fetched, and UsageError when
    the file that is there is another one.
    """
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    paths = [os.path.join(folder, os.path.basename(url)) for url in INCEPTION_URLS]
    for path in filter(os.path.isfile, paths):
        found = file_hash(path)
        if not found.startswith(INCEPTION_HASH):
            raise UsageError(f"inception: the SHA-256 of {path} starts with {found[:8]}, not {INCEPTION_HASH}: "
                             "remove the file, and it is fetched again")
        return path
    print(f"fetching the Inception weights (91 MiB) into {display_path(folder)}", flush=True)
    timeout, reasons = socket.getdefaulttimeout(), []
    socket.setdefaulttimeout(20)  # a server that does not answer is no reason to wait for ever
    try:
        for url, path in zip(INCEPTION_URLS, paths):
            try:
                os.makedirs(folder, exist_ok=True)
                torch.hub.download_url_to_file(url, path, hash_prefix=INCEPTION_HASH, progress=False)
                return path
            except Exception as e:  # no network, a proxy's error page, a full disk
                reasons.append(first_line(e))
    finally:
        socket.setdefaulttimeout(timeout)
    raise RunError(f"the Inception weights cannot be fetched ({reasons[0]}): "
                   f"put {INCEPTION_URLS[0]} by hand at {paths[0]}")


def extract_features(extractor, batches, progress=None):
    """Features N x D, float32, of an iterable of uint8 batches B x C x H x W.

    progress: called with the number of images after each batch; `tqdm.update` fits.
    """
    features = [torch.empty(0, extractor.dim)]
    for batch in batches:
        features.append(extractor(batch))
        if progress:
            progress(len(batch))
    return torch.cat(features)


def real_statistics(extractor, images, cache_folder, batch_size=50, progress=None, say=print):
    """(FeatureStatistics, features N x D float32) of real images, from `cache_folder` if they are there.

    The cache goes by the pixels and the extractor's weights, so that other data, another size, split or number, and
    another extractor can not be taken for these.

    Args:
        images: an ImageSet.
        progress: as in `extract_features`; not called where the cache is used.
        say: gets a line about a cache that is damaged, or cannot be written; neither stops anything.
    """
    digest = images.digest()
    key = f"{extractor.name} {extractor.hash} {extractor.dim} {digest}"
    path = os.path.join(cache_folder, f"{extractor.name}-{extractor.hash}-{len(images)}-{digest[:12]}.pt")
    if os.path.exists(path):
        try:
            return _read_cache(path, key, (len(images), extractor.dim))
        except Exception as e:  # a damaged file makes zipfile and torch raise almost anything
            say(f"features: {display_path(path)} is damaged or another file ({first_line(e)}): made again")
    features = extract_features(extractor, images.batches(batch_size), progress)
    statistics = FeatureStatistics(extractor.dim).update(features)
    try:
        os.makedirs(cache_folder, exist_ok=True)
        with atomic_file(path) as f:
            save_tensors({"key": key, "features": features, "statistics": statistics.state_dict()}, f)
    except (OSError, RunError) as e:
        say(f"features are not kept for the next time: {first_line(e)}")
    return statistics, features


def _read_cache(path, key, shape):
    with zipfile.ZipFile(path) as z:
        if z.testzip():  # torch itself does not look at the checksums
            raise zipfile.BadZipFile("wrong checksum")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    statistics, features = FeatureStatistics.from_state(saved["statistics"]), saved["features"]
    if saved["key"] != key or (statistics.n, len(statistics.mean)) != shape or features.shape != shape:
        raise ValueError("of other images or another extractor")
    return statistics, features
