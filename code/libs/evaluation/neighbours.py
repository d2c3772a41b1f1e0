"""The nearest images of a large set: found with float32 matrix products, measured and ordered in float64."""

import torch

ROWS = 256  # queries at a time; memory is about 3 x ROWS x len(bank) floats
SPARE = 8  # candidates beyond k, so that rounding seldom hides a neighbour


def nearest(queries, bank, k, skip=None):
    """The k nearest rows of `bank` for every query, by Euclidean distance.

    |x|^2 + |y|^2 - 2 x.y in float32 only proposes candidates: for a copy it is a small difference of large numbers,
    nothing but rounding. Candidates are measured again as |x - y| in float64, and where rounding could have kept a
    neighbour from being proposed, all rows are measured for that query: the answer is always the exact one.

    Args:
        queries: N x D, or N x V x D: V views of each query (shifted ones, say), of which the nearest counts.
        bank: M x D, with at least k rows that may be found. Both of any dtype, finite, on the CPU.
        skip: N, for each query the row of `bank` that must not be found: itself, where it is in the bank.

    Returns:
        (distances N x k float64, index N x k long), the nearest first, equal distances by index.
    """
    others = len(bank) - (skip is not None)
    views = queries if queries.dim() == 3 else queries[:, None]
    centre = bank.mean(0, dtype=torch.float32)  # the smaller the norms, the smaller the rounding
    # (-2 x, |x|^2, 1) . (y, 1, |y|^2) is the squared distance, in one product
    right = torch.ones(len(bank), bank.shape[1] + 2)  # filled in place: the bank may be most of the memory
    torch.sub(bank, centre, out=right[:, :-2])
    norms = torch.linalg.vector_norm(right[:, :-2], dim=1, keepdim=True).square_()
    right[:, -1:] = norms
    right = right.T
    # bounds the error of a float32 sum of so many products, as a part of the largest norm
    unit = 4 * len(right) * torch.finfo(torch.float32).eps
    found = []
    for start in range(0, len(views), ROWS):
        rows = views[start:start + ROWS]
        squared, largest = None, norms.max()
        for view in (rows - centre).float().unbind(1):
            own = view.square().sum(1, keepdim=True)
            new = torch.cat([-2 * view, own, torch.ones_like(own)], 1) @ right
            squared = new if squared is None else torch.minimum(squared, new, out=squared)
            largest = torch.maximum(largest, own[:, 0])
        if skip is not None:
            banned = skip[start:start + ROWS]
            squared.scatter_(1, banned[:, None], torch.inf)
        proposed, candidates = squared.topk(min(k + SPARE, others), largest=False)
        distances, index = _measure(rows, bank, candidates.sort(1).values, k)
        if candidates.shape[1] < others:
            unsure = distances[:, -1].square() >= proposed[:, -1] - unit * largest
            for r in unsure.nonzero()[:, 0]:
                rest = torch.arange(len(bank))
                rest = rest if skip is None else rest[rest != banned[r]]
                distances[r], index[r] = _measure(rows[r, None], bank, rest[None], k)
        found.append((distances, index))
    return tuple(torch.cat(parts) for parts in zip(*found))


def _measure(rows, bank, candidates, k):
    """The k nearest of each row's candidates (N x C, ascending), measured in float64."""
    distances = []
    for part in candidates.split(1024, 1):
        others = bank[part].double()
        squared = [(others - view.double()[:, None]).square_().sum(-1) for view in rows.unbind(1)]
        distances.append(torch.stack(squared).amin(0).sqrt_())
    distances, order = torch.cat(distances, 1).sort(dim=1, stable=True)
    return distances[:, :k], candidates.gather(1, order[:, :k])
