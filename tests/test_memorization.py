"""Memorization: measures against other implementations, and the verdict on sets of which it is known what is in them.

The share that is found must be within a tenth of the share slipped in, plus two images: noise hides some copies of
thin digits, and a fresh image may look like a copy.
"""

import gzip
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import one_line

from libs import memorization
from libs.evaluation.classifier import load_classifier
from libs.common.errors import UsageError
from libs.evaluation.memorization import (KINDS, LEVEL, SCALES, MemorizationTest, Space, c_t, cell_of, copied_share, fisher_p,
                               k_means, mann_whitney_z, near_copies, slip_in, verdict)

SHARES = (0.01, 0.1, 1.0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(n, seed, spread=1.0, latents=None):
    """n fresh images 1 x 16 x 16 from one distribution of 12 dimensions."""
    basis = F.interpolate(torch.randn(12, 1, 6, 6, generator=seeded(0)), size=16, mode="bicubic").flatten(1)
    z = torch.randn(n, 12, generator=seeded(seed)) if latents is None else latents
    return ((spread * z @ basis).mul(0.4).tanh().add(1) * 127.5).round().byte().view(-1, 1, 16, 16)


def check_found(copies, share, n):
    assert copies["detected"] and copies["p_value"] < LEVEL and copies["verdict"].startswith("copies: about")
    assert abs(copies["share"] - share) < 0.1 * share + 2 / n
    assert copies["share_low"] < copies["share"] <= copies["share_high"]
    assert copies["share_low"] - 0.1 * share < share < copies["share_high"] + 0.1 * share


def check_clean(copies):
    assert not copies["detected"] and copies["p_value"] >= LEVEL and "no sign of copies" in copies["verdict"]


def check_closest(report, places, sources):
    copied = dict(zip(places.tolist(), sources.tolist()))
    assert all(pair["score"] < 1 and pair["train"] == copied[pair["image"]] for pair in report["closest"]["generated"])


# ---- statistics

@pytest.mark.parametrize("x, n, y, m", [(0, 10, 0, 10), (3, 10, 1, 20), (10, 1000, 0, 400), (100, 10000, 10, 10000),
                                        (5, 5, 0, 7), (0, 50, 9, 60), (7, 7, 7, 7), (250, 300, 3, 900)])
def test_fisher_equals_scipy(x, n, y, m):
    scipy_stats = pytest.importorskip("scipy.stats", reason="see requirements-extra.txt")
    exact = scipy_stats.fisher_exact([[x, n - x], [y, m - y]], alternative="greater").pvalue
    assert fisher_p(x, n, y, m) == pytest.approx(exact, rel=1e-8)
    assert fisher_p(x, n, y, m) == pytest.approx(scipy_stats.hypergeom.sf(x - 1, n + m, x + y, n), rel=1e-8)


def test_share_is_unbiased_and_its_interval_covers():
    # 2 % of fresh images look like copies, and a share of the generated ones are copies, all of which do
    n, m, rate = 1000, 2000, 0.02
    for share in (0.0, 0.01, 0.1, 0.9):
        chance = torch.tensor([share + (1 - share) * rate, rate], dtype=torch.float64)
        draws = torch.binomial(torch.tensor([[n, m]], dtype=torch.float64).expand(3000, 2), chance.expand(3000, 2),
                               generator=seeded(1)).long().tolist()
        found = torch.tensor([copied_share(x, n, y, m) for x, y in draws], dtype=torch.float64)
        assert abs(found[:, 0].mean() - share) < 4 * found[:, 0].std() / 3000 ** 0.5
        covered = ((found[:, 1] <= share) & (share <= found[:, 2])).double().mean()
        assert covered > 0.94
    assert copied_share(50, 50, 0, 100)[::2] == (1.0, 1.0)
    assert copied_share(0, 50, 100, 100) == (0.0, 0.0, 0.0)


def test_interval_equals_newcombe():
    # method 10 of his table II: 56/70 - 48/80 and 9/10 - 3/10
    for counts, (low, high) in {(56, 70, 48, 80): (0.0524, 0.3339), (9, 10, 3, 10): (0.1705, 0.8090)}.items():
        h = counts[2] / counts[3]
        assert copied_share(*counts)[1:] == pytest.approx((low / (1 - h), min(high / (1 - h), 1)), abs=2e-4)


@pytest.mark.parametrize("n, m, ties", [(20, 30, False), (100, 50, True), (40, 40, True)])
def test_mann_whitney_and_c_t_of_one_cell_equal_scipy(n, m, ties):
    scipy_stats = pytest.importorskip("scipy.stats", reason="see requirements-extra.txt")
    a, b = torch.rand(n, dtype=torch.float64) * 0.8, torch.rand(m, dtype=torch.float64)
    if ties:
        a, b = (a * 9).round(), (b * 9).round()
    p = scipy_stats.mannwhitneyu(a, b, alternative="less", method="asymptotic", use_continuity=False).pvalue
    z = mann_whitney_z(a, b)
    assert 0.5 * math.erfc(-z / 2 ** 0.5) == pytest.approx(p, rel=1e-9)
    assert c_t(a, b, torch.zeros(n), torch.zeros(m)) == z == -mann_whitney_z(b, a)


def test_c_t_weights_cells_by_held_out_images():
    d_g, d_h = torch.rand(90).double(), torch.rand(50).double()
    cell_g, cell_h = torch.arange(90) // 40, torch.arange(50) // 20  # 40, 40, 10 and 20, 20, 10 images
    z = [mann_whitney_z(d_g[cell_g == c], d_h[cell_h == c]) for c in (0, 1)]
    assert c_t(d_g, d_h, cell_g, cell_h) == pytest.approx((20 * z[0] + 20 * z[1]) / 40)
    assert c_t(d_g, d_h, cell_g, cell_h + 5) is None
    assert mann_whitney_z(torch.zeros(30), torch.zeros(40)) == 0


def test_k_means_ends_where_centres_are_means():
    points = torch.cat([torch.randn(100, 3) + 20 * torch.eye(3)[k] for k in range(3)])
    centres = k_means(points, 3, seed=1)
    cell = cell_of(points, centres)
    assert torch.allclose(centres, torch.stack([points[cell == c].mean(0) for c in range(3)]), atol=1e-5)
    assert torch.equal(cell, torch.cdist(points, centres).argmin(1))
    assert torch.equal(centres, k_means(points, 3, seed=1)) and not torch.equal(centres, k_means(points, 3, seed=2))


def test_authenticity_and_medians_of_a_toy():
    # nearest other training point: 1, 1, 3, 5 away
    train = torch.tensor([[0.], [1.], [4.], [9.]])
    space = Space("toy", train, torch.tensor([[10.], [2.2], [1.5]]), 1, 0)
    generated = torch.tensor([[-2.], [1.4], [5.], [9.]])  # 2 from 0, .4 from 1, 1 from 4, 0 from 9
    measures = space.measures(generated, space.search(generated))
    assert measures["authentic_generated"] == 1 / 4 and measures["authentic_held_out"] == 1 / 3
    assert measures["median_held_out"] == 1 and measures["median_generated"] == measures["ratio"] == pytest.approx(.4)
    assert measures["C_T"] is None


@pytest.mark.parametrize("dim", [3, 12])
@pytest.mark.parametrize("rate", [0.2, 0.02])
def test_threshold_has_the_false_rate_it_promises(monkeypatch, dim, rate):
    monkeypatch.setattr(memorization, "FALSE_RATE", rate)
    points = torch.randn(9000, dim)
    space = Space("toy", points[:5000], points[5000:], 10, 0)
    space.calibrate(points[:1000], torch.arange(1000))
    for found, n in ((space.of_held_out, 4000), (space.of_train, 1000)):
        share = (space.scores(found) < 1).double().mean()
        assert abs(share - rate) < 0.15 * rate + 4 * (rate / n) ** 0.5


def test_duplicates_beyond_the_neighbours_are_nobodys_copy():
    train = torch.cat([torch.zeros(20, 4), torch.randn(500, 4) + 3])
    space = Space("toy", train, torch.randn(300, 4) + 3, 10, 0)
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


# ---- controls

@pytest.mark.parametrize("channels", [1, 3])
def test_near_copies(channels):
    images = draw(60 * channels, 1).view(60, channels, 16, 16)
    for kind in KINDS:
        copies = near_copies(images, kind, seeded(0))
        assert copies.dtype == torch.uint8 and torch.equal(copies, images) == (kind == "exact")
    assert near_copies(images, "exact", None).data_ptr() != images.data_ptr()

    seen = set()
    for copy, image in zip(near_copies(images, "shifted", seeded(0)), images):
        (i, j), = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if torch.equal(
            copy[:, 1:-1, 1:-1], image[:, 1 + i:15 + i, 1 + j:15 + j])]
        seen.add((i, j))
    assert len(seen) == 8 and (0, 0) not in seen

    grey = torch.full((50, channels, 16, 16), 128, dtype=torch.uint8)
    noise = near_copies(grey, "noisy", seeded(0)).float() - 128
    assert abs(noise.mean()) < 1 and noise.std() == pytest.approx(25.5, rel=0.02)

    assert 0 < (near_copies(images, "recompressed", None).float() - images).abs().mean() < 30
    with pytest.raises(UsageError, match="exact, shifted, noisy, recompressed"):
        near_copies(images, "mirrored", None)


