"""Inputs that take every way through the kernels, and a comparison with the definition in fp64."""

from __future__ import annotations

import torch
from tolerances import ROUNDED_TIES, TOLERANCES

from salkernels import reference

EPS = 1e-12

LARGE = [  # G, N, M (0: set form), C, H, W, window
    ((1, 9, 0, 40, 4, 8, (4, 4)), "two tiles of samples: 9 x 16 rows"),
    ((1, 23, 0, 36, 3, 7, (3, 4)), "three tiles, the last with one sample less"),
    ((2, 3, 5, 24, 6, 10, (5, 5)), "keys and queries differ, and groups"),
    ((2, 2, 7, 68, 9, 9, (8, 8)), "one query sample a tile, two tiles of keys"),
    ((40, 1, 1, 21, 2, 6, (2, 2)), "many windows of many groups in a block"),
    ((1, 2, 0, 8, 3, 200, (1, 2)), "more windows than a tile takes"),
    ((1, 130, 0, 4, 1, 2, (1, 1)), "more samples than rows of a tile, at one pixel"),
    ((1, 3, 0, 50, 12, 13, (12, 12)), "streamed, with a narrow edge window"),
    ((2, 2, 3, 16, 17, 19, (16, 16)), "streamed, with the smallest index of int32"),
    ((1, 4, 0, 520, 2, 6, (2, 2)), "more channels than are staged at a time"),
    ((1, 2, 0, 8, 15, 18, (15, 17)), "streamed, with the largest index of uint8"),
]
SHAPES, SHAPE_NAMES = zip(*LARGE, strict=True)
VALID = ("some", "windows", "samples", "none")


def maps(*shape, dtype=torch.float32, layout="channels_last"):
    """(G, N, C, H, W)"""
    groups, samples, channels, height, width = shape
    if layout == "channels_last":
        return torch.randn(groups, samples, height, width, channels).to(dtype).movedim(-1, 2)
    return torch.randn(shape).to(dtype)


def features(shape, **how):
    """Query, key (None in the set form) and window of a row of LARGE."""
    groups, queries, keys, channels, height, width, window = shape
    query = maps(groups, queries, channels, height, width, **how)
    key = maps(groups, keys, channels, height, width, **how) if keys else None
    return query, key, window


def some_pairs(query, key, share=0.4, left_over=0):
    """(P,) pairs drawn from a table, and room that is left over."""
    table = torch.rand(query.shape[0], query.shape[1], (query if key is None else key).shape[1])
    table = table < share
    if table.numel() > 1000:
        table = table.triu(-1) & table.tril(1)  # the emulators take their time
    places = table.flatten().nonzero().squeeze(1)
    return torch.cat((places, places.new_full((left_over,), -1)))


def valid_pixels(query, key, window, kind):
    """(G, V, H, W) bool: of `kind` one of VALID."""
    groups, queries, _, height, width = query.shape
    shape = (groups, queries + (0 if key is None else key.shape[1]), height, width)
    if kind == "some":
        return torch.rand(shape) < 0.6
    if kind == "none":
        return torch.zeros(shape, dtype=torch.bool)
    valid = torch.rand(shape) < 0.8
    if kind == "samples":
        valid[torch.rand(shape[:2]) < 0.5] = False
        return valid
    for top in range(0, height, window[0]):
        for left in range(0, width, window[1]):
            part = valid[:, :, top : top + window[0], left : left + window[1]]
            part &= torch.rand(*shape[:2], 1, 1) < 0.5
    return valid


def spoil(query, key, valid):
    """The features with NaN, Inf and numbers out of range where they are not valid."""
    samples = query.shape[1]

    def spoiled(x, of):
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.finfo(x.dtype).max])
        return torch.where(of[:, :, None], x, bad.to(x.dtype)[torch.randint(0, 4, x.shape)])

    parts = spoiled(query, valid[:, :samples]), None
    return parts if key is None else (parts[0], spoiled(key, valid[:, samples:]))


def relative(actual, expected, least=1e-300):
    """Error as a vector, relative to its length or to `least`; NaN in the same places."""
    if actual is None or expected is None:
        assert actual is expected
        return 0.0
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN elsewhere"
    error = (actual - expected).nan_to_num(0, torch.inf, torch.inf).norm()
    return float(error / expected.nan_to_num(0).norm().clamp_min(least))


def _double(x):
    return None if x is None else x.double()


