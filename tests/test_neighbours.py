"""Nearest neighbours, against all distances in float64."""

import pytest
import torch

from libs.evaluation import neighbours
from libs.evaluation.neighbours import nearest


def all_distances(queries, bank, skip=None):
    d = torch.stack([torch.cdist(view, bank.double(), compute_mode="donot_use_mm_for_euclid_dist")
                     for view in (queries if queries.dim() == 3 else queries[:, None]).double().unbind(1)]).amin(0)
    return d if skip is None else d.scatter(1, skip[:, None], torch.inf)


def check(queries, bank, k, skip=None):
    d, index = nearest(queries, bank, k, skip)
    expected = all_distances(queries, bank, skip).sort(dim=1, stable=True)
    assert d.dtype == torch.float64 and index.dtype == torch.long
    assert torch.equal(index, expected.indices[:, :k])
    assert torch.allclose(d, expected.values[:, :k], rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [6, 7, 22])
@pytest.mark.parametrize("m, k", [(5, 5), (3000, 1), (3000, 20)])
def test_every_block_is_exact(monkeypatch, n, m, k):
    monkeypatch.setattr(neighbours, "ROWS", 7)
    queries, bank = torch.randn(n, 11), torch.randn(m, 11)
    copies = queries.clone(), bank.clone()
    check(queries, bank, k)
    assert torch.equal(queries, copies[0]) and torch.equal(bank, copies[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_other_dtypes(dtype):
    check((torch.rand(40, 30) * 255).to(dtype), (torch.rand(500, 30) * 255).to(dtype), 3)


def test_copies_are_at_zero_and_equals_come_by_index():
    bank = torch.randint(0, 3, (400, 4)).float()  # 81 places: everything is there many times
    check(bank[::7] + 0, bank, 9)
    assert not nearest(bank[::7], bank, 1)[0].any()


def test_more_duplicates_than_candidates():
    bank = torch.randn(200, 6)
    bank[50:120] = bank[3]
    d, index = nearest(bank[3, None], bank, 4)
    assert index.tolist() == [[3, 50, 51, 52]] and not d.any()
    check(bank[3, None] + 0.1, bank, 4)
    check(bank[:10], bank, 4, torch.arange(10))


def test_where_float32_products_see_nothing():
    # two clusters far apart: after centring the norms are still large beside the distances within
    spots = torch.randn(600, 8) * 1e-3 + torch.randint(0, 2, (600, 1)) * 2e3
    queries, bank = spots[:100], spots[100:]
    check(queries, bank, 3)
    centred, others = queries - bank.mean(0), bank - bank.mean(0)
    naive = (others.square().sum(1) - 2 * centred @ others.T).argmin(1)
    assert (naive != all_distances(queries, bank).argmin(1)).sum() > 50


def test_a_row_does_not_find_itself_but_its_duplicate():
    bank = torch.randn(300, 5)
    bank[200:] = bank[:100]
    skip = torch.arange(300)
    check(bank, bank, 3, skip)
    d, index = nearest(bank, bank, 1, skip)
    assert torch.equal(index[:100, 0], skip[200:]) and torch.equal(index[200:, 0], skip[:100])
    assert not d[:100].any() and (d[100:200] > 0).all()


def test_the_nearest_of_several_views_counts():
    queries, bank = torch.randn(50, 4, 9), torch.randn(700, 9)
    check(queries, bank, 6)
    queries[:, 2] = bank[:50]
    d, index = nearest(queries, bank, 1)
    assert not d.any() and torch.equal(index[:, 0], torch.arange(50))
