"""Memorization: measures against other implementations, and the verdict on sets of which it is known what is in them.

The share that is found must be within a tenth of the share slipped in, plus two images: noise hides some copies of
thin digits, and a fresh image may look like a copy.
"""

import gzip
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import memorization_controls
from helpers import one_line
from libs.common.errors import UsageError
from libs.evaluation import memorization
from libs.evaluation.classifier import load_classifier
from libs.evaluation.memorization import (LEVEL, SCALES, MemorizationTest, Space, copied_share, fisher_p, verdict)
from memorization_controls import KINDS, near_copies, slip_in


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(n, seed, latents=None):
    """n fresh images 1 x 16 x 16 from one distribution of 12 dimensions."""
    basis = F.interpolate(torch.randn(12, 1, 6, 6, generator=seeded(0)), size=16, mode="bicubic").flatten(1)
    z = torch.randn(n, 12, generator=seeded(seed)) if latents is None else latents
    return ((z @ basis).mul(0.4).tanh().add(1) * 127.5).round().byte().view(-1, 1, 16, 16)


def points(images):
    """Features of such images: some of their pixels."""
    return images.flatten(1)[:, ::9].float()


def prepare(train, held_out, **options):
    return MemorizationTest(train, held_out, (points(train), points(held_out)), **options)


def report(test, images):
    return test.report(images, points(images))


def check_found(copies, share, n):
    assert copies["detected"] and copies["p_value"] < LEVEL and copies["verdict"].startswith("copies: about")
    assert abs(copies["share"] - share) < 0.1 * share + 2 / n
    assert copies["share_low"] - 0.1 * share < share < copies["share_high"] + 0.1 * share


def check_clean(copies):
    assert not copies["detected"] and copies["p_value"] >= LEVEL and "no sign of copies" in copies["verdict"]


def check_closest(report, places, sources):
    copied = dict(zip(places.tolist(), sources.tolist()))
    assert all(pair["score"] < 1 and pair["train"] == copied[pair["image"]] for pair in report["closest"]["generated"])


# ---- statistics

@pytest.mark.parametrize("x, n, y, m", [(0, 10, 0, 10), (10, 1000, 0, 400), (7, 7, 7, 7), (250, 300, 3, 900)])
def test_fisher_equals_scipy(x, n, y, m):
    scipy_stats = pytest.importorskip("scipy.stats", reason="see requirements-extra.txt")
    exact = scipy_stats.fisher_exact([[x, n - x], [y, m - y]], alternative="greater").pvalue
    assert fisher_p(x, n, y, m) == pytest.approx(exact, rel=1e-8)


def test_share_is_unbiased_and_its_interval_covers():
    # 2 % of fresh images look like copies, and a share of the generated ones are copies, all of which do
    n, m, rate = 1000, 2000, 0.02
    for share in (0.0, 0.1):
        chance = torch.tensor([share + (1 - share) * rate, rate], dtype=torch.float64)
        draws = torch.binomial(torch.tensor([[n, m]], dtype=torch.float64).expand(2000, 2), chance.expand(2000, 2),
                               generator=seeded(1)).long().tolist()
        found = torch.tensor([copied_share(x, n, y, m) for x, y in draws], dtype=torch.float64)
        assert abs(found[:, 0].mean() - share) < 4 * found[:, 0].std() / 2000 ** 0.5
        assert ((found[:, 1] <= share) & (share <= found[:, 2])).double().mean() > 0.94
    assert copied_share(50, 50, 0, 100)[::2] == (1.0, 1.0) and copied_share(0, 50, 100, 100) == (0.0, 0.0, 0.0)


def test_interval_equals_newcombe():
    # method 10 of his table II: 56/70 - 48/80 and 9/10 - 3/10
    for counts, (low, high) in {(56, 70, 48, 80): (0.0524, 0.3339), (9, 10, 3, 10): (0.1705, 0.8090)}.items():
        h = counts[2] / counts[3]
        assert copied_share(*counts)[1:] == pytest.approx((low / (1 - h), min(high / (1 - h), 1)), abs=2e-4)


def test_medians_of_a_toy():
    space = Space("toy", torch.tensor([[0.], [1.], [4.], [9.]]), torch.tensor([[10.], [2.2], [1.5]]), 1)
    generated = torch.tensor([[-2.], [1.4], [5.], [9.]])  # 2 from 0, .4 from 1, 1 from 4, 0 from 9
    medians = space.medians(space.search(generated))
    assert medians["median_held_out"] == 1 and medians["median_generated"] == medians["ratio"] == pytest.approx(.4)


