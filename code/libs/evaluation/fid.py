"""How far generated images are from real ones: Frechet distance, kernel distance, precision and recall.

All of it compares two sets of features, N x D, one row per image; features.py makes them. With the features of the
standard Inception network the first two are called FID and KID. Everything is computed in float64 on the CPU, in
blocks, so that features can stay float32 and memory does not grow with the square of N.
"""

import torch

from ..common.errors import UsageError

BLOCK = 1024  # rows that are float64 at a time
EPS = torch.finfo(torch.float64).eps


class FeatureStatistics:
    """Mean and covariance of features that come in batches, in float64; memory does not depend on how many come.

    Keeps the scatter matrix about the mean (Chan et al. 1979) instead of sums of squares, which would lose
    everything where the mean is large beside the spread.
    """

    def __init__(self, dim):
        self.n = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features):
        """Add N x D features, any N and dtype, from any device. Returns self.

        Raises UsageError where the shape is not N x D or a feature is not finite; then nothing was added.
        """
        for rows in _checked(features, "features", len(self._mean)).split(BLOCK):
            if not len(rows):
                continue
            rows = _float64(rows)
            mean, n = rows.mean(0), len(rows)
            total, step = self.n + n, mean - self._mean
            rows = rows - mean
            self._scatter += rows.T @ rows + torch.outer(step, step) * (self.n * n / total)
            self._mean += step * (n / total)
            self.n = total
        return self

    @property
    def mean(self):
        """D, in the features' unit. UsageError without samples."""
        _need(self.n, 1, "mean of features")
        return self._mean.clone()

    @property
    def cov(self):
        """D x D, in the features' unit squared; divisor n - 1. UsageError with fewer than 2 samples."""
        _need(self.n, 2, "covariance of features")
        return self._scatter / (self.n - 1)

    def state_dict(self):
        """Three tensors, which torch.load reads with weights_only=True."""
        return {"n": torch.tensor(self.n), "mean": self._mean.clone(), "scatter": self._scatter.clone()}

    @classmethod
    def from_state(cls, state):
        """The statistics whose `state_dict` this was. UsageError where it was none, so that a cache can be rebuilt."""
        try:
            state = dict(state)
            n, mean, scatter = (torch.as_tensor(state[key]) for key in ("n", "mean", "scatter"))
            fits = mean.dim() == 1 and scatter.shape == (len(mean), len(mean)) and n.numel() == 1 and n >= 0
            fits = fits and not n.is_floating_point() and bool(mean.isfinite().all() and scatter.isfinite().all())
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
            fits = False
        if not fits:
            raise UsageError("feature statistics: needs n, mean (D) and scatter (D x D), all finite")
        stats = cls(0)
        stats.n, stats._mean, stats._scatter = int(n), mean.double().clone(), scatter.double().clone()
        return stats


def frechet_distance(a, b):
    """Squared Frechet distance of the Gaussians that have the mean and covariance of two sets of features.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), eq. 6 of Heusel et al. 2017 ("FID").

    a, b: FeatureStatistics. Returns a float, real and at least 0, in the features' unit squared. It is biased upwards
    where n is small: compare numbers of the same n only. Raises UsageError where a set has fewer than 2 samples, or
    where they do not have the same D.
    """
    for name, stats in (("first", a), ("second", b)):
        _need(stats.n, 2, f"Frechet distance, {name} set")
    _same_dim(len(a.mean), len(b.mean))
    # S_1 S_2 has the eigenvalues of S_1^(1/2) S_2 S_1^(1/2), whose roots are the singular values of R_1^T R_2 for any
    # S = R R^T. Taking these, and not the roots of eigenvalues, keeps 16 digits of them where S is singular, not 8.
    cross = torch.linalg.svdvals(_root(a).T @ _root(b)).sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(float(distance), 0.0)


def _root(stats):
    """R, D x rank, with R R^T = S. Eigenvalues that are rounding errors are left out: n samples span n - 1."""
    values, vectors = torch.linalg.eigh(stats.cov)
    kept = values > max(len(values), 64) * EPS * values.max()
    return vectors[:, kept] * values[kept].sqrt()


def kernel_distance(x, y, subset_size=1000, subsets=100, generator=None):
    """Squared maximum mean discrepancy, the kernel being (x.y / D + 1)^3: Binkowski et al. 2018 ("KID").

    x, y: N x D and M x D features. Each of `subsets` estimates takes `subset_size` rows of either, without
    replacement; `generator`, one of the CPU, draws them (a fixed one if it is None: the number can be had again).

    Returns their mean and standard deviation, without a unit. The estimator is unbiased: for two sets of one
    distribution the mean is 0 and may come out negative. The deviation is of one estimate, not of their mean. Raises
    UsageError where a set has fewer than `subset_size` rows.
    """
    x, y = _checked_pair(x, y, ("first set", "second set"))
    if subset_size < 2 or subsets < 1:
        raise UsageError(f"kernel distance: subset_size {subset_size}, subsets {subsets}; must be at least 2 and 1")
    for name, features in (("first", x), ("second", y)):
        _need(len(features), subset_size, f"kernel distance (subset_size), {name} set")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    estimates = torch.stack([
        squared_mmd(*(features[torch.randperm(len(features), generator=generator)[:subset_size]]
                      for features in (x, y)))
        for _ in range(subsets)])
    return float(estimates.mean()), float(estimates.std(correction=0))


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

    real, generated: N x D and M x D features. Returns the two as floats from 0 to 1; both depend on the sizes of
    the sets: compare numbers of the same sizes only. Raises UsageError where a set has fewer than k + 1 samples.
    """
    real, generated = _checked_pair(real, generated, ("real", "generated"))
    if k < 1:
        raise UsageError(f"precision and recall: k {k}; must be at least 1")
    for name, features in (("real", real), ("generated", generated)):
        _need(len(features), k + 1, f"precision and recall (k = {k}), {name} set")
    centre = real.mean(0, dtype=torch.float64)
    return _share_inside(generated, real, k, centre), _share_inside(real, generated, k, centre)


def _share_inside(points, members, k, centre):
    """The share of `points` within at least one ball around `members`."""
    radii = []
    for rows in members.split(BLOCK):
        nearest = torch.empty(len(rows), 0, dtype=torch.float64)
        for squared, _ in _squared_distances(rows, members, centre):
            nearest = torch.cat([nearest, squared], 1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False).values  # + 1: the member itself
        radii.append(nearest.amax(1))
    radii = torch.cat(radii)
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


def _checked(features, name, dim=None):
    """`features` as a tensor, or a UsageError that says what is wrong with them."""
    features = torch.as_tensor(features)
    if features.dim() != 2 or features.shape[1] != (dim or max(features.shape[1], 1)):
        raise UsageError(f"{name}: shape {tuple(features.shape)}; must be N x {dim or 'D'}, one row per image")
    bad = sum(int((~rows.isfinite()).any(1).sum()) for rows in features.split(BLOCK))
    if bad:
        raise UsageError(f"{name}: {bad} of {len(features)} samples are not finite (NaN or infinite)")
    return features


def _checked_pair(x, y, names):
    x, y = (_checked(features, name) for features, name in zip((x, y), names))
    _same_dim(x.shape[1], y.shape[1])
    return x.detach().cpu(), y.detach().cpu()


def _same_dim(a, b):
    if a != b:
        raise UsageError(f"features: {a} per sample in the first set, {b} in the second; must be of one extractor")


def _need(n, least, what):
    if n < least:
        raise UsageError(f"{what}: {n} sample{'s' * (n != 1)}; needs at least {least}")
