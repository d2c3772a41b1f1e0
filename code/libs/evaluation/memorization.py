"""Does a generator copy its training images? Measures of memorization, and a test that accuses only copies.

Two questions are kept apart. How near do generated images come to the training set, compared with held-out ones? The
median distances, C_T and authenticity tell, but they also answer to a generator that draws typical images, as guidance
makes it do. Are there copies? A copy is much nearer to one training image than to all others, wherever it lies. The
verdict rests on that ratio of distances, which has no scale.
"""

import io
import math
from functools import cached_property

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from ..common.errors import UsageError
from .neighbours import nearest
from ..common.seeds import seeded_generator

LEVEL = 1e-3  # significance level: of a thousand honest generators less than one is accused
FALSE_RATE = 1e-4  # share of fresh images that each space may take for copies
SCALES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # parts of the threshold, the stricter ones for data that come in series
NEIGHBOUR = 10  # the ratio is nearest : tenth nearest, so that nine duplicates in the training set do no harm
REFERENCE = 5000  # training images that are searched among the other training images
AT_ONCE = 5000  # generated images of which all shifted views are in memory
SIDE, GRID = 32, 13  # larger images are averaged down to SIDE; shifted ones are compared on GRID x GRID
CELLS, IN_CELL = 10, 20  # of C_T; Meehan et al. ask for 20 images in a cell
LEAST = CELLS * IN_CELL
KINDS = ("exact", "shifted", "noisy", "recompressed")


class MemorizationTest:
    """Training and held-out images, searched once; `report` then judges any number of generated sets.

    Args:
        train, held_out: N x C x H x W uint8: what the model saw, and images of the same kind that it did not.
        features: of the same two sets, N x D each, a pair; or None.
        shifts: by how many pixels, along either axis, a copy may be shifted and still be found.
        mirrored: whether mirrored copies are to be found. With these two a model can be judged that saw random crops
            and mirrored images; the cost grows with len(shifts) squared.
        seed: of the sample of training images and the cells of C_T.

    Raises UsageError where the sets do not fit each other, are too small, or mostly copies of each other.
    """

    def __init__(self, train, held_out, features=None, shifts=(-1, 0, 1), mirrored=False, seed=0):
        self.shape = train.shape[1:] if isinstance(train, torch.Tensor) else None
        self.shifts, self.mirrored = shifts, mirrored
        for name, images in (("train", train), ("held_out", held_out)):
            self._check(name, images)
        sample = torch.randperm(len(train), generator=seeded_generator(seed, "reference"))[:REFERENCE]
        self.images = {"train": len(train), "held_out": len(held_out), "reference": len(sample)}
        self.pixels = Space("pixels", _pixels(train), _pixels(held_out), 1, seed)
        self.aligned = Space("aligned pixels", self._aligned(train, once=True), self._aligned(held_out), NEIGHBOUR,
                             seed)
        self.aligned.calibrate(self._aligned(train[sample]), sample)
        self.features = None
        if features is not None:
            train, held_out = (self._check_features(name, f, self.images[name], features[0].shape[-1])
                               for name, f in zip(("train", "held_out"), features))
            self.features = Space("features", train, held_out, NEIGHBOUR, seed)
            self.features.calibrate(train[sample], sample)

    def report(self, generated, features=None, pairs=10):
        """Everything about one set, as plain numbers that JSON can hold.

        Args:
            generated: N x C x H x W uint8. features: N x D, needed when the test has them.
            pairs: how many of the closest images to name.

        Returns: a dict with
            copies: the verdict (`detected`, and `verdict` for people), the `share` of copies with its 95 % interval
                (`share_low`, `share_high`), `p_value` and `level`, and the counts behind them: how many images are
                below a `scale` of the threshold, in any space; `tries` has them for every scale. Copies that are
                changed beyond recognition are missing from the share.
            pixels, features: see `Space.measures`. Distances in pixels are Euclidean, of pixels in [0, 1] after
                averaging down to at most 32 x 32.
            closest: `generated` and, to compare, `held_out`: the `pairs` images that are most like a copy, each with
                its index `image`, the index `train` of the training image, and a `score`, below 1 for a copy.

        Raises UsageError where the set does not fit the others or is too small.
        """
        self._check("generated", generated)
        if features is not None and self.features is None:
            raise UsageError("memorization, features of generated: there are none of the training images")
        report, x = {"images": {"generated": len(generated), **self.images}}, _pixels(generated)
        report["pixels"] = self.pixels.measures(x, self.pixels.search(x))
        parts = [self.aligned.search(self._aligned(part)) for part in generated.split(AT_ONCE)]
        spaces, found = [self.aligned], [tuple(map(torch.cat, zip(*parts)))]
        if self.features is not None:
            features = self._check_features("generated", features, len(generated), self.features.train.shape[1])
            spaces.append(self.features)
            found.append(self.features.search(features))
            report["features"] = self.features.measures(features, found[-1])
        held_out, train = ([getattr(space, name) for space in spaces] for name in ("of_held_out", "of_train"))
        # an image is as suspicious as it is in the space where it is most so
        scores = [torch.stack([space.scores(f) for space, f in zip(spaces, of)]).min(0)
                  for of in (found, held_out, train)]
        report["copies"] = verdict(*(score for score, _ in scores))
        report["copies"]["thresholds"] = {space.name: space.threshold for space in spaces}
        report["closest"] = {"generated": _closest(*scores[0], found, pairs),
                             "held_out": _closest(*scores[1], held_out, pairs)}
        return report

    def _aligned(self, images, once=False):
        """N x C x H x W uint8 -> N x V x D: what is left after a shift, some noise, another contrast.

        The inner part of each shifted view, averaged down to GRID x GRID, with mean 0 and norm 1. `once`: only the
        view that is not shifted, N x D.
        """
        margin = max(map(abs, self.shifts))
        height, width = (side - 2 * margin for side in self.shape[1:])
        size = min(GRID, height), min(GRID, width)
        moves = [(0, 0)] if once else [(i, j) for i in self.shifts for j in self.shifts]
        parts = []
        for part in images.split(256):
            both = [part, part.flip(-1)] if self.mirrored and not once else [part]
            views = torch.stack([F.adaptive_avg_pool2d(
                x[:, :, margin + i:margin + i + height, margin + j:margin + j + width].float(), size).flatten(1)
                for x in both for i, j in moves], 1)
            parts.append(F.normalize(views - views.mean(-1, keepdim=True), dim=-1))
        return torch.cat(parts)[:, 0] if once else torch.cat(parts)

    def _check(self, name, images):
        if images is None:
            raise UsageError(f"memorization, {name}: no images; without them nothing says how near is too near")
        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
            what = type(images).__name__
            if isinstance(images, torch.Tensor):
                what = f"{images.dtype} {tuple(images.shape)}"
            raise UsageError(f"memorization, {name}: {what}; must be a uint8 tensor N x C x H x W")
        least = 6 + 2 * max(map(abs, self.shifts))
        if images.shape[1:] != self.shape or min(self.shape[1:]) < least:
            raise UsageError(f"memorization, {name}: images are {tuple(images.shape[1:])}; must be at least {least} x "
                             f"{least} with these shifts, and {tuple(self.shape)} like the training images")
        least, why = LEAST, f"C_T compares {IN_CELL} in each of {CELLS} cells"
        if name == "train":
            least, why = 2 * NEIGHBOUR, f"the {NEIGHBOUR}th nearest must be one that is not near"
        if len(images) < least:
            raise UsageError(f"memorization, {name}: {len(images)} images; needs at least {least}: {why}")

    @staticmethod
    def _check_features(name, features, n, dim):
        shape = None if features is None else tuple(features.shape)
        if shape != (n, dim):
            raise UsageError(f"memorization, features of {name}: {shape}; must be {n} x {dim}, a row per image")
        if not features.isfinite().all():
            raise UsageError(f"memorization, features of {name}: not all are finite (NaN or infinite)")
        return features