@pytest.mark.parametrize("dim, rate", [(3, 0.2), (12, 0.02)])
def test_threshold_has_the_false_rate_it_promises(monkeypatch, dim, rate):
    monkeypatch.setattr(memorization, "FALSE_RATE", rate)
    cloud = torch.randn(9000, dim)
    space = Space("toy", cloud[:5000], cloud[5000:], 10)
    space.calibrate(cloud[:1000], torch.arange(1000))
    for found, n in ((space.of_held_out, 4000), (space.of_train, 1000)):
        share = (space.scores(found) < 1).double().mean()
        assert abs(share - rate) < 0.15 * rate + 4 * (rate / n) ** 0.5


def test_duplicates_beyond_the_neighbours_are_nobodys_copy():
    train = torch.cat([torch.zeros(20, 4), torch.randn(500, 4) + 3])
    space = Space("toy", train, torch.randn(300, 4) + 3, 10)
    space.calibrate(train[:5], torch.arange(5))
    assert (space.scores(space.search(torch.zeros(1, 4))) > 1).all() and (space.scores(space.of_train) > 1).all()


# ---- from scores to the verdict

def hits(x, n):
    return torch.cat([torch.zeros(x), torch.full((n - x,), 2.0)])


def test_training_images_join_few_held_out_ones():
    # 10 of 1000 against 0 of 400 have p = 0.034 at best
    found = verdict(hits(10, 1000), hits(0, 400), hits(0, 4500))
    assert found["detected"] and (found["found_fresh"], found["fresh"]) == (0, 4900)
    assert found["p_value"] == len(SCALES) * fisher_p(10, 1000, 0, 4900)


@pytest.mark.parametrize("held_out, train", [(0, 300), (20, 0)])
def test_they_do_not_when_one_set_has_duplicates_of_its_own(held_out, train):
    found = verdict(hits(40, 1000), hits(held_out, 400), hits(train, 4500))
    assert (found["found_fresh"], found["fresh"]) == (held_out, 400)
    assert found["detected"] == (held_out == 0)


def test_the_threshold_is_a_quantile_of_the_model_that_the_median_fits():
    """P(d_1 / d_k < r) = 1 - (1 - r^D)^(k - 1): a half at the median, FALSE_RATE at the threshold."""
    k, cloud = 10, torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    space = Space("toy", cloud[:1500], cloud[1500:], k)
    space.calibrate(cloud[:100], torch.arange(100))
    d = space.of_held_out[0]
    median = float((d[:, 0] / d[:, -1]).median())

    def probability(r, dim):
        return 1 - (1 - r ** dim) ** (k - 1)

    low, high = 0.1, 50.0  # the dimension, by bisection: a larger one makes small ratios rarer
    for _ in range(60):
        dim = (low + high) / 2
        low, high = (dim, high) if probability(median, dim) > 0.5 else (low, dim)
    assert probability(space.threshold, dim) == pytest.approx(memorization.FALSE_RATE, rel=1e-6)


