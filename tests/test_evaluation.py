"""The report of an evaluation: every number, its floor and its ceiling, and at which n."""

import os

import pytest
import torch

from evaluate import table
from helpers import SMALL, Place, one_line, picture
from libs import UsageError
from libs import config as settings
from libs.data.images import ImageSet, to_uint8
from libs.datasets import ImageDataset, build_dataset
from libs.ddpm import DDPM
from libs.edm import EDM
from libs.evaluation import report
from libs.evaluation.features import Extractor
from libs.evaluation.fid import fit_gaussian, frechet_distance, precision_recall
from libs.evaluation.report import RealImages, denoising_error, distances_to_all, evaluate, labels_like, scalars


class Corners(Extractor):
    """Features that can be worked out by hand: four pixels, and labels that are read off one of them."""

    classes = ["dark", "light"]
    name, metric, dim, hash = "corners", "FD (corners)", 4, "0" * 12

    def __call__(self, images):
        return images[:, 0, :2, :2].flatten(1).float()

    def logits(self, features):
        return torch.nn.functional.one_hot((features[:, 0] > 127).long(), 2).float()


def images(n, seed, low=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(low, high, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, (pixels[:, 0, 0, 0] > 127).long(), ["dark", "light"])


def real_images(train, test):
    real = RealImages.__new__(RealImages)
    real.extractor, real.train, real.test, real.sets = Corners(), train, test, {"train": train, "test": test}
    real.kept_baselines, real.augmented, real.reconstructed = {}, {}, {}
    real.features = {split: real.extractor(s.images) for split, s in real.sets.items()}
    real.gaussians = {split: fit_gaussian(f) for split, f in real.features.items()}
    return real


REAL = real_images(images(600, 1), images(300, 2))


def test_labels_follow_the_histogram():
    labels = torch.tensor([0] * 50 + [1] * 30 + [3] * 20)
    assert torch.bincount(labels_like(labels, 5, 10)).tolist() == [5, 3, 0, 2]
    for n in (1, 7, 333):
        drawn = torch.bincount(labels_like(labels, 5, n), minlength=5)
        assert drawn.sum() == n and (drawn - n * torch.tensor([0.5, 0.3, 0, 0.2, 0])).abs().max() < 1
    assert torch.equal(labels_like(labels, 5, 100), labels_like(labels, 5, 100))


def test_the_test_images_as_samples_are_the_floor():
    report = evaluate(REAL.test, REAL, memorization=False)
    assert report["n"] == 300
    for key in ("fd_train", "kd", "precision", "recall", "label_accuracy"):
        assert report["generated"][key] == pytest.approx(report["floor"][key], rel=1e-9), key
    assert report["generated"]["fd_test"] < 1e-6
    assert report["generated"]["label_accuracy"] == 1 and report["generated"]["label_accuracy_by_class"] == [1, 1]


def test_worse_images_lie_between_floor_and_ceiling():
    """All pixels 20 brighter: the covariances are one, so the closed form is the squared distance of the means."""
    def bright(seed, shift, n=400):
        return ImageSet(images(n, seed, 0, 200).images + shift, torch.zeros(n).long(), ["dark", "light"])

    real, drawn = real_images(bright(1, 0), bright(2, 0)), bright(3, 20)
    report = evaluate(drawn, real, memorization=False)
    for split, key in (("train", "fd_train"), ("test", "fd_test")):
        apart = (Corners()(drawn.images).mean(0) - real.features[split].mean(0)).square().sum()
        assert report["generated"][key] == pytest.approx(float(apart), abs=80) and apart > 1000
    assert report["floor"]["fd_train"] < 300 < report["generated"]["fd_train"] < report["ceiling"]["fd_train"]


def test_all_sets_have_the_same_n():
    """Half as many samples: floor and distance are taken at that n; more samples than test images: said as well."""
    few = evaluate(ImageSet(images(100, 5).images), REAL, memorization=False)
    assert few["n"] == 100 and few["floor"]["fd_train"] > evaluate(images(300, 5), REAL, False)["floor"]["fd_train"]
    assert "label_accuracy" not in few["generated"] and "fd_train_all" not in few
    many = evaluate(images(500, 5), REAL, memorization=False)
    assert many["n"] == 300 and many["n_all"] == [500, 600, 300]
    for split in ("train", "test"):
        drawn = fit_gaussian(Corners()(images(500, 5).images))
        assert many[f"fd_{split}_all"] == pytest.approx(frechet_distance(drawn, REAL.gaussians[split]))


def test_the_floor_is_that_of_images_with_the_samples_classes():
    """Samples have the test set's shares of classes, so the test images in their place have them too, in every draw."""
    share = float((REAL.test.labels == 1).double().mean())
    draws = [REAL.features["test"][REAL.like_test("test", 100, draw)] for draw in range(5)]
    for features in draws:
        assert len(features) == 100 and abs((features[:, 0] > 127).double().mean() - share) < 0.01
    assert not torch.equal(draws[0].sort(0)[0], draws[1].sort(0)[0])
    train = fit_gaussian(REAL.subset("train", 100))
    expected = [frechet_distance(fit_gaussian(features), train) for features in draws]
    assert REAL.baselines(100)["floor"]["fd_train"] == pytest.approx(sum(expected) / 5)


def test_distances_to_all_real_images():
    drawn = images(100, 5)
    found, features = distances_to_all(drawn, REAL), Corners()(drawn.images)
    for split in ("train", "test"):
        assert found[f"fd_{split}"] == pytest.approx(frechet_distance(fit_gaussian(features), REAL.gaussians[split]))
    assert (found["precision"], found["recall"]) == precision_recall(REAL.subset("train", 100), features)
    wrong = ImageSet(drawn.images, drawn.labels.clone(), drawn.classes)
    wrong.labels[:7] = 1 - wrong.labels[:7]
    assert (found["label_accuracy"], distances_to_all(wrong, REAL)["label_accuracy"]) == (1, 0.93)
    draws = [REAL.features["train"][REAL.like_test("train", 100, draw)] for draw in range(5)]
    floors = [frechet_distance(fit_gaussian(features), REAL.gaussians["test"]) for features in draws]
    assert REAL.floors_to_all(100) == {"floor": pytest.approx(sum(floors) / 5)}  # digits have no other views


def test_a_set_that_is_sorted_by_class_is_not_cut_by_class():
    real, drawn = real_images(images(600, 1), images(300, 2)), images(600, 3)
    ordered = drawn.take(drawn.labels.argsort())
    got = evaluate(ordered, real, memorization=False)["generated"]["fd_train"]
    assert got < 500  # only the dark half would have its first pixel 64 darker: 64^2 and more


class Cells(Corners):
    dim = 48

    def __call__(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


@pytest.mark.parametrize("flip, side", [(True, 18), (False, 18), (True, 16), (False, 16)])
def test_a_floor_of_images_in_the_views_that_a_model_learns_from(tmp_path, monkeypatch, flip, side):
    """Images whose left is dark: a perfect model of mirrored ones is far from the floor, and has the augmented one."""
    monkeypatch.setattr(settings, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(report, "load_extractor", lambda *arguments: Cells())
    ramp = torch.linspace(0, 120, side).round().byte()
    sets = {split: ImageDataset(images(n, seed, 0, 136).take().images.repeat(1, 3, 3, 3)[..., :side, :side] + ramp,
                                torch.arange(n) % 2, ["a", "b"], 16, split == "train", flip, (0, 255))
            for split, n, seed in (("train", 260, 1), ("test", 200, 2), ("fresh", 200, 3))}
    monkeypatch.setattr(report, "build_dataset", lambda name, split, *_: (sets[split], 2, None))
    real = RealImages(settings.complete_config({"model_name": "DDPM"}), "cpu")
    if not flip and side == 16:
        found = evaluate(real.test, real, memorization=False)
        assert real.floors_to_all(90).keys() == {"floor"} and "floor_augmented" not in found
        assert "augmented" not in "".join(table(found)) and "fd_floor_augmented" not in scalars(found)
        return
    sets["fresh"].augment = True
    drawn = sets["fresh"].batch(torch.arange(200), torch.Generator().manual_seed(0))[0].byte()
    found = evaluate(ImageSet(drawn), real, memorization=False)
    fd, floor, augmented = (found[key]["fd_train"] for key in ("generated", "floor", "floor_augmented"))
    assert fd == pytest.approx(augmented, rel=0.25) and augmented > (5 * floor if flip else floor)
    assert scalars(found)["fd_floor_augmented"] == augmented and found["floor_augmented"].keys() == found["floor"].keys()
    title, row = [line for line in table(found) if "generated" in line or "to 200 training images" in line]
    assert title.split() == ["generated", "test", "images", "augmented", "noise"]
    assert row.split()[-3:-1] == [f"{floor:.3f}", f"{augmented:.3f}"]
    # its images are the test images in some view, the same ones every time
    views = real.augmented["test"].take().images
    assert torch.equal(views, torch.cat(list(real.augmented["test"].batches(7))))
    for view, image in zip(views, sets["test"].images):
        corners = range(side - 16 + 1)
        assert any(torch.equal(view, x[:, i:i + 16, j:j + 16]) for x in (image, image.flip(-1)) for i in corners
                   for j in corners)
    distance = frechet_distance(fit_gaussian(Cells()(views)), fit_gaussian(real.subset("train", 200)))
    assert augmented == pytest.approx(distance)
    floors, again = real.floors_to_all(90), real.floors_to_all(90)
    assert floors == again and floors["floor_augmented"] > floors["floor"]


def test_copies_of_any_view_that_a_model_learns_from_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(report, "load_extractor", lambda *arguments: Cells())
    place = Place(tmp_path)
    config = settings.load_config(str(place.config), place.latents())
    for split, per_class, seed in (("train", 120, 0), ("test", 100, 500)):
        for k in range(per_class):
            for c, name in enumerate(("cat", "dog")):
                picture(seed + 2 * k + c).save(place.root / "images" / split / name / f"{k}.png")
    real = RealImages(config, "cpu")
    assert real.shifts == (-2, -1, 0, 1, 2) and real.mirrored
    assert sorted(os.listdir(place.root / "images")) == ["test", "train"]  # the cache is elsewhere
    views, _, _ = build_dataset("ImageFolder", "train", str(place.root / "images"), 32)
    fresh = real.test.take().images
    assert not evaluate(ImageSet(fresh), real)["memorization"]["copies"]["detected"]
    index = torch.arange(0, 240, 6)
    seen = torch.cat([views.view(views.images[index], torch.tensor([[row], [column]]).expand(2, 40),
                                 torch.full((40,), flip)) for row, column, flip in ((0, 4, True), (3, 1, False))])
    found = evaluate(ImageSet(torch.cat([to_uint8(seen), fresh[80:]])), real)["memorization"]["copies"]
    assert found["detected"] and found["found_generated"] == pytest.approx(80, abs=3)


def test_scalars_are_numbers_for_a_curve():
    numbers = scalars(evaluate(REAL.test, REAL, memorization=False))
    assert {"fd_train", "fd_test", "fd_floor", "precision", "recall", "label_accuracy"} <= numbers.keys()
    assert all(isinstance(v, float) for v in numbers.values())


def test_a_spread_of_the_kernel_distance_only_where_subsets_differ(monkeypatch):
    sets = ("generated", "floor", "ceiling")
    whole = evaluate(REAL.test, REAL, memorization=False)
    assert not any("kd_std" in whole[key] for key in sets) and "kd_std" not in scalars(whole)
    monkeypatch.setattr(report, "KD_SUBSET", 50)
    real = real_images(images(600, 1), images(300, 2))
    parts = evaluate(real.test, real, memorization=False)
    assert all(parts[key]["kd_std"] > 1e-3 * abs(parts["ceiling"]["kd"]) for key in sets) and "kd_std" in scalars(parts)


def test_what_cannot_be_compared():
    for shape, words in (((5, 3, 8, 8), "images are 3 x 8 x 8, .* 1 x 8 x 8"), ((1, 1, 8, 8), "1 image; .* at least 2")):
        with pytest.raises(UsageError, match=words) as error:
            evaluate(ImageSet(torch.zeros(shape, dtype=torch.uint8)), REAL)
        one_line(error)


class Shrink:
    """denoise(x) = factor(sigma, label) x."""

    def __init__(self, factor):
        self.factor, self.seen = factor, []

    def denoise(self, x, sigma, label):
        self.seen.append(x)
        return self.factor(sigma, label)[:, None, None, None] * x


def test_denoising_error_in_closed_form():
    """Data N(0, s_label^2): the best denoiser x s^2 / (s^2 + sigma^2) errs by s^2 sigma^2 / (s^2 + sigma^2)."""
    s, sigmas, labels = torch.tensor([0.5, 2.0], dtype=torch.float64), [0.05, 0.5, 5.0], torch.arange(150) % 2
    x = s[labels][:, None, None, None] * torch.randn(150, 2, 32, 32, dtype=torch.float64)
    best = Shrink(lambda sigma, label: s[label] ** 2 / (s[label] ** 2 + sigma ** 2))
    expected = [float((s ** 2 * sigma ** 2 / (s ** 2 + sigma ** 2)).mean()) for sigma in sigmas]
    assert denoising_error(best, x, labels, sigmas) == pytest.approx(expected, rel=0.01)
    idle = Shrink(lambda sigma, label: torch.ones(len(label)))
    assert denoising_error(idle, x, labels, sigmas) == pytest.approx([k ** 2 for k in sigmas], rel=0.01)
    assert all(torch.equal(a, b) for a, b in zip(best.seen, idle.seen, strict=True))  # the same noise for both
    blind = Shrink(lambda sigma, label: torch.zeros(len(label)))
    assert denoising_error(blind, x, labels, sigmas[:1]) == pytest.approx([float(x.square().mean())])


class OnApplesGPU(torch.Tensor):
    """A tensor that acts as on Apple's GPU: nothing becomes float64 before `.cpu()`."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs)
        if function is torch.Tensor.cpu:
            return out.as_subclass(torch.Tensor)
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            raise TypeError(f"{function.__name__}: the MPS framework doesn't support float64")
        return out


@pytest.mark.parametrize("kind", [DDPM, EDM])
def test_denoising_error_where_there_is_no_float64(kind):
    model, x, labels = kind(**SMALL).eval(), torch.randn(6, 1, 8, 8), torch.arange(6) % 4
    found = denoising_error(model, x.as_subclass(OnApplesGPU), labels, [0.5, 2.0], batch_size=4)
    assert found == denoising_error(model, x, labels, [0.5, 2.0], batch_size=4)
    with pytest.raises(TypeError, match="float64"):
        x.as_subclass(OnApplesGPU).double()