def test_slip_in():
    images, train = draw(300, 1), draw(200, 2)
    mixed, places, sources = slip_in(images, train, 0.1, "exact", seeded(0))
    kept = ~torch.isin(torch.arange(300), places)
    assert kept.sum() == 270 and torch.equal(mixed[kept], images[kept])
    assert torch.equal(mixed[places], train[sources]) and len(sources.unique()) == len(places) == 30
    assert torch.equal(images, draw(300, 1)) and torch.equal(mixed, slip_in(images, train, 0.1, "exact", seeded(0))[0])
    assert torch.equal(slip_in(images, train, 0, "noisy")[0], images)
    for share in (-0.1, 1.1, 0.9):
        with pytest.raises(UsageError, match=f"{share} of 300 images, from 200 training images"):
            slip_in(images, train, share, "exact")


# ---- the whole test on synthetic images

@pytest.fixture(scope="module")
def synthetic():
    return draw(3000, 1), MemorizationTest(draw(3000, 1), draw(1000, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", SHARES)
def test_synthetic_copies_are_found(synthetic, kind, share):
    train, test = synthetic
    generated, places, sources = slip_in(draw(1000, 3), train, share, kind, seeded(4))
    report = test.report(generated, pairs=8)
    check_found(report["copies"], share, 1000)
    check_closest(report, places, sources)


@pytest.mark.parametrize("seed", range(5, 10))
def test_synthetic_fresh_images_are_not_accused(synthetic, seed):
    report = synthetic[1].report(draw(1000, seed))
    check_clean(report["copies"])
    assert abs(report["pixels"]["ratio"] - 1) < 0.05 and abs(report["pixels"]["C_T"]) < 2
    assert abs(report["pixels"]["authentic_generated"] - report["pixels"]["authentic_held_out"]) < 0.08


def test_typical_images_are_nearer_but_no_copies(synthetic):
    report = synthetic[1].report(draw(1000, 5, spread=0.5))
    check_clean(report["copies"])
    assert report["pixels"]["ratio"] < 0.93 and report["pixels"]["C_T"] < -4  # these two are not for accusing


def test_report_is_plain_and_repeatable(synthetic):
    generated, train = draw(300, 3), synthetic[0]
    features = [images.flatten(1).float()[:, ::9] for images in (train, draw(400, 2), generated)]
    reports = [MemorizationTest(train, draw(400, 2), features[:2], seed=3).report(generated, features[2])
               for _ in range(2)]
    assert reports[0] == reports[1] == json.loads(json.dumps(reports[0], allow_nan=False))
    assert reports[0]["features"].keys() == reports[0]["pixels"].keys()
    assert set(reports[0]["copies"]["thresholds"]) == {"aligned pixels", "features"}


def test_features_alone_can_tell(synthetic):
    # other pictures, but the features of training images
    train, generated = synthetic[0], draw(500, 3)
    codes = torch.randn(3600, 16)
    test = MemorizationTest(train, draw(600, 2), (codes[:3000], codes[3000:]))
    check_clean(test.report(generated, torch.randn(500, 16))["copies"])
    check_found(test.report(generated, torch.cat([codes[:50] + 1e-3, torch.randn(450, 16)]))["copies"], 0.1, 500)


def near_duplicates(n, seed):
    """n images, in pairs of the same scene."""
    z = torch.randn(n // 2, 12, generator=seeded(seed)).repeat(2, 1)
    return draw(n, seed, latents=z + 0.05 * torch.randn(n, 12, generator=seeded(seed + 1)))


def test_near_duplicates_within_the_training_set():
    train = near_duplicates(2000, 1)
    test = MemorizationTest(train, draw(600, 3))
    fresh = test.report(draw(1000, 4))["copies"]
    assert fresh["found_train"] > 1000  # nearly every image has its double
    check_clean(fresh)
    for share in (0.1, 1.0):
        check_found(test.report(slip_in(draw(1000, 4), train, share, "noisy")[0])["copies"], share, 1000)


def test_held_out_images_that_are_near_duplicates_of_training_images():
    train = draw(2000, 1)
    test = MemorizationTest(train, slip_in(draw(1000, 2), train, 0.05, "recompressed", seeded(1))[0])
    as_many = test.report(slip_in(draw(1000, 3), train, 0.05, "recompressed", seeded(2))[0])["copies"]
    assert as_many["found_held_out"] >= 50
    check_clean(as_many)
    more = test.report(slip_in(draw(1000, 3), train, 0.2, "recompressed", seeded(2))[0])["copies"]
    assert more["detected"] and more["share"] == pytest.approx(1 - 0.8 / 0.95, abs=0.01)  # what is beyond those


def test_large_images_in_colour():
    def colour(n, seed):
        return F.interpolate(draw(n * 3, seed).view(n, 3, 16, 16).float(), (64, 40), mode="bilinear").byte()

    train = colour(400, 1)
    test = MemorizationTest(train, colour(200, 2))
    check_clean(test.report(colour(200, 3))["copies"])
    for kind in KINDS:
        check_found(test.report(slip_in(colour(200, 3), train, 0.1, kind)[0])["copies"], 0.1, 200)


def test_crops_and_mirrored_copies_are_found_when_looked_for():
    train = draw(1000, 1)
    generated, places, sources = slip_in(draw(400, 3), train, 0.1, "exact")
    generated[places] = train[sources].flip(-1).roll((2, -3), (2, 3))
    check_clean(MemorizationTest(train, draw(300, 2)).report(generated)["copies"])
    test = MemorizationTest(train, draw(300, 2), shifts=range(-3, 4), mirrored=True)
    check_found(test.report(generated)["copies"], 0.1, 400)
    check_clean(test.report(draw(400, 3))["copies"])


# ---- real digits

def features_of(images):
    classifier = load_classifier()
    return torch.cat([classifier.features(part.float() / 255) for part in images.split(500)])


@pytest.fixture(scope="module")
def digits(real_data):
    """3,000 images to train on, the others of the training set, and the test of these and 800 by other writers."""
    images = []
    for name in ("train", "t10k"):
        with gzip.open(os.path.join(real_data, "mnist", "MNIST", "raw", f"{name}-images-idx3-ubyte.gz")) as f:
            images.append(torch.from_numpy(np.frombuffer(f.read(), np.uint8, offset=16).copy()).view(-1, 1, 28, 28))
    train, held_out = (x[torch.randperm(len(x), generator=seeded(0))] for x in images)
    train, rest, held_out = train[:3000], train[3000:], held_out[:800]
    return train, rest, MemorizationTest(train, held_out, (features_of(train), features_of(held_out)))


@pytest.mark.parametrize("number", range(4))
def test_fresh_digits_are_not_accused(digits, number):
    _, rest, test = digits
    fresh = rest[number * 600:][:600]
    report = test.report(fresh, features_of(fresh))
    check_clean(report["copies"])
    for space in ("pixels", "features"):
        assert abs(report[space]["ratio"] - 1) < 0.06 and abs(report[space]["C_T"]) < 2


@pytest.mark.parametrize("kind", ["blurred", "shrunk", "few components"])
def test_typical_digits_are_not_accused(digits, kind):
    train, rest, test = digits
    fresh, points = rest[5000:5600].float(), train.flatten(1).float()
    if kind == "blurred":
        typical = F.avg_pool2d(fresh, 3, 1, 1)
    elif kind == "shrunk":
        typical = 0.7 * fresh + 0.3 * train.float().mean(0)
    else:
        basis = torch.linalg.eigh(points.T.cov()).eigenvectors[:, -50:]
        typical = ((fresh.flatten(1) - points.mean(0)) @ basis @ basis.T + points.mean(0)).view_as(fresh)
    typical = typical.round().clamp(0, 255).byte()
    report = test.report(typical, features_of(typical))
    assert report["pixels"]["ratio"] < 0.93 and report["pixels"]["C_T"] < -2  # these two are not for accusing
    check_clean(report["copies"])


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", KINDS)
def test_copied_digits_are_found(digits, kind, share):
    train, rest, test = digits
    generated, places, sources = slip_in(rest[6000:6600], train, share, kind, seeded(1))
    report = test.report(generated, features_of(generated), pairs=5)
    check_found(report["copies"], share, 600)
    check_closest(report, places, sources)


# ---- what cannot work

def test_bad_input():
    good, features = draw(200, 1), torch.randn(200, 4)
    test = MemorizationTest(good, draw(200, 2), (features, features + 1))
    for call, words in [
        (lambda: MemorizationTest(good, None), "held_out: no images"),
        (lambda: MemorizationTest(good, good[:199]), "held_out: 199 images; needs at least 200"),
        (lambda: MemorizationTest(good[:19], good), "train: 19 images; needs at least 20"),
        (lambda: MemorizationTest(good.float(), good), "torch.float32"),
        (lambda: MemorizationTest(good, good[:, 0]), "held_out: torch.uint8"),
        (lambda: MemorizationTest(good.numpy(), good), "ndarray"),
        (lambda: MemorizationTest(good[..., :7], good[..., :7]), "at least 8 x 8"),
        (lambda: MemorizationTest(good, draw(200, 2)[..., 1:]), r"\(1, 16, 15\).*\(1, 16, 16\)"),
        (lambda: MemorizationTest(good, good), "half of the held-out images are copies"),
        (lambda: MemorizationTest(good[:1].repeat(200, 1, 1, 1), draw(200, 2)), "equally far"),
        (lambda: MemorizationTest(good, draw(200, 2), (features, features[1:])), "features of held_out"),
        (lambda: MemorizationTest(good, draw(200, 2), (features, features / 0)), "not all are finite"),
        (lambda: test.report(draw(100, 3), features), "generated: 100 images"),
        (lambda: test.report(draw(200, 3)), "features of generated: None; must be 200 x 4"),
        (lambda: test.report(draw(200, 3), features[:, :3]), r"\(200, 3\)"),
        (lambda: MemorizationTest(good, draw(200, 2)).report(good, features), "none of the training images"),
    ]:
        with pytest.raises(UsageError, match=words) as error:
            call()
        one_line(error)
