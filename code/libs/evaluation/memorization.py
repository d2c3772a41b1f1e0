"""Does a generator copy its training images? Measures of memorization, and a test that detects only copies.

These are two questions. How near do generated images come to the training set, compared with held-out ones? The median
distances answer that, but a generator that draws typical images, as guidance makes it do, comes nearer as well. Are there
copies? A copy is much nearer to one training image than to all others, wherever it lies. The verdict rests on that ratio
of distances, which has no scale.
"""

import math

import torch
import torch.nn.functional as F

from ..common.errors import UsageError
from ..common.seeds import seeded_generator
from .neighbours import nearest

LEVEL = 1e-3  # significance level: of a thousand generators that copy nothing, less than one is accused
FALSE_RATE = 1e-4  # share of fresh images that each space may take for copies
SCALES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # parts of the threshold, the stricter ones for data that come in series
Z, Z_OF_FIVE = 1.959964, 2.575829  # of a 95 % interval, and of one of five that all hold at 95 % (Bonferroni)
NEIGHBOUR = 10  # the ratio is nearest : tenth nearest, so that nine duplicates in the training set do no harm
REFERENCE = 5000  # training images that are searched among the other training images
AT_ONCE = 5000  # generated images of which all shifted views are in memory
SIDE, GRID = 32, 13  # larger images are averaged down to SIDE; shifted ones are compared on GRID x GRID
LEAST = 200  # generated images, and held-out ones
PAIRS = 10  # of the images most like a copy, with their nearest training images


class MemorizationTest:
    """Training and held-out images, searched once; `report` then judges any number of generated sets.

    Args:
        train, held_out: N x C x H x W uint8: what the model was trained on, and images of the same kind that it never
            saw; at least 2 x NEIGHBOUR and LEAST.
        features: of the same two sets, a pair of N x D.
        shifts: by how many pixels, along either axis, a copy may be shifted and still be found.
        mirrored: whether mirrored copies are to be found. A model that was trained on random crops and mirrored images
            needs these two; the cost grows with len(shifts) squared.

    Raises UsageError where the sets are too small, or are mostly copies of each other.
    """

    def __init__(self, train, held_out, features, shifts=(-1, 0, 1), mirrored=False):
        if len(train) < 2 * NEIGHBOUR or len(held_out) < LEAST:
            raise UsageError(f"{len(train)} training and {len(held_out)} test images are too few to look for copies; "
                             f"at least {2 * NEIGHBOUR} and {LEAST}")
        self.shifts, self.mirrored = shifts, mirrored
        sample = torch.randperm(len(train), generator=seeded_generator(0, "reference"))[:REFERENCE]
        self.images = {"train": len(train), "held_out": len(held_out), "reference": len(sample)}
        self.pixels = Space("pixels", _pixels(train), _pixels(held_out), 1)
        self.aligned = Space("aligned pixels", self._views(train)[:, 0], self._views(held_out, True), NEIGHBOUR)
        self.aligned.calibrate(self._views(train[sample], True), sample)
        self.features = Space("features", *features, NEIGHBOUR)
        self.features.calibrate(features[0][sample], sample)

    def report(self, generated, features):
        """Everything about one set of at least LEAST images, as plain numbers that JSON can hold.

        Args:
            generated: N x C x H x W uint8. features: N x D.

        Returns: a dict with
            copies: the verdict (`detected`, and `verdict` for people), the `share` of copies with its 95 % interval
                (`share_low`, `share_high`); where none are found, `at_most`, the upper end for what looks like one;
                `p_value`, `level`, and the counts behind them: how many images are below a `scale` of the threshold, in
                any space; `tries` has them for every scale, of which `verdict` chooses one. Copies that are changed
                beyond recognition are missing from the share.
            pixels, features: see `Space.medians`. Distances in pixels are Euclidean, of pixels in [0, 1] after
                averaging down to at most 32 x 32.
            closest: `generated` and, to compare, `held_out`: the PAIRS images that are most like a copy, each with its
                index `image`, the index `train` of the training image, and a `score`, below 1 for a copy.
        """
        spaces = self.aligned, self.features
        parts = [self.aligned.search(self._views(part, True)) for part in generated.split(AT_ONCE)]
        found = [tuple(map(torch.cat, zip(*parts))), self.features.search(features)]
        # an image is as suspicious as it is in the space where it is most so
        scores = {name: torch.stack([space.scores(f) for space, f in zip(spaces, of)]).min(0) for name, of in (
            ("generated", found), ("held_out", [space.of_held_out for space in spaces]),
            ("train", [space.of_train for space in spaces]))}
        copies = verdict(*(score for score, _ in scores.values()))
        copies["thresholds"] = {space.name: space.threshold for space in spaces}
        return {
            "images": {"generated": len(generated), **self.images},
            "pixels": self.pixels.medians(self.pixels.search(_pixels(generated))),
            "features": self.features.medians(found[1]),
            "copies": copies,
            "closest": {"generated": _closest(*scores["generated"], found),
                        "held_out": _closest(*scores["held_out"], [space.of_held_out for space in spaces])},
        }

    def _views(self, images, shifted=False):
        """N x C x H x W uint8 -> N x V x D: what is left after a shift, some noise, another contrast.

        The inner part of each shifted (and mirrored) view, averaged down to GRID x GRID, with mean 0 and norm 1.
        Without `shifted` one view, V = 1.
        """
        margin = max(map(abs, self.shifts))
        height, width = (side - 2 * margin for side in images.shape[2:])
        size = min(GRID, height), min(GRID, width)
        moves = [(i, j) for i in self.shifts for j in self.shifts] if shifted else [(0, 0)]
        parts = []
        for part in images.split(256):
            both = [part, part.flip(-1)] if self.mirrored and shifted else [part]
            views = torch.stack([F.adaptive_avg_pool2d(
                x[:, :, margin + i:margin + i + height, margin + j:margin + j + width].float(), size).flatten(1)
                for x in both for i, j in moves], 1)
            parts.append(F.normalize(views - views.mean(-1, keepdim=True), dim=-1))
        return torch.cat(parts)


