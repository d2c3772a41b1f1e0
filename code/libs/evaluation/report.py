"""From a set of generated images to numbers that can be believed: each beside its floor and its ceiling."""

import os

import torch

from ..datasets import build_dataset
from ..drawing import draw_images
from ..common.errors import UsageError
from .features import extract_features, load_extractor, real_statistics
from .fid import FeatureStatistics, frechet_distance, kernel_distance, precision_recall
from ..data.images import ImageSet, to_uint8
from .memorization import MemorizationTest
from ..models import sampling_options
from ..common.seeds import seeded_generator

KD_SUBSET = 1000  # rows of one estimate of the kernel distance, as is usual
NOISE_IMAGES = 2000  # enough to say how far away noise is
DRAWS = 5  # of as many test images as there are samples, for a floor


class RealImages:
    """The training and test images that generated ones are measured against, and their features.

    Args:
        config: a configuration; its `dataset`, whose `split` is not used, and its `eval.features`.
        device: where features are made.
        weights: the extractor's weight file; None is its own, for "autoencoder" the configuration's encoder.
        progress: called as progress(number of images) while features are made; not for those from a cache.
        say: gets lines of text.

    Attributes: `train`, `test` (ImageSet, uint8, cut out of the centre), `features` and `statistics` (split -> N x D,
    FeatureStatistics), `extractor`.

    Raises UsageError or RunError where data or extractor cannot be had.
    """

    def __init__(self, config, device, weights=None, progress=None, say=print):
        data, name = config["dataset"], config["eval"]["features"]
        name = name or ("classifier" if data["name"] == "MNIST" else "inception")
        if name == "autoencoder":
            weights = weights or config["model"]["vae_encoder_weights"]
        self.extractor = load_extractor(name, device, weights)
        self.sets, self.features, self.statistics, self.kept = {}, {}, {}, {}
        cache = os.path.join(data["data_folder"], ".features")
        for split in ("train", "test"):
            dataset, _, _ = build_dataset(data["name"], split, data["data_folder"], data["img_size"],
                                          limit=data["limit"] if split == "train" else None)
            images = ImageSet(dataset.images, dataset.labels, dataset.classes, dataset.img_size)
            self.statistics[split], self.features[split] = real_statistics(
                self.extractor, images, cache, 200, progress, say)
            self.sets[split] = images
            # how a copy can differ from an image here, as a model learns from random crops and mirrored images
            self.mirrored, self.shifts = dataset.flip, _shifts((dataset.images.shape[-1] - dataset.img_size) // 2)
        self.train, self.test = self.sets["train"], self.sets["test"]

    def some(self, split, n):
        """Features of `n` images, always the same ones: n x D."""
        order = torch.randperm(len(self.sets[split]), generator=seeded_generator("reference", split))
        return self.features[split][order[:n]]

    def like_test(self, split, n, draw=0):
        """Features of `n` images in which the classes have the test set's shares, as samples have: other ones a `draw`.

        Fewer than n where a class has too few images.
        """
        labels = self.sets[split].labels
        order = torch.randperm(len(labels), generator=seeded_generator("floor", split, draw))
        wanted = torch.bincount(labels_like(self.test.labels, len(self.train.classes), n))
        return self.features[split][torch.cat([order[labels[order] == k][:count] for k, count in enumerate(wanted)])]

    def baselines(self, n):
        """(floor, ceiling, images of the ceiling) at n images: the metrics of the test images and of noise. Kept.

        Where there are more test images than n, the floor is the mean of DRAWS times n of them.
        """
        if n not in self.kept:
            train, test, count = self.some("train", n), self.some("test", n), min(n, NOISE_IMAGES)
            draws = [test] if n == len(self.test) else [self.like_test("test", n, draw) for draw in range(DRAWS)]
            floors = [_distances(features, train, None) for features in draws]
            floor = {key: sum(each[key] for each in floors) / len(floors) for key in floors[0]}
            noise = torch.randint(256, (count, *self.train.shape[1:]), dtype=torch.uint8,
                                  generator=seeded_generator("noise"))
            noise = extract_features(self.extractor, noise.split(200))
            self.kept[n] = floor, _distances(noise, train, test), count
        return self.kept[n]

    def floor(self, n):
        """Mean Frechet distance to all test images of `n` training images like them in class: the floor of `against`."""
        distances = [frechet_distance(_statistics(self.like_test("train", n, draw)), self.statistics["test"])
                     for draw in range(DRAWS)]
        return sum(distances) / len(distances)


def labels_like(labels, num_classes, n):
    """`n` labels whose histogram is that of `labels`, to the nearest whole image: n, long, classes in turn."""
    share = torch.bincount(labels, minlength=num_classes).double() * n / len(labels)
    counts = share.floor().long()
    counts[(share - counts).argsort(descending=True, stable=True)[:n - int(counts.sum())]] += 1  # largest remainders
    drawn = torch.arange(num_classes).repeat_interleave(counts)
    return drawn[torch.randperm(n, generator=seeded_generator("labels"))]


def evaluate_model(model, config, real, device):
    """The numbers of `eval.num` images of a model in training, as name -> number; no search for copies."""
    labels = labels_like(real.test.labels, model.num_classes, config["eval"]["num"])
    pixels = [to_uint8(x) for x in draw_images(model, labels, sampling_options(config), config["seed"], device=device)]
    return scalars(evaluate(ImageSet(torch.cat(pixels), labels), real, memorization=False))


def scalars(report):
    """What of a report `evaluate` made is worth a curve: name -> number."""
    numbers = {key: value for key, value in report["generated"].items() if isinstance(value, float)}
    return numbers | {"fd_floor": report["floor"]["fd_train"]}


def evaluate(generated, real, memorization=True):
    """All numbers of one set of generated images.

    Args:
        generated: ImageSet of the real images' shape; with `labels`, if label accuracy is wanted.
        real: RealImages.
        memorization: look for copies of training images too (the slowest part).

    Returns:
        dict of plain values: `n` images of each set were compared with each other; `generated`, `floor` (the test
        images in their place) and `ceiling` (noise) each have `fd_train`, `fd_test`, `kd`, `kd_std`, `precision`,
        `recall` and, where the extractor can read labels, `label_accuracy`; where more than `n` were generated,
        `fd_train_all` and `fd_test_all` are of all images (numbers of them in `n_all`: generated, training, test);
        `memorization` is the report of a MemorizationTest.

    Raises:
        UsageError: images of another shape, or fewer than a metric can bear.
    """
    extractor, shape = real.extractor, real.train.shape[1:]
    if generated.shape[1:] != shape:
        raise UsageError(f"images are {_size(generated.shape[1:])}, those of the data set {_size(shape)}")
    n = min(len(generated), len(real.train), len(real.test))
    if n < 2:
        raise UsageError(f"{n} image{'s' * (n != 1)}; a Frechet distance needs at least 2")
    features = extract_features(extractor, generated.batches(200))
    chosen = torch.randperm(len(features), generator=seeded_generator("generated"))[:n]  # a folder is sorted by class
    floor, ceiling, count = real.baselines(n)
    report = {
        "n": n, "metric": extractor.metric, "extractor": extractor.name, "extractor_hash": extractor.hash,
        "generated": _distances(features[chosen], real.some("train", n), real.some("test", n)),
        "floor": dict(floor), "ceiling": ceiling, "ceiling_n": count,
    }
    if len(features) > n:
        for split in ("train", "test"):
            report[f"fd_{split}_all"] = frechet_distance(_statistics(features), real.statistics[split])
        report["n_all"] = [len(features), len(real.train), len(real.test)]
    if getattr(extractor, "classes", None) == list(real.train.classes):  # it can read these labels
        for key, rows, labels in (("generated", features, generated.labels),
                                  ("floor", real.features["test"], real.test.labels)):
            if labels is not None:
                hit = extractor.logits(rows).argmax(1) == labels
                report[key]["label_accuracy"] = float(hit.double().mean())
                report[key]["label_accuracy_by_class"] = [
                    round(float(hit[labels == k].double().mean()), 6) if (labels == k).any() else None
                    for k in range(len(real.train.classes))]
    if memorization:
        test = MemorizationTest(real.train.take().images, real.test.take().images,
                                (real.features["train"], real.features["test"]), real.shifts, real.mirrored)
        report["memorization"] = test.report(generated.take().images, features)
    return report


def against(generated, real):
    """The distances of one set of generated images to *all* training and test images, whatever its size.

    Returns name -> number: `fd_train`, `fd_test`; `precision` and `recall` with as many training images. What real images
    get in place of these is `real.floor`.
    """
    features = extract_features(real.extractor, generated.batches(200))
    statistics = _statistics(features)
    numbers = {f"fd_{split}": frechet_distance(statistics, real.statistics[split]) for split in ("train", "test")}
    n = min(len(features), len(real.train))
    numbers["precision"], numbers["recall"] = precision_recall(real.some("train", n), features[:n])
    return numbers


@torch.no_grad()
def denoising_error(model, x_start, labels, sigmas, seed=0, batch_size=100):
    """Mean squared error of the denoised image at each noise level, E |D(x + sigma n; sigma, label) - x|^2 / values.

    It means the same for every model of one space (pixels, or one autoencoder's latents), whatever it was trained to
    predict and however its loss is weighted. The noise of an image and level is the same for every model.

    Args:
        x_start: N x *model.img_shape, in the model's space, on its device; labels: N; sigmas: noise levels.

    Returns a list, one number a noise level.
    """
    totals = []
    for k, sigma in enumerate(sigmas):
        generator, total = seeded_generator(seed, "denoising", k), 0.0
        for x, label in zip(x_start.split(batch_size), labels.split(batch_size)):
            noise = torch.randn(x.shape, generator=generator).to(x)
            total += float((model.denoise(x + sigma * noise, sigma, label) - x).double().square().sum())
        totals.append(total / x_start.numel())
    return totals


def _statistics(features):
    return FeatureStatistics(features.shape[1]).update(features)


def _distances(features, train, test):
    """The metrics of one set against the real ones. test: None where the set is the test set."""
    numbers = {"fd_train": frechet_distance(_statistics(features), _statistics(train))}
    if test is not None:
        numbers["fd_test"] = frechet_distance(_statistics(features), _statistics(test))
    size = min(KD_SUBSET, len(features))
    numbers["kd"], numbers["kd_std"] = kernel_distance(train, features, size, 50)
    if min(len(features), len(train)) > 3:
        numbers["precision"], numbers["recall"] = precision_recall(train, features)
    return numbers


def _shifts(most):
    """By how many pixels a copy of the centre may be shifted where crops differ from it by up to `most`."""
    return (-1, 0, 1) if most < 2 else (-most, -most // 2, 0, most // 2, most)


def _size(shape):
    return " x ".join(map(str, shape))
