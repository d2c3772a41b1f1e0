"""Distances between sets of features, against pytorch-fid, torch-fidelity, numpy and closed forms."""

import numpy as np
import pytest
import torch

from helpers import one_line
from libs import UsageError, fid
from libs.evaluation.fid import FeatureStatistics, frechet_distance, kernel_distance, precision_recall, squared_mmd


@pytest.fixture
def kid():
    return pytest.importorskip("torch_fidelity.metric_kid", reason="see requirements-extra.txt")


@pytest.fixture
def prc():
    return pytest.importorskip("torch_fidelity.metric_prc", reason="see requirements-extra.txt")


def cloud(seed, n, dim, shift=0.0, stretch=1.0):
    """Correlated features whose standard deviations differ a hundredfold."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) * np.logspace(0, -2, dim)
    return torch.from_numpy(rng.normal(size=(n, dim)) @ mix * stretch + shift)


def stats(features):
    return FeatureStatistics(features.shape[1]).update(features)


def moments(mean, cov, n=10 ** 6):
    """Statistics that have these moments exactly."""
    return FeatureStatistics.from_state({"n": torch.tensor(n), "mean": torch.as_tensor(mean),
                                         "scatter": torch.as_tensor(cov) * (n - 1)})


def nuclear_norm_form(x, y):
    """The Frechet distance without a covariance: tr (S_1 S_2)^(1/2) = |X Y^T|_* / ((n - 1) (m - 1))^(1/2)."""
    x, y = x.double().numpy(), y.double().numpy()
    gap, X, Y = x.mean(0) - y.mean(0), x - x.mean(0), y - y.mean(0)
    n, m = len(x) - 1, len(y) - 1
    cross = np.linalg.svd(X @ Y.T, compute_uv=False).sum() / np.sqrt(n * m)
    return gap @ gap + (X ** 2).sum() / n + (Y ** 2).sum() / m - 2 * cross


# ---- mean and covariance

@pytest.mark.parametrize("offset, tolerance", [(0, 1e-12), (1e6, 1e-9), (1e8, 1e-7)])
def test_streaming_equals_everything_at_once(offset, tolerance):
    noise = np.random.default_rng(0).normal(size=(4001, 6)) * [1, 2, 3, .5, .1, 1]
    x = noise + offset
    ours, start = FeatureStatistics(6), 0
    for size in (1, 2, 0, 7, 1023, 1025, 500, 1, 1442):
        ours.update(torch.from_numpy(x[start:start + size]))
        start += size
    assert start == ours.n == 4001
    exact = np.cov(x - offset, rowvar=False)  # a subtraction without rounding
    assert np.allclose(ours.mean - offset, (x - offset).mean(0), rtol=0, atol=max(offset, 1) * 1e-14)
    assert np.allclose(ours.cov, exact, rtol=0, atol=tolerance * exact.max())
    assert np.allclose(stats(torch.from_numpy(x)).cov, exact, rtol=0, atol=tolerance * exact.max())
    if offset:  # what sums of squares would have made of it
        squares = (x.T @ x - 4001 * np.outer(x.mean(0), x.mean(0))) / 4000
        assert abs(squares - exact).max() > 100 * tolerance * exact.max()


def test_low_precision_features_are_summed_in_float64():
    x = (torch.randn(3000, 5) + 100).half()
    assert torch.equal(stats(x).cov, stats(x.double()).cov)
    assert stats(x.bfloat16()).mean.dtype == stats(x.numpy()).cov.dtype == torch.float64


def test_state_survives_a_file_and_goes_on(tmp_path):
    x = cloud(0, 300, 8)
    torch.save(stats(x[:100]).state_dict(), tmp_path / "stats.pt")
    again = FeatureStatistics.from_state(torch.load(tmp_path / "stats.pt", weights_only=True)).update(x[100:])
    straight = stats(x[:100]).update(x[100:])
    assert again.n == 300 and torch.equal(again.mean, straight.mean) and torch.equal(again.cov, straight.cov)


def test_state_is_a_copy():
    ours = stats(cloud(0, 50, 3))
    state = ours.state_dict()
    mean, other = state["mean"].clone(), FeatureStatistics.from_state(state)
    ours.update(cloud(1, 50, 3, shift=5))
    other.update(cloud(1, 50, 3, shift=5))
    assert torch.equal(state["mean"], mean)


# ---- Frechet distance

@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
@pytest.mark.parametrize("dim, n, m", [(2, 50, 60), (16, 200, 1000), (64, 500, 400)])
def test_frechet_equals_pytorch_fid(dim, n, m):
    fid_score = pytest.importorskip("pytorch_fid.fid_score", reason="see requirements-extra.txt")
    for shift, stretch in ((0, 1), (0.3, 1.5), (10, 0.1)):
        x, y = cloud(1, n, dim), cloud(2, m, dim, shift, stretch)
        sides = [side for z in (x.numpy(), y.numpy()) for side in (z.mean(0), np.atleast_2d(np.cov(z, rowvar=False)))]
        expected = fid_score.calculate_frechet_distance(*sides)
        assert frechet_distance(stats(x), stats(y)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n, m", [(2, 2), (2, 500), (20, 30), (30, 500), (500, 63), (64, 64), (65, 64)])
def test_frechet_below_full_rank(n, m):
    x, y = cloud(1, n, 64), cloud(2, m, 64, 0.1)
    expected = nuclear_norm_form(x, y)
    assert frechet_distance(stats(x), stats(y)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(stats(y), stats(x)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n, m", [(20, 20), (100, 100)])
def test_frechet_of_sets_that_are_close(n, m):
    # a small difference of large numbers: roots of eigenvalues would bury it
    x = cloud(1, n, 64)
    y = x + 1e-3 * cloud(2, m, 64)
    assert frechet_distance(stats(x), stats(y)) == pytest.approx(nuclear_norm_form(x, y), rel=1e-6)


def test_frechet_of_duplicated_images():
    x, y = cloud(1, 12, 64), cloud(2, 7, 64)
    for a, b in ((x.repeat(30, 1), y.repeat(40, 1)), (x.repeat(30, 1), cloud(3, 300, 64)),
                 (x[:1].repeat(50, 1), y), (x[:1].repeat(50, 1), y[:1].repeat(9, 1))):
        assert frechet_distance(stats(a), stats(b)) == pytest.approx(nuclear_norm_form(a, b), rel=1e-9)


def test_frechet_with_dead_features():
    x, y = cloud(1, 300, 40), cloud(2, 300, 40, 0.1)
    x[:, 5:15] = 0
    y[:, 10:20] = 3
    assert frechet_distance(stats(x), stats(y)) == pytest.approx(nuclear_norm_form(x, y), rel=1e-9)


@pytest.mark.parametrize("n", [2, 10, 64, 65, 1000])
@pytest.mark.parametrize("scale", [1e-3, 1, 30])
def test_frechet_of_identical_sets(n, scale):
    x = cloud(3, n, 64, 5) * scale
    for other in (x, x.flip(0), x[torch.randperm(n)]):
        assert 0 <= frechet_distance(stats(x), stats(other)) < 1e-6


def test_frechet_of_exact_moments():
    # 2 x 2, covariances that do not commute: tr M^(1/2) = (tr M + 2 (det M)^(1/2))^(1/2)
    S, T = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    root = np.sqrt(np.trace(S @ T) + 2 * np.sqrt(np.linalg.det(S @ T)))
    expected = 1 ** 2 + 3 ** 2 + np.trace(S + T) - 2 * root
    assert frechet_distance(moments([0.0, 1.0], S), moments([1.0, -2.0], T)) == pytest.approx(expected, rel=1e-12)
    # any D, covariances that commute: |mu_1 - mu_2|^2 + sum (s_1 - s_2)^2
    s, t, gap = np.linspace(0, 2, 50), np.linspace(1, 0, 50), np.linspace(-1, 1, 50)
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 50)))[0]
    a, b = moments(np.zeros(50), axes * s ** 2 @ axes.T), moments(gap, axes * t ** 2 @ axes.T)
    assert frechet_distance(a, b) == pytest.approx((gap ** 2).sum() + ((s - t) ** 2).sum(), rel=1e-6)


def test_frechet_of_gaussian_samples():
    rng, n, runs = np.random.default_rng(0), 5000, 40
    s, t, gap = np.array([1.0, 2.0, 0.5]), np.array([1.5, 1.0, 0.5]), np.array([0.5, 0.0, -1.0])
    found = [frechet_distance(stats(rng.normal(size=(n, 3)) * s), stats(rng.normal(size=(n, 3)) * t + gap))
             for _ in range(runs)]
    expected = (gap ** 2).sum() + ((s - t) ** 2).sum()
    bias = 2 * (s ** 2 + t ** 2).sum() / n
    assert abs(np.mean(found) - expected) < bias + 4 * np.std(found) / np.sqrt(runs)


# ---- kernel distance

@pytest.mark.parametrize("n, m, subset_size, subsets", [(300, 200, 100, 10), (150, 400, 150, 3), (9, 9, 2, 50)])
def test_kernel_distance_is_torch_fidelity_s_on_its_subsets(kid, monkeypatch, n, m, subset_size, subsets):
    x, y = cloud(1, n, 32), cloud(2, m, 32, 0.2)
    theirs = kid.kid_features_to_metric(x, y, kid_subset_size=subset_size, kid_subsets=subsets, rng_seed=7,
                                        verbose=False)
    rng = np.random.RandomState(7)
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.from_numpy(
        rng.choice(count, subset_size, replace=False)))
    mean, std = kernel_distance(x, y, subset_size=subset_size, subsets=subsets)
    assert mean == pytest.approx(theirs[kid.KEY_METRIC_KID_MEAN], rel=1e-9, abs=1e-12)
    assert std == pytest.approx(theirs[kid.KEY_METRIC_KID_STD], rel=1e-9, abs=1e-12)


def test_kernel_distance_takes_rows_once(kid):
    # all rows as one subset: no matter in which order they are drawn, if each is drawn once
    x, y = cloud(1, 120, 16), cloud(2, 120, 16, 0.2)
    theirs = kid.kid_features_to_metric(x, y, kid_subset_size=120, kid_subsets=1, verbose=False)
    mean, std = kernel_distance(x, y, subset_size=120, subsets=4)
    assert mean == pytest.approx(theirs[kid.KEY_METRIC_KID_MEAN], rel=1e-9) and std < 1e-12


def test_kernel_distance_draws_anew_and_can_be_repeated():
    x, y = cloud(1, 400, 16), cloud(2, 300, 16, 0.2)
    sizes = dict(subset_size=50, subsets=5)
    assert kernel_distance(x, y, **sizes) == kernel_distance(x, y, **sizes)
    assert kernel_distance(x, y, **sizes)[1] > 0
    one, two = (kernel_distance(x, y, generator=torch.Generator().manual_seed(seed), **sizes) for seed in (1, 2))
    assert one != two


def test_squared_mmd_is_unbiased():
    # D = 1: E (x x' + 1)^3 = sum of binomial(3, k) (E x^k)^2, with the moments of N(0, 1) and N(m, 1)
    for m in (0.0, 0.7):
        expected = 3 * m ** 2 + 3 * m ** 4 + (m ** 3 + 3 * m) ** 2
        found = [float(squared_mmd(torch.randn(10, 1), torch.randn(15, 1) + m)) for _ in range(4000)]
        assert abs(np.mean(found) - expected) < 4 * np.std(found) / np.sqrt(len(found))


# ---- precision and recall

@pytest.mark.parametrize("block", [64, 1024])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_is_torch_fidelity_s(prc, monkeypatch, block, k):
    monkeypatch.setattr(fid, "BLOCK", block)
    seen = []
    for shift, stretch in ((0, 1), (0.02, 0.6), (0, 2)):
        real, generated = cloud(1, 500, 8), cloud(1, 900, 8)[500:] * stretch + shift
        for save_cpu_ram in (False, True):
            theirs = prc.prc_features_to_metric(generated, real, prc_neighborhood=k, prc_batch_size=100,
                                                save_cpu_ram=save_cpu_ram, verbose=False)
            assert precision_recall(real, generated, k) == pytest.approx(
                (theirs[prc.KEY_METRIC_PRECISION], theirs[prc.KEY_METRIC_RECALL]), abs=1e-6)
        seen += theirs[prc.KEY_METRIC_PRECISION], theirs[prc.KEY_METRIC_RECALL]
    assert sum(0 < share < 1 for share in seen) >= 4  # the sets do overlap in part


def test_k_is_3_as_torch_fidelity_s(prc):
    real, generated = cloud(1, 300, 8), cloud(2, 300, 8)
    theirs = prc.prc_features_to_metric(generated, real, save_cpu_ram=False, verbose=False)
    assert precision_recall(real, generated) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


@pytest.mark.parametrize("offset", [0, 10_000_000])
def test_precision_recall_with_ties_and_duplicates(offset):
    # whole numbers, most points on the sphere around another, many twice: exact in integers
    rng = np.random.default_rng(0)
    real, generated = rng.integers(0, 5, (150, 3)), rng.integers(2, 8, (120, 3))

    def inside(points, members, k=3):
        squares = lambda p, q: ((p[:, None] - q[None]) ** 2).sum(-1)
        radii = np.sort(squares(members, members), 1)[:, k]
        return (squares(points, members) <= radii).any(1).mean()

    expected = inside(generated, real), inside(real, generated)
    assert precision_recall(torch.from_numpy(real + offset), torch.from_numpy(generated + offset)) == \
        pytest.approx(expected)
    copies = cloud(0, 10, 16, shift=offset).float().repeat(5, 1)  # all radii are 0
    assert precision_recall(copies, copies[:10].repeat(4, 1)) == (1, 1)
    assert precision_recall(copies, copies[:40] + 1) == (0, 0)


def test_precision_and_recall_are_not_swapped():
    left, right = torch.randn(200, 4), torch.randn(200, 4) + 100
    both = torch.cat([left, right])
    assert precision_recall(both, left) == (1, 0.5)
    assert precision_recall(left, both) == (0.5, 1)
    assert precision_recall(left, right) == (0, 0)
    assert precision_recall(both, both.flip(0)) == (1, 1)


def test_order_does_not_matter():
    x, y = cloud(1, 200, 12), cloud(2, 150, 12, 0.2)
    rows, others, columns = torch.randperm(200), torch.randperm(150), torch.randperm(12)
    for a, b in ((x[rows], y[others]), (x[:, columns], y[:, columns])):
        assert frechet_distance(stats(a), stats(b)) == pytest.approx(frechet_distance(stats(x), stats(y)), rel=1e-9)
        assert float(squared_mmd(a, b)) == pytest.approx(float(squared_mmd(x, y)), rel=1e-9)
        assert precision_recall(a, b) == precision_recall(x, y)


# ---- bad input

def test_features_that_are_not_finite_are_counted():
    x = torch.zeros(20, 3)
    x[4, 1], x[4, 2], x[7, 0], x[19, 2] = float("nan"), float("inf"), float("-inf"), float("nan")
    ours = stats(torch.ones(5, 3))
    for call in (lambda: ours.update(x), lambda: kernel_distance(x, x, 2), lambda: precision_recall(x[:0], x)):
        with pytest.raises(UsageError) as error:
            call()
        assert "3 of 20" in one_line(error)
    assert ours.n == 5 and ours.mean.tolist() == [1, 1, 1]


@pytest.mark.parametrize("call, words", [
    (lambda: stats(torch.zeros(1, 3)).cov, ("1 sample;", "at least 2")),
    (lambda: FeatureStatistics(3).mean, ("0 samples", "at least 1")),
    (lambda: frechet_distance(stats(torch.zeros(5, 3)), stats(torch.zeros(1, 3))), ("second", "1 sample;", "least 2")),
    (lambda: frechet_distance(FeatureStatistics(3), stats(torch.zeros(5, 3))), ("first", "0 samples", "least 2")),
    (lambda: frechet_distance(stats(torch.zeros(5, 3)), stats(torch.zeros(5, 4))), ("3", "4", "extractor")),
    (lambda: FeatureStatistics(3).update(torch.zeros(5, 4)), ("(5, 4)", "N x 3")),
    (lambda: FeatureStatistics(3).update(torch.zeros(3)), ("(3,)", "N x 3")),
    (lambda: kernel_distance(torch.zeros(2000, 2), torch.zeros(999, 2)), ("second", "999", "1000", "subset_size")),
    (lambda: kernel_distance(torch.zeros(20, 2), torch.zeros(20, 2), subset_size=1), ("subset_size 1", "least 2")),
    (lambda: kernel_distance(torch.zeros(20, 2), torch.zeros(20, 2), 10, subsets=0), ("subsets 0",)),
    (lambda: kernel_distance(torch.zeros(20, 2), torch.zeros(20, 3), 10), ("2", "3", "extractor")),
    (lambda: precision_recall(torch.zeros(3, 2), torch.zeros(20, 2)), ("real", "3 samples", "least 4")),
    (lambda: precision_recall(torch.zeros(20, 2), torch.zeros(5, 2), k=5), ("generated", "5 samples", "least 6")),
    (lambda: precision_recall(torch.zeros(20, 2), torch.zeros(20, 2), k=0), ("k 0", "least 1")),
    (lambda: precision_recall(torch.zeros(20, 2, 2), torch.zeros(20, 2)), ("real", "(20, 2, 2)")),
    (lambda: precision_recall(torch.zeros(20, 0), torch.zeros(20, 0)), ("real", "(20, 0)")),
])
def test_bad_input_is_one_line(call, words):
    with pytest.raises(UsageError) as error:
        call()
    assert all(word in one_line(error) for word in words), str(error.value)


@pytest.mark.parametrize("broken", [
    {}, [], None, torch.zeros(3), {"n": 5, "mean": torch.zeros(3)},
    {"n": 5, "mean": torch.zeros(3), "scatter": torch.zeros(3, 4)},
    {"n": 5, "mean": torch.zeros(3), "scatter": torch.full((3, 3), float("nan"))},
    {"n": -1, "mean": torch.zeros(3), "scatter": torch.zeros(3, 3)},
    {"n": float("inf"), "mean": torch.zeros(3), "scatter": torch.zeros(3, 3)},
    {"n": "five", "mean": torch.zeros(3), "scatter": torch.zeros(3, 3)},
    {"n": torch.zeros(2), "mean": torch.zeros(3), "scatter": torch.zeros(3, 3)},
])
def test_broken_state(broken):
    with pytest.raises(UsageError) as error:
        FeatureStatistics.from_state(broken)
    assert "feature statistics" in one_line(error)