class Space:
    """The training set as points of one space, and what lies nearest to held-out images there.

    train: N x D; held_out: M x D, or M x V x D with V views of each; k: neighbours to find.
    """

    def __init__(self, name, train, held_out, k):
        self.name, self.train, self.k = name, train, k
        self.of_held_out = self.search(held_out)

    def search(self, queries):
        return nearest(queries, self.train, self.k)

    def calibrate(self, reference, sample):
        """Set the threshold of the ratio, and search training images `sample` among the others."""
        self.of_train = nearest(reference, self.train, self.k, sample)
        self.threshold = 1.0
        median = float(self.scores(self.of_held_out).median())
        if not 0 < median < 1:
            raise UsageError(f"search for copies, {self.name}: half of the test images " + (
                "are copies of training images; they must be images that the model never saw" if median == 0 else
                f"are equally far from their {self.k} nearest training images; are there that many duplicates?"))
        # Spread evenly in D dimensions, the k - 1 nearer points are uniform in the ball that ends at the k-th:
        # P(d_1 / d_k < r) = 1 - (1 - r^D)^(k - 1), the model behind Levina & Bickel 2004. The median of held-out images
        # gives D, and D the tail, which is not read off: a few duplicates among held-out images would be all of it.
        dimension = math.log(1 - 0.5 ** (1 / (self.k - 1))) / math.log(median)
        self.threshold = (1 - (1 - FALSE_RATE) ** (1 / (self.k - 1))) ** (1 / dimension)

    def scores(self, found):
        """d_1 / d_k as a part of the threshold: below 1 for a copy."""
        d = found[0]
        ratio = torch.where(d[:, -1] > 0, d[:, 0] / d[:, -1], 1.0)  # 0 / 0 is one of k duplicates: no copy of any
        return ratio / self.threshold

    def medians(self, found):
        """Median distances to the nearest training image: a dict of `median_generated`, `median_held_out`, and their
        `ratio`, 1 for fresh images."""
        median, median_h = (float(distances[:, 0].median()) for distances, _ in (found, self.of_held_out))
        return {"median_generated": median, "median_held_out": median_h,
                "ratio": median / median_h if median_h else None}


# ---- from counts to the verdict