def test_stricter_thresholds_see_copies_among_series():
    # 7 % of fresh images have scores from 0.3 to 1; 1 % of the generated ones are copies
    def series(n):
        return torch.cat([torch.linspace(0.3, 0.99, n * 7 // 100), torch.full((n - n * 7 // 100,), 2.0)])

    clean = verdict(series(2000), series(1000), series(4000))
    check_clean(clean)
    assert clean["found_generated"] == 140 and clean["scale"] == 1
    check_found(verdict(torch.cat([hits(20, 20), series(1980)]), series(1000), series(4000)), 0.01, 2000)
    unsure = verdict(torch.cat([hits(3, 3), series(1997)]), series(1000), series(4000))
    check_clean(unsure)  # the text is about all that look like copies, the p-value about the three
    assert unsure["scale"] == 1 and unsure["p_value"] == unsure["tries"][-1]["p_value"] < 1


def test_the_interval_of_a_scale_that_was_chosen_is_wider():
    def interval(tried, z):
        return pytest.approx(copied_share(*(tried[key] for key in ("found_generated", "generated", "found_fresh",
                                                                   "fresh")), z)[1:], rel=1e-6)

    chosen, fixed = (verdict(hits(x, 1000), hits(1, 400), hits(9, 4500)) for x in (40, 1))
    assert chosen["detected"] and not fixed["detected"]
    for found, z in ((chosen, 2.575829), (fixed, 1.959964), *((tried, 2.575829) for tried in fixed["tries"])):
        assert (found["share_low"], found["share_high"]) == interval(found, z)


def test_the_interval_covers_although_its_scale_was_chosen():
    """Copies and images in series, both spread over the scales: the one where chance adds most copies is chosen."""
    generator, inside = seeded(1), torch.tensor([2.0, 0.75, 0.375, 0.1875, 0.09, 0.03])  # a score below each scale

    def scores(n, below):  # below: the share of images below each scale
        bands = -torch.tensor([1.0, *below, 0.0]).diff()
        return inside[bands.multinomial(n, True, generator=generator)]

    series, copies = (0.4, 0.2, 0.1, 0.05, 0.02), (0.1, 0.08, 0.06, 0.045, 0.03)
    both, covered = [c + (1 - c) * s for c, s in zip(copies, series)], 0
    for _ in range(400):
        found = verdict(scores(1000, both), scores(1000, series), scores(4000, series))
        covered += found["share_low"] <= copies[SCALES.index(found["scale"])] <= found["share_high"]
    assert covered >= 0.95 * 400


# ---- the whole test on synthetic images

@pytest.fixture(scope="module")
def synthetic():
    return draw(2000, 1), prepare(draw(2000, 1), draw(600, 2))


@pytest.mark.parametrize("kind, share", [("exact", 0.02), ("shifted", 0.1), ("noisy", 0.1), ("recompressed", 1.0)])
def test_synthetic_copies_are_found(synthetic, kind, share):
    train, test = synthetic
    generated, places, sources = slip_in(draw(500, 3), train, share, kind, seeded(4))
    found = report(test, generated)
    check_found(found["copies"], share, 500)
    check_closest(found, places, sources)


@pytest.mark.parametrize("seed", (5, 6))
def test_synthetic_fresh_images_are_not_accused(synthetic, seed):
    found = report(synthetic[1], draw(500, seed))
    check_clean(found["copies"])
    assert abs(found["pixels"]["ratio"] - 1) < 0.05
    assert found["features"].keys() == found["pixels"].keys()
    assert found == json.loads(json.dumps(report(synthetic[1], draw(500, seed)), allow_nan=False))


def test_features_alone_can_tell(synthetic):
    # other pictures, but the features of training images
    codes = torch.randn(2600, 16)
    test = MemorizationTest(synthetic[0], draw(600, 2), (codes[:2000], codes[2000:]))
    check_clean(test.report(draw(500, 3), torch.randn(500, 16))["copies"])
    check_found(test.report(draw(500, 3), torch.cat([codes[:50] + 1e-3, torch.randn(450, 16)]))["copies"], 0.1, 500)


def test_near_duplicates_within_the_training_set():
    z = torch.randn(750, 12, generator=seeded(1)).repeat(2, 1)  # pairs of the same scene
    train = draw(1500, 1, latents=z + 0.05 * torch.randn(1500, 12, generator=seeded(2)))
    test = prepare(train, draw(500, 3))
    fresh = report(test, draw(500, 4))["copies"]
    assert fresh["found_train"] > 750  # most images have their double
    check_clean(fresh)
    check_found(report(test, slip_in(draw(500, 4), train, 0.1, "noisy")[0])["copies"], 0.1, 500)


def test_held_out_images_that_are_near_duplicates_of_training_images():
    train = draw(1500, 1)
    test = prepare(train, slip_in(draw(500, 2), train, 0.06, "recompressed", seeded(1))[0])
    as_many = report(test, slip_in(draw(500, 3), train, 0.06, "recompressed", seeded(2))[0])["copies"]
    assert as_many["found_held_out"] >= 30
    check_clean(as_many)
    more = report(test, slip_in(draw(500, 3), train, 0.3, "recompressed", seeded(2))[0])["copies"]
    assert more["detected"] and more["share"] == pytest.approx(1 - 0.7 / 0.94, abs=0.015)  # beyond those


def test_large_images_in_colour_cropped_and_mirrored():
    def colour(n, seed):
        return F.interpolate(draw(n * 3, seed).view(n, 3, 16, 16).float(), (64, 40), mode="bilinear").byte()

    train = colour(300, 1)
    generated, places, sources = slip_in(colour(200, 3), train, 0.1, "noisy")
    test = prepare(train, colour(200, 2))
    check_found(report(test, generated)["copies"], 0.1, 200)
    generated[places] = train[sources].flip(-1).roll((6, -6), (2, 3))
    check_clean(report(test, generated)["copies"])
    test = prepare(train, colour(200, 2), shifts=(-6, 0, 6), mirrored=True)
    check_found(report(test, generated)["copies"], 0.1, 200)


def test_sets_that_cannot_be_judged():
    good = draw(200, 1)
    for train, held_out, words in ((good, good[:199], "199 test images are too few"), (good[:19], good, "19 training"),
                                   (good, good, "half of the test images are copies"),
                                   (good[:1].repeat(200, 1, 1, 1), draw(200, 2), "equally far")):
        with pytest.raises(UsageError, match=words) as error:
            prepare(train, held_out)
        one_line(error)


# ---- the controls: copies of real digits

def test_near_copies_differ_as_they_should():
    images = draw(60, 1)
    seen = set()
    for copy, image in zip(near_copies(images, "shifted", seeded(0)), images):
        (i, j), = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if torch.equal(
            copy[:, 1:-1, 1:-1], image[:, 1 + i:15 + i, 1 + j:15 + j])]
        seen.add((i, j))
    assert len(seen) == 8 and (0, 0) not in seen
    noise = near_copies(torch.full_like(images, 128), "noisy", seeded(0)).float() - 128
    assert noise.std() == pytest.approx(25.5, rel=0.02)
    assert 0 < (near_copies(images, "recompressed", None).float() - images).abs().mean() < 30


def features_of(images):
    classifier = load_classifier()
    return torch.cat([classifier.features(part.float() / 255) for part in images.split(500)])


@pytest.fixture(scope="module")
def digits(real_data):
    """2,000 digits to train on, 6,000 others, and the test of the 2,000 and 400 more."""
    with gzip.open(os.path.join(real_data, "mnist", "MNIST", "raw", "t10k-images-idx3-ubyte.gz")) as f:
        images = torch.from_numpy(np.frombuffer(f.read(), np.uint8, offset=16).copy()).view(-1, 1, 28, 28)
    train, rest, held_out = images[torch.randperm(len(images), generator=seeded(0))][:8400].split([2000, 6000, 400])
    return train, rest, MemorizationTest(train, held_out, (features_of(train), features_of(held_out)))


def test_fresh_digits_are_not_accused(digits):
    _, rest, test = digits
    found = test.report(rest[:400], features_of(rest[:400]))
    check_clean(found["copies"])
    for space in ("pixels", "features"):
        assert abs(found[space]["ratio"] - 1) < 0.08


def test_typical_digits_are_not_accused(digits):
    _, rest, test = digits
    typical = F.avg_pool2d(rest[1000:1400].float(), 3, 1, 1).round().byte()
    found = test.report(typical, features_of(typical))
    assert found["pixels"]["ratio"] < 0.93  # which is not for accusing
    check_clean(found["copies"])


@pytest.mark.parametrize("kind, share", list(zip(KINDS, (0.02, 0.1, 1.0, 0.1))))
def test_copied_digits_are_found(digits, kind, share):
    train, rest, test = digits
    generated, places, sources = slip_in(rest[2000:2400], train, share, kind, seeded(1))
    found = test.report(generated, features_of(generated))
    check_found(found["copies"], share, 400)
    if share >= 0.1:  # 10 copies among the 10 images most like one
        check_closest(found, places, sources)


def test_the_script_of_the_controls(digits, tmp_path, monkeypatch, capsys):
    train, rest, _ = digits
    sets = {"train": torch.cat([train[:600], rest[:200]]), "test": rest[1000:1300]}
    monkeypatch.setattr(memorization_controls, "TRAIN", 600)
    monkeypatch.setattr(memorization_controls, "SHARES", (1.0,))
    monkeypatch.setattr(memorization_controls, "KINDS", KINDS[1:3])
    monkeypatch.setattr(memorization_controls.libs, "build_dataset", lambda name, split, folder: [
        type("Digits", (), {"images": sets[split]})])
    path = tmp_path / "controls.json"
    memorization_controls.main(["--num", "200", "--output", str(path)])
    found = json.loads(path.read_text())["sets"]
    assert [(row["kind"], row["detected"]) for row in found] == [("none", False)] + [(kind, True) for kind in KINDS[1:3]]
    with pytest.raises(UsageError, match="--num: 10 is too few; at least 200"):
        memorization_controls.main(["--num", "10"])