def check_norms(norm, features, pairs, valid):
    """The norm (samples, H, W) of every row that a pair needs and that takes part; of others that,
    or Inf: whoever reads it need not load them."""
    query, key = features
    norms = [torch.linalg.vector_norm(x.double(), dim=2) for x in features if x is not None]
    expected = torch.cat(norms, 1).flatten(0, 1)  # (samples, H, W)
    asked = torch.zeros(expected.shape[0], dtype=torch.bool)
    samples, keys = query.shape[1], (query if key is None else key).shape[1]
    nodes = expected.shape[0] // max(query.shape[0], 1)
    table = query.shape[0] * samples * keys
    places = torch.arange(table) if pairs is None else pairs[(pairs >= 0) & (pairs < table)]
    if len(places):
        group = places // (samples * keys)
        asked[group * nodes + places // keys % samples] = True
        asked[group * nodes + places % keys + (0 if key is None else samples)] = True
    needed = asked[:, None, None].expand_as(expected)
    if valid is not None:
        needed = needed & valid.flatten(0, 1)
    assert norm.shape == expected.shape
    skipped = norm == torch.inf
    assert not (skipped & needed).any()
    if valid is not None:
        assert skipped[~valid.flatten(0, 1)].all()
    number = expected.to(norm.dtype).isfinite() & ~norm.isnan()
    error = torch.where(skipped | ~number, 0, norm.double() / expected.clamp_min(1e-30) - 1)
    assert error.abs().max() < 1e-5 if error.numel() else True


def compare(kernels, query, key, pairs, valid, window, grad_sim=None):
    """Forward and backward against the definition in fp64; what is not valid holds anything."""
    clean = query, key
    if valid is not None:
        query, key = spoil(query, key, valid)
    arguments = (pairs, valid, window, EPS)
    expected = reference.match(_double(clean[0]), _double(clean[1]), *arguments)
    actual = kernels.match(query, key, *arguments)
    planned_outputs = reference.outputs(query, key, pairs, window)
    for ours, planned in zip(actual[:3], planned_outputs[:3], strict=True):
        assert (ours.shape, ours.dtype) == (planned.shape, planned.dtype)
    if actual.norm.numel() > 0:
        check_norms(actual.norm, clean, pairs, valid)
    tolerance = TOLERANCES[query.dtype]
    # The loss of a sample with itself is nothing but rounding, of numbers of order one.
    assert relative(actual.loss, expected.loss, 1) < tolerance.value
    assert relative(actual.max_sim, expected.max_sim, 1) < tolerance.similarity
    absent = reference.no_match(actual.argmax.dtype)
    assert torch.equal(actual.argmax == absent, expected.argmax == absent)
    differ = (actual.argmax != expected.argmax).sum()
    assert differ <= 1 + actual.argmax.numel() * ROUNDED_TIES

    grad_sim = torch.randn_like(actual.max_sim) if grad_sim is None else grad_sim
    saved = (pairs, valid, *actual[1:], window, EPS)
    grads = kernels.match_backward(grad_sim, query, key, *saved)
    wide = (pairs, valid, actual.max_sim.double(), *actual[2:], window, EPS)
    wanted = reference.match_backward(
        grad_sim.double(), _double(clean[0]), _double(clean[1]), *wide
    )
    # What is left of the gradient of a sample's match with itself is rounding, of numbers as large
    # as the terms: each a unit vector over a norm.
    terms = grad_sim.double()[actual.argmax != absent].nan_to_num(0)
    least = float(terms.norm()) / query.shape[2] ** 0.5
    for ours, theirs in zip(grads, wanted, strict=True):
        assert ours is theirs is None or ours.dtype == query.dtype
        assert relative(ours, theirs, max(least, 1e-300)) < tolerance.relative_l2
    if valid is not None:
        parts = valid[:, : query.shape[1]], valid[:, query.shape[1] :]
        for grad, of in zip(grads, parts, strict=True):
            assert grad is None or not torch.where(of[:, :, None], 0, grad).count_nonzero()
    return actual, grads


def flat(maps):
    return None if maps is None else maps.flatten(0, 1)


def compare_mean(kernels, query, key, pairs, window):
    """With the mean of the losses, and with the backward from the gradient of each maximum."""
    long = kernels.match(query, key, pairs, None, window, EPS)
    given = (flat(query), flat(key), pairs, len(query))
    mean, *kept = kernels.mean_match(*given, window, EPS)
    assert (mean.shape, mean.dtype) == ((), long.loss.dtype)
    torch.testing.assert_close(mean, long.loss.mean())
    assert all(torch.equal(a, b) for a, b in zip(kept, long[1:], strict=True))
    grad = torch.tensor(-0.7, dtype=mean.dtype)
    share = torch.tensor(1 / kept[0].numel(), dtype=mean.dtype)
    grad_sim = torch.sign(kept[0] - 1) * (grad * share)
    expected = kernels.match_backward(grad_sim, query, key, pairs, None, *kept, window, EPS)
    found = kernels.mean_match_backward(grad, *given, *kept, window, EPS)
    for ours, theirs, of in zip(found, expected, (query, key), strict=True):
        if of is None:
            assert ours is theirs is None
            continue
        assert ours.shape == flat(of).shape
        assert torch.equal(ours, flat(theirs))
