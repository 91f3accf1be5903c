"""Scans as groups: which tables of pairs fall into blocks, and that blocks change no result."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from salkernels import matching, wla_set_loss
from salkernels._pair_list import PairList, count_blocks, regroup
from salkernels.reference import match


def places(table):
    return table.reshape(-1).nonzero().squeeze(1)


def block_diagonal(*sizes):
    return torch.block_diag(*[torch.ones(size, size) for size in sizes]).bool()


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [((4,), 1), ((3, 3), 2), ((4, 2), 1), ((2, 2, 2), 3), ((2, 4, 2, 4), 2), ((2, 2, 4), 2)],
)
def test_equal_blocks_are_found(sizes, blocks):
    assert count_blocks(places(block_diagonal(*sizes)), sum(sizes)) == blocks


def test_one_pair_between_scans_joins_them():
    table = block_diagonal(4, 4)
    table[7, 0] = True
    assert count_blocks(places(table), 8) == 1


def test_scans_that_are_interleaved_stay_together():
    scan = torch.tensor([0, 1]).repeat(4)
    assert count_blocks(places(scan[:, None] == scan[None, :]), 8) == 1


def test_a_table_without_pairs_is_one_block():
    assert count_blocks(places(torch.zeros(6, 6, dtype=torch.bool)), 6) == 1


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_regrouped_places_are_the_blocks_own(groups, size, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(groups, size, size, generator=generator) < 0.5
    table = torch.block_diag(*blocks.float()).bool()
    assert regroup(places(table), groups * size, groups).tolist() == places(blocks).tolist()
    found = count_blocks(places(table), groups * size)
    # A finer division than the one that was drawn may exist, and none of the pairs crosses it.
    assert found >= (groups if table.any() else 1)
    row, column = table.nonzero(as_tuple=True)
    assert torch.equal(row // (groups * size // found), column // (groups * size // found))


def test_groups_change_no_loss():
    features = torch.randn(6, 5, 4, 4)
    chosen = places(block_diagonal(3, 3))
    together = match(features[None], None, chosen, None, (2, 2), 1e-12)
    apart = match(features.unflatten(0, (2, 3)), None, regroup(chosen, 6, 2), None, (2, 2), 1e-12)
    for one, two in zip(together, apart, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_set_loss_runs_on_groups(monkeypatch, reduction, weighted):
    """What a GPU is given, played on the CPU: only the device decides whether groups are sought."""
    features = torch.randn(6, 5, 4, 4)
    table = block_diagonal(3, 3)
    if weighted:
        table = table * torch.rand(6, 6)
    valid = torch.rand(6, 4, 4) < 0.8
    arguments = {"valid": valid, "reduction": reduction, "backend": "reference"}
    expected = wla_set_loss(features, table, 2, **arguments)
    seen = []

    def look(query, *rest):
        seen.append(query.shape[0])
        return operator(query, *rest)

    operator = matching.match
    monkeypatch.setattr(matching, "match", look)

    @classmethod
    def exactly(cls, found, samples, device, keys):
        groups = count_blocks(found, samples)
        return cls(found, True, groups, regroup(found, samples, groups))

    monkeypatch.setattr(PairList, "exactly", exactly)
    loss = wla_set_loss(features, table, 2, **arguments)
    torch.testing.assert_close(loss, expected)
    assert seen == [2]
