"""How far generated images are from real ones: Frechet distance, kernel distance, precision and recall.

Each compares two sets of features, N x D, one row per image; features.py makes them. With the features of the standard
Inception network the first two are called FID and KID. Everything is computed in float64 on the CPU, in blocks, so that
features can stay float32 and memory does not grow with the square of N.
"""

import math
from typing import NamedTuple

import torch

from .neighbours import nearest

BLOCK = 1024  # rows that are float64 at a time, four times as many in `fit_gaussian`
EPS = torch.finfo(torch.float64).eps


class Gaussian(NamedTuple):
    """Mean, D, and a root of the covariance S of a set of features: min(N, D) x D, with root^T root = S."""
    mean: torch.Tensor
    root: torch.Tensor


def fit_gaussian(features):
    """Mean and root of the covariance (divisor N - 1), in float64, of N x D features of any dtype; N at least 2.

    In two passes, about the mean: sums of squares would lose all digits where it is large beside the spread. The root
    is R / (N - 1)^(1/2), where X = QR are the centred features: it keeps the digits that X^T X would lose.
    """
    mean = sum(_float64(rows).sum(0) for rows in features.split(BLOCK)) / len(features)
    root = mean.new_empty(0, len(mean))
    for rows in features.split(4 * BLOCK):  # large ones: each is factored together with R so far
        root = torch.linalg.qr(torch.cat([root, _float64(rows) - mean]), mode="r").R
    return Gaussian(mean, root / math.sqrt(len(features) - 1))


def frechet_distance(a, b):
    """Squared Frechet distance of the Gaussians that have the mean and covariance of two sets of features.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), eq. 6 of Heusel et al. 2017 ("FID").

    a, b: Gaussian. Returns a float, at least 0, in the features' unit squared. It is biased upwards where n is small:
    compare only numbers of the same n.
    """
    # with S = R^T R, the roots of the eigenvalues of S_1 S_2 are the singular values of R_1 R_2^T; taking these keeps
    # 16 digits of them where S is singular, not 8
    cross = torch.linalg.svdvals(a.root @ b.root.T).sum()
    distance = (a.mean - b.mean).square().sum() + a.root.square().sum() + b.root.square().sum() - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(x, y, subset_size=1000, subsets=100):
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3: Binkowski et al. 2018 ("KID").

    x, y: N x D and M x D features. Each of `subsets` estimates takes `subset_size` rows of either, or all where there
    are no more, drawn without replacement from a fixed seed; where it takes all of both, one estimate is enough.

    Returns their mean and standard deviation, without a unit. The estimator is unbiased: for two sets of one
    distribution the mean is 0 and may come out negative. The deviation is of one estimate, not of their mean; None
    where every estimate takes all of a set, as their differences would say nothing of that set's part.
    """
    generator = torch.Generator().manual_seed(0)
    whole = [len(features) <= subset_size for features in (x, y)]
    estimates = torch.stack([
        squared_mmd(*(features[torch.randperm(len(features), generator=generator)[:subset_size]]
                      for features in (x, y)))
        for _ in range(1 if all(whole) else subsets)])
    return float(estimates.mean()), None if any(whole) else float(estimates.std(correction=0))


def squared_mmd(x, y):
    """Unbiased estimate of the squared MMD, eq. 3 of Gretton et al. 2012. N x D, M x D -> 0-dim tensor."""
    x, y = _float64(x), _float64(y)

    def kernel(p, q):
        return (p @ q.T / p.shape[1] + 1).pow(3)

    def mean_of_pairs(k):  # of two different rows: a row with itself is what makes the estimate biased
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y)) - 2 * kernel(x, y).mean()


def precision_recall(real, generated, k=3):
    """Improved precision and recall, Kynkaanniemi et al. 2019, eq. 1 and 2.

    The manifold of a set is the union of balls around its members, each reaching its k-th nearest other member.
    Precision is the share of generated samples on the real manifold (do they look real?), recall the share of real
    samples on the generated manifold (is everything covered?).

    real, generated: N x D and M x D features, more than k each. Returns two floats from 0 to 1; both depend on the
    sizes of the sets: compare only numbers of the same sizes.
    """
    centre = real.mean(0, dtype=torch.float64)
    return _share_inside(generated, real, k, centre), _share_inside(real, generated, k, centre)


def _share_inside(points, members, k, centre):
    """The share of `points` within at least one ball around `members`."""
    radii = nearest(members, members, k, torch.arange(len(members)))[0][:, -1].square()
    inside = 0
    for rows in points.split(BLOCK):
        found = torch.zeros(len(rows), dtype=torch.bool)
        for (squared, error), radius in zip(_squared_distances(rows, members, centre), radii.split(BLOCK)):
            found |= (squared <= radius + error).any(1)  # on the sphere is inside: a copy where the radius is 0
        inside += int(found.sum())
    return inside / len(points)


def _squared_distances(rows, others, centre):
    """For each block of `others`: squared distances, rows x block, and a bound on their rounding errors.

    Measured from `centre`, because |x|^2 + |y|^2 - 2 x.y is the worse the larger the norms.
    """
    rows = _float64(rows) - centre
    for block in others.split(BLOCK):
        block = _float64(block) - centre
        norms = rows.square().sum(1)[:, None] + block.square().sum(1)
        yield norms - 2 * rows @ block.T, max(block.shape[1], 64) * 4 * EPS * norms


def _float64(features):
    return features.detach().cpu().double()  # in this order: Apple's GPU has no float64