class Space:
    """The training set as points of one space, and what lies nearest to held-out images there.

    train: N x D; held_out: M x D, or M x V x D with V views of each; k: neighbours to find.
    """

    def __init__(self, name, train, held_out, k, seed):
        self.name, self.train, self.held_out, self.k, self.seed = name, train, held_out, k, seed
        self.of_held_out = self.search(held_out)
        self.own = torch.full((len(train),), torch.nan, dtype=torch.float64)

    def search(self, queries):
        return nearest(queries, self.train, self.k)

    # ---- by the ratio d_1 / d_k

    def calibrate(self, reference, sample):
        """Set the threshold of the ratio, and search training images `sample` among the others."""
        self.of_train = nearest(reference, self.train, self.k, sample)
        self.threshold = 1.0
        median = float(self.scores(self.of_held_out).median())
        if not 0 < median < 1:
            raise UsageError(f"memorization, {self.name}: half of the held-out images " + (
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

    # ---- by the distance d_1

    @cached_property
    def cells(self):
        """The partition of C_T: centres, and the cell of each held-out image."""
        centres = k_means(self.train, CELLS, self.seed)
        return centres, cell_of(self.held_out, centres)

    def measures(self, generated, found):
        """Measures that compare generated (N x D) with held-out images by the nearest training image.

        Returns: a dict with
            median_generated, median_held_out, ratio: median distances to the nearest training image, and the first
                as a part of the second: 1 for fresh images.
            C_T: Meehan et al. 2020: well below 0 where generated images are, region by region, nearer to the training
                set than held-out ones; None where no region has enough images.
            authentic_generated, authentic_held_out: Alaa et al. 2022: the share of images that are farther from their
                nearest training image than that one is from its own.
        """
        (d, i), (d_h, i_h) = ((f[0][:, 0], f[1][:, 0]) for f in (found, self.of_held_out))
        centres, cell = self.cells
        median, median_h = float(d.median()), float(d_h.median())
        return {"median_generated": median, "median_held_out": median_h,
                "ratio": median / median_h if median_h else None,
                "C_T": c_t(d, d_h, cell_of(generated, centres), cell),
                "authentic_generated": self._authentic(d, i), "authentic_held_out": self._authentic(d_h, i_h)}

    def _authentic(self, d, i):
        new = i.unique()
        new = new[self.own[new].isnan()]
        if len(new):
            self.own[new] = nearest(self.train[new], self.train, 1, new)[0][:, 0]
        return float((d > self.own[i]).double().mean())


# ---- from counts to the verdict

def verdict(generated, held_out, train):
    """The verdict from the scores (1-dim, below 1 for a copy) of three sets; train: each among the other ones.

    Photographs come in series, and then fresh images also have scores below 1. Stricter thresholds tell copies from
    those, so some are tried as well, and the p-value allows for all of them (Bonferroni).

    A few hundred held-out images cannot prove a share of 1 %. Training images are fresh ones too when searched among
    the others, so they join the held-out ones; not when their counts differ, for then one set has duplicates in the
    training set that the other does not have.
    """
    tries = []
    for scale in SCALES:
        (x, n), held, own = ((int((scores < scale).sum()), len(scores)) for scores in (generated, held_out, train))
        joined = min(fisher_p(*held, *own), fisher_p(*own, *held)) > 0.1
        y, m = (held[0] + own[0], held[1] + own[1]) if joined else held
        share, low, high = copied_share(x, n, y, m)
        tries.append({"scale": scale, "found_generated": x, "generated": n, "found_held_out": held[0],
                      "found_train": own[0], "found_fresh": y, "fresh": m,
                      "share": max(share, 0.0), "share_low": low, "share_high": high,
                      "p_value": min(len(SCALES) * fisher_p(x, n, y, m), 1.0)})
    best = min(tries, key=lambda tried: tried["p_value"])
    p, detected = best["p_value"], best["p_value"] < LEVEL
    best = best if detected else tries[0] | {"p_value": p}
    x, n, y, m = (best[key] for key in ("found_generated", "generated", "found_fresh", "fresh"))
    said = f"p = {p:.1g}" if p > 1e-300 else "p < 1e-300"
    text = (f"copies: about {best['share']:.2%} of the samples (95 % interval {best['share_low']:.2%} to "
            f"{best['share_high']:.2%}), {said}" if detected else
            f"no sign of copies: at most {_wilson(x, n)[1]:.2%} of the samples; {x / n:.2%} look like one, and "
            f"{y / m:.2%} of fresh images do, {said}")
    return {"detected": detected, "verdict": text, "level": LEVEL, **best, "tries": tries}


def fisher_p(x, n, y, m):
    """Fisher's exact test, one-sided: the chance that x or more of x + y hits fall on the n of n + m images."""
    def log_choose(a, b):
        return math.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma(a - b + 1)

    hits = torch.arange(x, min(n, x + y) + 1, dtype=torch.float64)
    total = log_choose(n + m, torch.tensor(x + y, dtype=torch.float64))
    return min(float((log_choose(n, hits) + log_choose(m, x + y - hits) - total).logsumexp(0).exp()), 1.0)


def copied_share(x, n, y, m):
    """The share of copies when x of n generated and y of m fresh images look like one: (F_g - F_h) / (1 - F_h).

    Returns (share, low, high). The share may come out below 0; the 95 % interval (Newcombe 1998, method 10, for
    F_g - F_h) is cut at 0 and 1.
    """
    g, h = x / n, y / m
    (g_low, g_high), (h_low, h_high) = _wilson(x, n), _wilson(y, m)
    low, high = g - h - math.hypot(g - g_low, h_high - h), g - h + math.hypot(g_high - g, h - h_low)
    return tuple(v / (1 - h) if h < 1 else 0.0 for v in (g - h, max(low, 0.0), min(max(high, 0.0), 1 - h)))


def _wilson(x, n, z=1.959964):
    """Wilson's 95 % interval of the share x / n."""
    middle, half = x + z * z / 2, z * math.sqrt(x * (n - x) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def _closest(scores, space, found, pairs):
    """scores, space: N, the space where each image has its score; found: what `nearest` found in each space."""
    return [{"image": i, "train": int(found[space[i]][1][i, 0]), "score": float(scores[i])}
            for i in scores.sort(stable=True).indices[:pairs].tolist()]


# ---- C_T

def c_t(d_generated, d_held_out, cell_generated, cell_held_out):
    """C_T of Meehan et al. 2020: Z of each cell, averaged with the cells' shares of held-out images.

    d_*: distances to the nearest training image. cell_*: the cell of each image. Cells with fewer than 20 generated
    images are left out. Returns a float, or None where no cell is left.
    """
    total = weight = 0
    for cell in cell_held_out.unique():
        g, h = d_generated[cell_generated == cell], d_held_out[cell_held_out == cell]
        if len(g) >= IN_CELL:
            total, weight = total + len(h) * mann_whitney_z(g, h), weight + len(h)
    return total / weight if weight else None


def mann_whitney_z(a, b):
    """Z of the Mann-Whitney test, below 0 where `a` (N) tends to be smaller than `b` (M). Ties count one half."""
    n, m = len(a), len(b)
    _, where, count = torch.cat([a, b]).unique(return_inverse=True, return_counts=True)
    count = count.double()
    rank = (count.cumsum(0) - (count - 1) / 2)[where]
    u = float(rank[:n].sum()) - n * (n + 1) / 2
    variance = n * m / 12 * (n + m + 1 - float((count ** 3 - count).sum()) / ((n + m) * (n + m - 1)))
    return (u - n * m / 2) / math.sqrt(variance) if variance > 0 else 0.0


def k_means(points, k, seed=0, steps=20):
    """Centres k x D by Lloyd's algorithm, from k of the N x D points; the same for the same seed."""
    points = points.float()
    centres = points[torch.randperm(len(points), generator=seeded_generator(seed, "k-means"))[:k]]
    for _ in range(steps):
        cell = cell_of(points, centres)
        count = cell.bincount(minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, cell, points)
        centres = torch.where(count > 0, sums / count, centres)  # an empty cell stays where it is
    return centres


def cell_of(points, centres):
    """The nearest centre of each point, N."""
    return (centres.square().sum(1) - points.float() @ (2 * centres.T)).argmin(1)


# ---- images as points

def _pixels(images):
    """N x C x H x W uint8 -> N x D in [0, 1], averaged down to at most SIDE x SIDE."""
    size = [min(side, SIDE) for side in images.shape[2:]]
    pixels = torch.empty(len(images), images.shape[1] * size[0] * size[1])
    for part, out in zip(images.split(512), pixels.split(512)):
        out.copy_(F.adaptive_avg_pool2d(part.float() / 255, size).flatten(1))
    return pixels


# ---- controls: sets of which it is known what is to be found

def near_copies(images, kind, generator):
    """Copies of N x C x H x W uint8 images, C 1 or 3. kind, one of KINDS: "exact", "shifted" by a pixel in one of
    eight directions (edges repeated), "noisy" (sigma is 0.1 of the range), "recompressed" (JPEG, quality 75).

    generator: of the CPU. Raises UsageError for another kind.
    """
    if kind == "exact":
        return images.clone()
    if kind == "shifted":
        height, width = images.shape[2:]
        places = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate").byte()
        chosen = torch.randint(len(places), (len(images),), generator=generator).tolist()
        return torch.stack([image[:, i:i + height, j:j + width]
                            for image, (i, j) in zip(padded, (places[c] for c in chosen))])
    if kind == "noisy":
        noise = torch.randn(images.shape, generator=generator) * 25.5
        return (images + noise).round().clamp(0, 255).byte()
    if kind == "recompressed":
        return torch.stack([_jpeg(image) for image in images])
    raise UsageError(f"kind of copy: unknown {kind!r}; it is one of {', '.join(KINDS)}")


def _jpeg(image):
    file = io.BytesIO()
    to_pil_image(image).save(file, "JPEG", quality=75)
    return pil_to_tensor(Image.open(file))


def slip_in(images, train, share, kind, generator=None):
    """Put copies of training images (see `near_copies`) in the place of a share of `images`, N x C x H x W uint8.

    Returns (images, places, sources): the new set, and which of its images are copies of which training images,
    round(share x N) different ones of both. Raises UsageError where the share is not within 0 and 1, or needs more
    copies than there are training images.
    """
    count = round(share * len(images))
    if not 0 <= share <= 1 or count > len(train):
        raise UsageError(f"share of copies: {share} of {len(images)} images, from {len(train)} training images; "
                         "must be 0 to 1, and no more than there are training images")
    generator = generator or seeded_generator("slip_in")
    places = torch.randperm(len(images), generator=generator)[:count]
    sources = torch.randperm(len(train), generator=generator)[:count]
    images = images.clone()
    if count:
        images[places] = near_copies(train[sources], kind, generator)
    return images, places, sources
