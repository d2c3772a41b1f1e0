"""All numbers of a set of generated images, each beside its floor (real images) and its ceiling (noise)."""

import torch

from ..common.cli import progress_bar
from ..common.errors import UsageError
from ..common.seeds import seeded_generator
from ..data.images import ImageSet, times, to_uint8
from ..datasets import RandomViews, build_dataset
from .features import cached_features, extract_features, load_extractor
from .fid import fit_gaussian, frechet_distance, kernel_distance, precision_recall
from .memorization import MemorizationTest

KD_SUBSET = 1000  # rows of one estimate of the kernel distance, the usual number
NOISE_IMAGES = 2000  # of the ceiling, at most
DRAWS = 5  # subsets of real images that a floor is the mean of
FLOORS = ("floor", "floor_augmented", "reconstructions")


class RealImages:
    """The training and test images that generated ones are measured against, and their features.

    Args:
        config: a configuration; of it `dataset` (both splits), `eval.features` and, for "autoencoder", the encoder.
        device: where features are made.

    Attributes:
        train, test: ImageSet, uint8, cropped to the centre.
        augmented: split -> ImageSet, cropped and mirrored at random as in training; empty where training does neither.
        features, gaussians: split -> N x D, Gaussian.
        extractor: the Extractor.
        reconstructed: {"test": features of the test images after a model's autoencoder}; empty until `reconstruct`.
        shifts, mirrored: how a copy can differ from its image, as a model learns from random crops and mirrored images.

    Raises UsageError or RunError where the data or the extractor are missing.
    """

    def __init__(self, config, device):
        data, name = config["dataset"], config["eval"]["features"]
        name = name or ("classifier" if data["name"] == "MNIST" else "mobilenet")
        weights = config["model"]["vae_encoder_weights"] if name == "autoencoder" else None
        self.extractor = load_extractor(name, device, weights)
        self.sets, self.augmented, self.reconstructed, self.kept_baselines = {}, {}, {}, {}
        self.features, self.gaussians = {}, {}
        for split in ("train", "test"):
            dataset, _, _ = build_dataset(data["name"], split, data["data_folder"], data["img_size"], (0, 255),
                                          data["limit"] if split == "train" else None)
            images = ImageSet(dataset.images, dataset.labels, dataset.classes, dataset.img_size)
            self.sets[split] = images
            self.features[split] = cached_features(self.extractor, images, f"{split} images")
            self.gaussians[split] = fit_gaussian(self.features[split])
            margin = dataset.images.shape[-1] - dataset.img_size
            self.mirrored, self.shifts = dataset.flip, _shifts(margin // 2)
            if dataset.flip or margin:
                self.augmented[split] = ImageSet(RandomViews(dataset, split))
        self.train, self.test = self.sets["train"], self.sets["test"]

    def order(self, split):
        return torch.randperm(len(self.sets[split]), generator=seeded_generator("reference", split))

    def subset(self, split, n):
        """Features of `n` images, always the same ones: n x D."""
        return self.features[split][self.order(split)[:n]]

    def like_test(self, split, n, draw):
        """Numbers of `n` images whose classes have the test set's shares, as samples have: others for each `draw`.

        Fewer than n where a class has too few images.
        """
        labels = self.sets[split].labels
        order = torch.randperm(len(labels), generator=seeded_generator("floor", split, draw))
        wanted = torch.bincount(labels_like(self.test.labels, len(self.train.classes), n))
        return torch.cat([order[labels[order] == k][:count] for k, count in enumerate(wanted)])

    def reconstruct(self, model, device):
        """Encode and decode the test images by the autoencoder of `model`, on `device`, from now on for `floors`."""
        images = (model.postprocess(model.encode(x.to(device) / 255)) for x in self.test.batches(50))
        with progress_bar(len(self.test), "image", "reconstructions of the test images") as bar:
            features = extract_features(self.extractor, (to_uint8(x.cpu()) for x in images), bar.update)
        self.reconstructed["test"] = features
        self.kept_baselines.clear()

    def views(self, split):
        """Features of all images of a split, name of FLOORS -> N x D, see `floors`."""
        features = {"floor": self.features[split]}
        if split in self.augmented:
            features["floor_augmented"] = cached_features(self.extractor, self.augmented[split],
                                                          f"{split} images, cropped and mirrored")
        if split in self.reconstructed:
            features["reconstructions"] = self.reconstructed[split]
        return features

    def floors(self, split, n, measure):
        """Means of the numbers in measure(features n x D) over DRAWS subsets of a split, or of all test images.

        Returns `floor`, of the images themselves, and where the data are augmented `floor_augmented`, of the same ones
        cropped and mirrored at random: what a perfect model of all that it learns from would get. Of the test images,
        after `reconstruct`, also `reconstructions`: what a perfect model of the latents would get.
        """
        whole = split == "test" and n == len(self.test)
        draws = [self.order(split)] if whole else [self.like_test(split, n, draw) for draw in range(DRAWS)]
        numbers = {name: [measure(x[index]) for index in draws] for name, x in self.views(split).items()}
        return {name: {key: sum(each[key] for each in found) / len(found) for key in found[0]}
                for name, found in numbers.items()}

    def baselines(self, n):
        """The metrics of n test images, see `floors`, and of noise: `ceiling`, of `ceiling_n` images. Computed once."""
        if n not in self.kept_baselines:
            train, test, count = self.subset("train", n), self.subset("test", n), min(n, NOISE_IMAGES)
            noise = torch.randint(256, (count, *self.train.shape[1:]), dtype=torch.uint8,
                                  generator=seeded_generator("noise"))
            noise = extract_features(self.extractor, noise.split(200))
            labels = labels_like(self.test.labels, len(self.train.classes), count)
            found = self.floors("test", n, lambda features: _distances(features, train, None))
            for name, share in self.recognised_floors().items():
                found[name]["recognised"] = share
            self.kept_baselines[n] = {**found, "ceiling_n": count,
                                      "ceiling": _distances(noise, train, test) | self.recognised(noise, labels)}
        return self.kept_baselines[n]

    def recognised(self, features, labels):
        """{"recognised": share}, see `mobilenet.recognised`, or {} where that cannot be said. labels: N, or None."""
        share = None if labels is None else self.extractor.recognised(features, labels, self.train.classes)
        return {} if share is None else {"recognised": share}

    def recognised_floors(self):
        """name of FLOORS -> share recognised of all test images in that view; empty where that cannot be said."""
        found = {name: self.recognised(features, self.test.labels) for name, features in self.views("test").items()}
        return {name: numbers["recognised"] for name, numbers in found.items() if numbers}

    def floors_to_all(self, n):
        """The `floors` of `distances_to_all`: name -> Frechet distance of `n` training images to all test images."""
        found = self.floors("train", n, lambda x: {"fd": frechet_distance(fit_gaussian(x), self.gaussians["test"])})
        return {name: numbers["fd"] for name, numbers in found.items()}


def labels_like(labels, num_classes, n):
    """`n` labels, in random order, whose histogram is that of `labels` to the nearest whole image: n, long."""
    share = torch.bincount(labels, minlength=num_classes).double() * n / len(labels)
    counts = share.floor().long()
    counts[(share - counts).argsort(descending=True, stable=True)[:n - int(counts.sum())]] += 1  # largest remainders
    drawn = torch.arange(num_classes).repeat_interleave(counts)
    return drawn[torch.randperm(n, generator=seeded_generator("labels"))]


def scalars(report):
    """The numbers of a report of `evaluate` that TensorBoard draws as curves: name -> number."""
    numbers = {key: value for key, value in report["generated"].items() if isinstance(value, float)}
    return numbers | {f"fd_{name}": report[name]["fd_train"] for name in FLOORS if name in report}


def evaluate(generated, real, memorization=True):
    """All numbers of one set of generated images.

    Args:
        generated: ImageSet of the real images' shape; label accuracy and `recognised` need its `labels`.
        real: RealImages.
        memorization: look for copies of training images too (the slowest part).

    Returns:
        dict of plain values: `n` images of each set were compared with each other; `generated`, `floor` (the test
        images in their place), perhaps `floor_augmented` and `reconstructions` (see RealImages.floors) and `ceiling`
        (noise) each have `fd_train`, `fd_test`, `kd`, `kd_std` where n is above KD_SUBSET, `precision`, `recall` and,
        where the extractor can read labels, `label_accuracy` or `recognised`; where more than `n` were generated,
        `fd_train_all` and `fd_test_all` are of all images (numbers of them in `n_all`: generated, training, test);
        `memorization` is the report of a MemorizationTest.

    Raises:
        UsageError: images of another shape, or too few.
    """
    extractor, shape = real.extractor, real.train.shape[1:]
    if generated.shape[1:] != shape:
        raise UsageError(f"images are {times(generated.shape[1:])}, those of the data set {times(shape)}")
    n = min(len(generated), len(real.train), len(real.test))
    if n < 2:
        raise UsageError(f"{n} image{'s' * (n != 1)}; a Frechet distance needs at least 2")
    features = extract_features(extractor, generated.batches())
    chosen = torch.randperm(len(features), generator=seeded_generator("generated"))[:n]  # a folder is sorted by class
    report = {
        "n": n, "metric": extractor.metric, "extractor": extractor.name, "extractor_hash": extractor.hash,
        "generated": _distances(features[chosen], real.subset("train", n), real.subset("test", n)),
        **real.baselines(n),
    }
    if len(features) > n:
        for split in ("train", "test"):
            report[f"fd_{split}_all"] = frechet_distance(fit_gaussian(features), real.gaussians[split])
        report["n_all"] = [len(features), len(real.train), len(real.test)]
    report["generated"] |= real.recognised(features, generated.labels)
    if getattr(extractor, "classes", None) == list(real.train.classes):  # it can read these labels
        report["floor"] = report["floor"] | _label_accuracy(extractor, real.features["test"], real.test.labels)
        if generated.labels is not None:
            report["generated"] |= _label_accuracy(extractor, features, generated.labels)
    if memorization:
        test = MemorizationTest(real.train.take().images, real.test.take().images,
                                (real.features["train"], real.features["test"]), real.shifts, real.mirrored)
        report["memorization"] = test.report(generated.take().images, features)
    return report


def distances_to_all(generated, real):
    """The distances of one set of generated images to *all* training and test images, whatever its size.

    Returns name -> number: `fd_train`, `fd_test`; `precision` and `recall` with as many training images; where the
    extractor can read labels, `label_accuracy` or `recognised`. The floors of `fd_test` are `real.floors_to_all`.
    """
    features = extract_features(real.extractor, generated.batches())
    gaussian = fit_gaussian(features)
    numbers = {f"fd_{split}": frechet_distance(gaussian, real.gaussians[split]) for split in ("train", "test")}
    n = min(len(features), len(real.train))
    numbers["precision"], numbers["recall"] = precision_recall(real.subset("train", n), features[:n])
    if getattr(real.extractor, "classes", None) == list(real.train.classes):
        numbers["label_accuracy"] = _label_accuracy(real.extractor, features, generated.labels)["label_accuracy"]
    return numbers | real.recognised(features, generated.labels)


@torch.no_grad()
def denoising_error(model, x_start, labels, sigmas, seed=0, batch_size=100):
    """Mean squared error of the denoised image at each noise level, E |D(x + sigma n; sigma, label) - x|^2 / values.

    Comparable between all models of one space (pixels, or one autoencoder's latents), whatever they predict and however
    their losses are weighted. The noise of an image and level is the same for every model.

    Args:
        x_start: N x *model.img_shape, in the model's space, on its device; labels: N; sigmas: noise levels.

    Returns a list, one number for each noise level.
    """
    totals = []
    for k, sigma in enumerate(sigmas):
        generator, total = seeded_generator(seed, "denoising", k), 0.0
        for x, label in zip(x_start.split(batch_size), labels.split(batch_size)):
            noise = torch.randn(x.shape, generator=generator).to(x)
            error = model.denoise(x + sigma * noise, sigma, label) - x
            total += float(error.cpu().double().square().sum())  # in this order: Apple's GPU has no float64
        totals.append(total / x_start.numel())
    return totals


def _distances(features, train, test):
    """The metrics of one set against the real ones. test: None where the set is the test set."""
    gaussian = fit_gaussian(features)
    numbers = {"fd_train": frechet_distance(gaussian, fit_gaussian(train))}
    if test is not None:
        numbers["fd_test"] = frechet_distance(gaussian, fit_gaussian(test))
    numbers["kd"], deviation = kernel_distance(train, features, KD_SUBSET, 50)
    if deviation is not None:
        numbers["kd_std"] = deviation
    if min(len(features), len(train)) > 3:
        numbers["precision"], numbers["recall"] = precision_recall(train, features)
    return numbers


def _label_accuracy(extractor, features, labels):
    """Share of the images that the extractor's network gives the right label, of all and of each class."""
    hit = extractor.logits(features).argmax(1) == labels
    return {"label_accuracy": float(hit.double().mean()),
            "label_accuracy_by_class": [round(float(hit[labels == k].double().mean()), 6) if (labels == k).any() else None
                                        for k in range(len(extractor.classes))]}


def _shifts(most):
    """The shifts, in pixels, at which copies of the centre are looked for; crops differ from it by up to `most`."""
    return (-1, 0, 1) if most < 2 else (-most, -most // 2, 0, most // 2, most)