def verdict(generated, held_out, train):
    """The verdict from the scores (1-dim, below 1 for a copy) of three sets; train: each among the other ones.

    Photographs come in series, and then fresh images also have scores below 1. Stricter thresholds tell copies from
    those, so some are tried as well. The best one is reported where it finds copies, so that p-values and intervals
    of `tries` are corrected for their number (Bonferroni). Otherwise the interval is that of the first scale, which is
    fixed beforehand, and needs no correction.

    A few hundred held-out images cannot prove a share of 1 %. Training images count as fresh ones too when searched
    among the others, so they join the held-out ones, unless their counts differ: then one set has duplicates in the
    training set that the other does not have.
    """
    tries = []
    for scale in SCALES:
        (x, n), held, own = ((int((scores < scale).sum()), len(scores)) for scores in (generated, held_out, train))
        joined = min(fisher_p(*held, *own), fisher_p(*own, *held)) > 0.1
        y, m = (held[0] + own[0], held[1] + own[1]) if joined else held
        share, low, high = copied_share(x, n, y, m, Z_OF_FIVE)
        tries.append({"scale": scale, "found_generated": x, "generated": n, "found_held_out": held[0],
                      "found_train": own[0], "found_fresh": y, "fresh": m,
                      "share": max(share, 0.0), "share_low": low, "share_high": high,
                      "p_value": min(len(SCALES) * fisher_p(x, n, y, m), 1.0)})
    best = min(tries, key=lambda tried: tried["p_value"])
    p, detected = best["p_value"], best["p_value"] < LEVEL
    best = best if detected else tries[0] | {"p_value": p}
    x, n, y, m = (best[key] for key in ("found_generated", "generated", "found_fresh", "fresh"))
    if not detected:
        _, best["share_low"], best["share_high"] = copied_share(x, n, y, m)
        best["at_most"] = _wilson(x, n)[1]
    p_text = f"p = {p:.1g}" if p > 1e-300 else "p < 1e-300"
    text = (f"copies: about {best['share']:.2%} of the samples (95 % interval {best['share_low']:.2%} to "
            f"{best['share_high']:.2%}), {p_text}" if detected else
            f"no sign of copies: at most {best['at_most']:.2%} of the samples; {x / n:.2%} look like one, and "
            f"{y / m:.2%} of fresh images do, {p_text}")
    return {"detected": detected, "verdict": text, "level": LEVEL, **best, "tries": tries}


def fisher_p(x, n, y, m):
    """Fisher's exact test, one-sided: the chance that x or more of x + y hits fall on the n of n + m images."""
    def log_choose(a, b):
        return math.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma(a - b + 1)

    hits = torch.arange(x, min(n, x + y) + 1, dtype=torch.float64)
    total = log_choose(n + m, torch.tensor(x + y, dtype=torch.float64))
    return min(float((log_choose(n, hits) + log_choose(m, x + y - hits) - total).logsumexp(0).exp()), 1.0)


def copied_share(x, n, y, m, z=Z):
    """The share of copies when x of n generated and y of m fresh images look like one: (F_g - F_h) / (1 - F_h).

    Returns (share, low, high). The share may come out below 0; the interval (Newcombe 1998, method 10, for F_g - F_h,
    95 % unless z says otherwise) is cut at 0 and 1.
    """
    g, h = x / n, y / m
    (g_low, g_high), (h_low, h_high) = _wilson(x, n, z), _wilson(y, m, z)
    low, high = g - h - math.hypot(g - g_low, h_high - h), g - h + math.hypot(g_high - g, h - h_low)
    return tuple(v / (1 - h) if h < 1 else 0.0 for v in (g - h, max(low, 0.0), min(max(high, 0.0), 1 - h)))


def _wilson(x, n, z=Z):
    """Wilson's interval of the share x / n."""
    middle, half = x + z * z / 2, z * math.sqrt(x * (n - x) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def _closest(scores, space, found):
    """scores, space: N, the space where each image has its score; found: the result of `nearest` in each space."""
    return [{"image": i, "train": int(found[space[i]][1][i, 0]), "score": float(scores[i])}
            for i in scores.sort(stable=True).indices[:PAIRS].tolist()]


# ---- images as points

def _pixels(images):
    """N x C x H x W uint8 -> N x D in [0, 1], averaged down to at most SIDE x SIDE."""
    size = [min(side, SIDE) for side in images.shape[2:]]
    pixels = torch.empty(len(images), images.shape[1] * size[0] * size[1])
    for part, out in zip(images.split(512), pixels.split(512)):
        out.copy_(F.adaptive_avg_pool2d(part.float() / 255, size).flatten(1))
    return pixels
