"""Distances between sets of features, against pytorch-fid, torch-fidelity, numpy and closed forms."""

import numpy as np
import pytest
import torch

from libs.evaluation import fid
from libs.evaluation.fid import Gaussian, fit_gaussian, frechet_distance, kernel_distance, precision_recall, squared_mmd


@pytest.fixture
def kid():
    return pytest.importorskip("torch_fidelity.metric_kid", reason="see requirements-extra.txt")


def cloud(seed, n, dim, shift=0.0, stretch=1.0):
    """Correlated features whose standard deviations differ a hundredfold."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) * np.logspace(0, -2, dim)
    return torch.from_numpy(rng.normal(size=(n, dim)) @ mix * stretch + shift)


def distance(x, y):
    return frechet_distance(fit_gaussian(x), fit_gaussian(y))


def nuclear_norm_form(x, y):
    """The Frechet distance without a covariance: tr (S_1 S_2)^(1/2) = |X Y^T|_* / ((n - 1) (m - 1))^(1/2)."""
    x, y = x.double().numpy(), y.double().numpy()
    gap, X, Y = x.mean(0) - y.mean(0), x - x.mean(0), y - y.mean(0)
    n, m = len(x) - 1, len(y) - 1
    cross = np.linalg.svd(X @ Y.T, compute_uv=False).sum() / np.sqrt(n * m)
    return gap @ gap + (X ** 2).sum() / n + (Y ** 2).sum() / m - 2 * cross


# ---- mean and covariance

@pytest.mark.parametrize("offset, tolerance", [(0, 1e-12), (1e8, 1e-7)])
def test_mean_and_covariance_by_blocks(offset, tolerance):
    x = np.random.default_rng(0).normal(size=(9000, 6)) * [1, 2, 3, .5, .1, 1] + offset
    found = fit_gaussian(torch.from_numpy(x))
    exact = np.cov(x - offset, rowvar=False)  # a subtraction without rounding
    assert np.allclose(found.mean - offset, (x - offset).mean(0), rtol=0, atol=max(offset, 1) * 1e-14)
    assert np.allclose(found.root.T @ found.root, exact, rtol=0, atol=tolerance * exact.max())
    if offset:  # sums of squares would lose all digits
        squares = (x.T @ x - 9000 * np.outer(x.mean(0), x.mean(0))) / 8999
        assert abs(squares - exact).max() > 100 * tolerance * exact.max()


def test_low_precision_features_are_summed_in_float64():
    x = (torch.randn(3000, 5) + 100).half()
    assert torch.equal(fit_gaussian(x).root, fit_gaussian(x.double()).root)


# ---- Frechet distance

@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
@pytest.mark.parametrize("dim, n, m", [(2, 50, 60), (64, 500, 400)])
def test_frechet_equals_pytorch_fid(dim, n, m):
    fid_score = pytest.importorskip("pytorch_fid.fid_score", reason="see requirements-extra.txt")
    for shift, stretch in ((0, 1), (0.3, 1.5)):
        x, y = cloud(1, n, dim), cloud(2, m, dim, shift, stretch)
        sides = [side for z in (x.numpy(), y.numpy()) for side in (z.mean(0), np.cov(z, rowvar=False))]
        assert distance(x, y) == pytest.approx(fid_score.calculate_frechet_distance(*sides), rel=1e-6)


@pytest.mark.parametrize("n, m", [(2, 2), (20, 30), (500, 63), (65, 64)])
def test_frechet_below_full_rank(n, m):
    x, y = cloud(1, n, 64), cloud(2, m, 64, 0.1)
    assert distance(x, y) == pytest.approx(nuclear_norm_form(x, y), rel=1e-9)
    assert distance(y, x) == pytest.approx(nuclear_norm_form(x, y), rel=1e-9)


def test_frechet_of_duplicated_images_and_dead_features():
    x, y = cloud(1, 300, 40), cloud(2, 300, 40, 0.1)
    x[:, 5:15], y[:, 10:20] = 0, 3
    for a, b in ((x, y), (x[:12].repeat(30, 1), y), (x[:1].repeat(50, 1), y[:1].repeat(9, 1))):
        assert distance(a, b) == pytest.approx(nuclear_norm_form(a, b), rel=1e-9)


def test_frechet_of_sets_that_are_close():
    # a small difference of large numbers: roots of eigenvalues would bury it
    x = cloud(1, 20, 64)
    y = x + 1e-3 * cloud(2, 20, 64)
    assert distance(x, y) == pytest.approx(nuclear_norm_form(x, y), rel=1e-6)
    assert 0 <= distance(x, x[torch.randperm(20)]) < 1e-6


def test_frechet_of_exact_moments():
    def moments(mean, cov):
        values, vectors = np.linalg.eigh(cov)
        return Gaussian(torch.as_tensor(mean), torch.as_tensor((vectors * values.clip(0) ** 0.5).T))

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


# ---- kernel distance

def test_kernel_distance_is_torch_fidelitys_on_its_subsets(kid, monkeypatch):
    x, y = cloud(1, 300, 32), cloud(2, 200, 32, 0.2)
    theirs = kid.kid_features_to_metric(x, y, kid_subset_size=100, kid_subsets=10, rng_seed=7, verbose=False)
    rng = np.random.RandomState(7)
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.from_numpy(rng.choice(count, 100, replace=False)))
    mean, std = kernel_distance(x, y, subset_size=100, subsets=10)
    assert mean == pytest.approx(theirs[kid.KEY_METRIC_KID_MEAN], rel=1e-9, abs=1e-12)
    assert std == pytest.approx(theirs[kid.KEY_METRIC_KID_STD], rel=1e-9, abs=1e-12)


def test_kernel_distance_takes_rows_once_and_can_be_repeated():
    x, y = cloud(1, 120, 16), cloud(2, 120, 16, 0.2)
    mean, _ = kernel_distance(x, y, subset_size=120, subsets=4)  # all rows: their order does not matter
    assert mean == pytest.approx(float(squared_mmd(x, y)), rel=1e-9)
    assert kernel_distance(x, y, 50, 5) == kernel_distance(x, y, 50, 5) and kernel_distance(x, y, 50, 5)[1] > 0


@pytest.mark.parametrize("size, estimates", [(120, 5), (150, 5), (151, 1), (1000, 1)])
def test_kernel_distance_has_no_spread_where_every_subset_is_the_whole_set(monkeypatch, size, estimates):
    """Of one set: its rows are the same every time. Of both: the same number every time, so it is computed once."""
    x, y, made = cloud(1, 151, 16), cloud(2, 120, 16, 0.2), []
    monkeypatch.setattr(fid, "squared_mmd", lambda *sets: made.append(squared_mmd(*sets)) or made[-1])
    mean, std = kernel_distance(x, y, size, subsets=5)
    assert std is None and len(made) == len(set(map(float, made))) == estimates
    assert mean == pytest.approx(float(sum(made)) / estimates)


def test_squared_mmd_by_hand():
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    # (1 * 2 + 1)^3 + (0 * 3 + 1)^3 - 2 * mean of (0 + 1)^3, (3 + 1)^3, (0 + 1)^3, (6 + 1)^3
    assert float(squared_mmd(x, y)) == pytest.approx(27 + 1 - 2 * (1 + 64 + 1 + 343) / 4)


def test_squared_mmd_is_unbiased():
    # D = 1: E (x x' + 1)^3 = sum of binomial(3, k) (E x^k)^2, with the moments of N(0, 1) and N(m, 1)
    for m in (0.0, 0.7):
        expected = 3 * m ** 2 + 3 * m ** 4 + (m ** 3 + 3 * m) ** 2
        found = [float(squared_mmd(torch.randn(10, 1), torch.randn(15, 1) + m)) for _ in range(1500)]
        assert abs(np.mean(found) - expected) < 4 * np.std(found) / np.sqrt(len(found))


# ---- precision and recall

@pytest.mark.parametrize("block, options", [(64, (1,)), (1024, (5,)), (64, ())])
def test_precision_recall_is_torch_fidelitys(monkeypatch, block, options):
    prc = pytest.importorskip("torch_fidelity.metric_prc", reason="see requirements-extra.txt")
    monkeypatch.setattr(fid, "BLOCK", block)
    for shift, stretch in ((0.02, 0.6), (0, 2)):
        real, generated = cloud(1, 500, 8), cloud(1, 900, 8)[500:] * stretch + shift
        theirs = prc.prc_features_to_metric(generated, real, save_cpu_ram=False, verbose=False,
                                            **{"prc_neighborhood": k for k in options})
        expected = theirs[prc.KEY_METRIC_PRECISION], theirs[prc.KEY_METRIC_RECALL]
        assert precision_recall(real, generated, *options) == pytest.approx(expected, abs=1e-6)
        assert 0 < min(expected) < 1


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
