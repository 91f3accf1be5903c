"""Bad calls: the exact exception, and a message that says expected, got and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

import salkernels as sal

X = torch.zeros(2, 3, 4, 5)
PAIRS = torch.ones(2, 2, dtype=torch.bool)
VALID = torch.ones(2, 4, 5, dtype=torch.bool)
E = torch.zeros(2, 3)
INDEX, SLICES = torch.tensor([0, 1]), torch.tensor([9, 9])
META = torch.device("meta")


class Bad(NamedTuple):
    name: str
    call: Callable[[], object]
    error: type[Exception]
    words: tuple[str, ...]


def wla(x=X, y=X, window=2, **settings):
    return lambda: sal.wla_loss(x, y, window, **settings)


def wset(features=X, pairs=PAIRS, window=2, **settings):
    return lambda: sal.wla_set_loss(features, pairs, window, **settings)


def gp(embeddings=E, positives=PAIRS, temperature=0.1):
    return lambda: sal.gp_loss(embeddings, positives, temperature)


def contrast(positives=PAIRS, negatives=~PAIRS, window=2, temperature=0.1, **settings):
    return lambda: sal.wla_contrast(X, positives, negatives, window, temperature, **settings)


def slices(volume=INDEX, index=INDEX, num_slices=SLICES, t=0.3):
    return lambda: sal.slice_pairs(volume, index, num_slices, t)


def whole(features=X, embeddings=E, volume=INDEX, index=INDEX, num=SLICES, window=2, **settings):
    return lambda: sal.sal_loss(features, embeddings, volume, index, num, window, **settings)


WINDOW = ("window_size", "integer", "two integers", "got")
TOKENS = ("x[None]", "x.mT.unflatten(2, (rows, columns))", "class token")
SLICES_OF = ("volumes", "features.movedim(2, 1).flatten(0, 1)")
FOUR = ("4 dimensions", "(samples, channels, height, width)", "got shape")

BAD = [
    # features
    Bad("list", wla(x=[1.0]), TypeError, ("x", "torch.Tensor", "got list")),
    Bad("second list", wla(y=[1.0]), TypeError, ("y", "torch.Tensor", "got list")),
    Bad("array", wset(features=X.numpy()), TypeError, ("features", "got ndarray")),
    Bad("three dimensions", wla(x=X[0]), ValueError, (*FOUR, "(3, 4, 5)", *TOKENS)),
    Bad(
        "five dimensions",
        wset(features=X[None]),
        ValueError,
        (*FOUR, "(1, 2, 3, 4, 5)", *SLICES_OF),
    ),
    Bad("two dimensions", wla(x=X[0, 0]), ValueError, (*FOUR, "(4, 5)")),
    Bad("integers", wla(X.int(), X.int()), TypeError, ("float32", "got torch.int32", "x.float()")),
    Bad("complex", wset(X.cfloat()), TypeError, ("got torch.complex64", "features.float()")),
    Bad("no channel", wla(X[:, :0], X[:, :0]), ValueError, ("channel", "got shape (2, 0, 4, 5)")),
    Bad("no pixel", wset(X[..., :0]), ValueError, ("pixel", "got shape (2, 3, 4, 0)")),
    Bad("no row", wla(X[:, :, :0], X[:, :, :0]), ValueError, ("pixel", "got shape (2, 3, 0, 5)")),
    Bad("shapes", wla(y=X[:, :2]), ValueError, ("same shape", "(2, 3, 4, 5)", "(2, 2, 4, 5)")),
    Bad("no broadcasting", wla(y=X[:1]), ValueError, ("same shape", "got", "(1, 3, 4, 5)")),
    Bad("dtypes", wla(y=X.half()), TypeError, ("one dtype", "float32", "float16", ".to(dtype)")),
    Bad("devices", wla(y=X.to(META)), ValueError, ("one device", "cpu", "meta", ".to(device)")),
    Bad(
        "dtypes on a device without autocast",
        wla(X.to(META), X.half().to(META)),
        TypeError,
        ("one dtype", "got", ".to(dtype)"),
    ),
    # window
    Bad("window 0", wla(window=0), ValueError, ("window_size", "at least 1", "got 0")),
    Bad("window -1", wset(window=(2, -1)), ValueError, ("at least 1", "got (2, -1)")),
    Bad("window too high", wla(window=(5, 1)), ValueError, ("(5, 1)", "4 x 5", "la_loss")),
    Bad("window too wide", wset(window=(1, 6)), ValueError, ("(1, 6)", "4 x 5", "at most")),
    Bad("window too large", wla(window=5), ValueError, ("(5, 5)", "4 x 5")),
    Bad("three windows", wla(window=(1, 2, 3)), TypeError, (*WINDOW, "(1, 2, 3)")),
    Bad("window of fractions", wla(window=(1.0, 2)), TypeError, (*WINDOW, "(1.0, 2)")),
    Bad("window of truths", wla(window=True), TypeError, (*WINDOW, "True")),
    Bad("window fraction", wla(window=2.0), TypeError, (*WINDOW, "2.0")),
    Bad("no window", wset(window=None), TypeError, (*WINDOW, "None")),
    Bad("window name", wset(window="2"), TypeError, (*WINDOW, "'2'")),
    # other settings
    Bad("reduction", wla(reduction="max"), ValueError, ("'mean', 'sum' or 'none'", "got 'max'")),
    Bad("set reduction", wset(reduction=None), ValueError, ("'sum' or 'none'", "got None")),
    Bad("eps 0", wla(eps=0), ValueError, ("eps", "> 0", "got 0")),
    Bad("eps NaN", wset(eps=float("nan")), ValueError, ("eps", "finite", "got nan")),
    Bad("eps inf", wla(eps=float("inf")), ValueError, ("eps", "finite", "got inf")),
    Bad("eps text", wla(eps="small"), TypeError, ("eps", "number", "got str")),
    Bad("la shapes", lambda: sal.la_loss(X, X[..., 1:]), ValueError, ("same shape", "got")),
    Bad("align shapes", lambda: sal.align(X, X[1:], 2), ValueError, ("same shape", "got")),
    Bad("explain", lambda: sal.explain(X[0], 2), ValueError, FOUR),
    # pairs
    Bad("pairs list", wset(pairs=[[True]]), ValueError, ("(S, S) = (2, 2)", "got (1, 1)")),
    Bad("pairs text", wset(pairs="01"), TypeError, ("pairs", "torch.Tensor", "list", "got str")),
    Bad("ragged pairs", wset(pairs=[(0, 1), (1,)]), TypeError, ("pairs", "rows of one length")),
    Bad("complex pairs", wset(pairs=PAIRS.cfloat()), TypeError, ("indices (K, 2)", "complex64")),
    Bad("index below", wset(pairs=[(0, -1)]), ValueError, ("[0, 2) for queries", "-1 to -1")),
    Bad("index beyond", wset(pairs=[(0, 1), (2, 0)]), ValueError, ("[0, 2)", "got 0 to 2 and 0")),
    Bad(
        "key beyond",
        wset(pairs=[(0, 3)], keys=X.repeat(2, 1, 1, 1)[:3]),
        ValueError,
        ("[0, 2) for queries and [0, 3) for keys", "and 3 to 3"),
    ),
    Bad("pairs of keys", wset(keys=X[:1]), ValueError, ("(S, keys) = (2, 1)", "got (2, 2)")),
    Bad("keys list", wset(keys=[1]), TypeError, ("keys", "torch.Tensor", "got list")),
    Bad("keys width", wset(keys=X[..., 1:]), ValueError, ("same channels", "(2, 3, 4, 4)")),
    Bad("keys dtype", wset(keys=X.half()), TypeError, ("features and keys", "one dtype")),
    Bad("keys device", wset(keys=X.to(META)), ValueError, ("features and keys", "one device")),
    Bad(
        "one mask for two sets",
        wset(pairs=PAIRS[:, :1], keys=X[:1], valid=VALID),
        ValueError,
        ("pair of masks", "there are 2 and 1", "None"),
    ),
    Bad("three masks of sets", wset(keys=X, valid=(VALID,) * 3), TypeError, ("or two", "got 3")),
    Bad("pairs shape", wset(pairs=PAIRS[:1]), ValueError, ("(S, S) = (2, 2)", "got (1, 2)")),
    Bad(
        "table of integers",
        wset(X.repeat(2, 1, 1, 1), torch.ones(4, 4, dtype=torch.int32)),
        ValueError,
        ("int32 are indices (K, 2)", "got shape (4, 4)", "pairs.bool()", "pairs.float()"),
    ),
    Bad("negative", wset(pairs=-PAIRS.float()), ValueError, ("finite and >= 0", "got", "-1")),
    Bad("infinite", wset(pairs=PAIRS / 0), ValueError, ("finite and >= 0", "got", "inf")),
    Bad("NaN", wset(pairs=PAIRS * torch.nan), ValueError, ("finite and >= 0", "got", "nan")),
    # pixels that take part
    Bad("valid list", wset(valid=[True]), TypeError, ("valid", "torch.Tensor", "got list")),
    Bad(
        "valid shape",
        wset(valid=VALID[:, 1:]),
        ValueError,
        ("(samples, height, width) = (2, 4, 5)", "got (2, 3, 5)", "resample"),
    ),
    Bad("valid channel", wla(valid=VALID[:, None]), ValueError, ("(2, 4, 5)", "got (2, 1, 4, 5)")),
    Bad("valid dtype", wset(valid=VALID.float()), TypeError, ("bool", "got", "valid > 0")),
    Bad("valid device", wset(valid=VALID.to(META)), ValueError, ("device", "meta", ".to(device)")),
    Bad("valid of y", wla(valid=(VALID, VALID[:1])), ValueError, ("valid[1]", "got (1, 4, 5)")),
    Bad("three masks", wla(valid=(VALID,) * 3), TypeError, ("one tensor for both", "two", "got 3")),
    Bad("set of masks", wset(valid=(VALID, VALID)), TypeError, ("torch.Tensor", "got tuple")),
    Bad("sparse valid", wset(valid=VALID.to_sparse()), TypeError, ("dense", "to_dense()")),
    Bad(
        "matches for match_pixels",
        lambda: sal.match_pixels(sal.align(X, X, 2), 2),
        TypeError,
        ("argmax", "torch.Tensor", "got Matches"),
    ),
    Bad("float argmax", lambda: sal.match_pixels(E, 2), TypeError, ("argmax", "integer")),
    Bad(
        "weights for align_set",
        lambda: sal.align_set(X, PAIRS.float(), 2),
        TypeError,
        ("pairs must be bool", "got torch.float32", "multiply"),
    ),
    # the positional loss
    Bad("embedding list", gp([1.0]), TypeError, ("embeddings", "torch.Tensor", "got list")),
    Bad("embedding shape", gp(X), ValueError, ("(samples, dimensions", "got (2, 3, 4, 5)")),
    Bad("no dimension", gp(E[:, :0]), ValueError, ("dimensions >= 1", "got (2, 0)")),
    Bad("embedding dtype", gp(E.long()), TypeError, ("float32", "got torch.int64", ".float()")),
    Bad("positives", gp(positives=PAIRS[0]), ValueError, ("(S, S) = (2, 2)", "got (2,)")),
    Bad("weights", gp(positives=PAIRS.float()), TypeError, ("must be bool", "got", ".bool()")),
    Bad("τ 0", gp(temperature=0), ValueError, ("temperature", "> 0", "got 0")),
    Bad("τ negative", gp(temperature=-0.1), ValueError, ("temperature", "> 0", "got -0.1")),
    Bad("τ tensor", gp(temperature=torch.tensor(0.0)), ValueError, ("temperature", "> 0")),
    Bad("τ tensor of two", gp(temperature=torch.ones(2)), TypeError, ("temperature", "got shape")),
    Bad("τ None", gp(temperature=None), TypeError, ("temperature", "number", "got NoneType")),
    # pairs from positions
    Bad("volume text", slices("ab"), TypeError, ("volume", "torch.Tensor", "list", "got str")),
    Bad("volume names", slices(["a", "b"]), TypeError, ("volume must hold numbers",)),
    Bad("only numbers", slices(0, 1, 2), ValueError, ("volume, index, num_slices", "each sample")),
    Bad("a number of slices", slices(num_slices=9.0), TypeError, ("num_slices", "integer")),
    Bad("lengths", slices(index=INDEX[:1]), ValueError, ("one length", "got shapes", "(1,)")),
    Bad("dimensions", slices(INDEX[:, None]), ValueError, ("one-dimensional", "got shapes")),
    Bad("device", slices(INDEX.to(META)), ValueError, ("one device", "got", "meta")),
    Bad("index", slices(index=E[:, 0]), TypeError, ("index", "integer", "float32", "relative")),
    Bad("volume", slices(volume=E[:, 0]), TypeError, ("volume", "integer", "float32", ".long()")),
    Bad("slices", slices(num_slices=PAIRS[0]), TypeError, ("num_slices", "bool", ".long()")),
    Bad("beyond", slices(index=INDEX + 8), ValueError, ("[0, num_slices)", "got index [8, 9]")),
    Bad("below", slices(index=INDEX - 1), ValueError, ("[0, num_slices)", "got index [-1, 0]")),
    Bad("t above 1", slices(t=1.5), ValueError, ("[0, 1]", "got 1.5")),
    Bad("t below 0", slices(t=-0.1), ValueError, ("t ", ">= 0", "got -0.1")),
    Bad("t text", slices(t="0.3"), TypeError, ("t ", "number", "got str")),
    Bad(
        "positions of integers",
        lambda: sal.positional_positives(INDEX, 0.3),
        TypeError,
        ("floating point", "index / num_slices", "got torch.int64"),
    ),
    Bad("position t", lambda: sal.positional_positives(E[0], 2), ValueError, ("[0, 1]", "got 2")),
    Bad("position shape", lambda: sal.positional_positives(E, 0.5), ValueError, ("got shapes",)),
    # contrast
    Bad("positive weights", contrast(PAIRS.float()), TypeError, ("positives must be bool", "got")),
    Bad("negative weights", contrast(negatives=E), ValueError, ("negatives", "(2, 2)", "(2, 3)")),
    Bad("negative floats", contrast(negatives=PAIRS.float()), TypeError, ("negatives.bool()",)),
    Bad("both", contrast(negatives=PAIRS), ValueError, ("got 2", "negatives & ~positives")),
    Bad("contrast τ", contrast(temperature=0), ValueError, ("temperature", "> 0", "got 0")),
    Bad("contrast τ NaN", contrast(temperature=float("nan")), ValueError, ("temperature", "nan")),
    Bad("contrast keys", contrast(keys=X[:1]), ValueError, ("features and keys", "same shape")),
    Bad("contrast dtype", contrast(keys=X.half()), TypeError, ("features and keys", "one dtype")),
    Bad("contrast window", contrast(window=9), ValueError, ("window_size (9, 9) is larger",)),
    Bad("contrast reduction", contrast(reduction="max"), ValueError, ("got 'max'",)),
    Bad(
        "learnt τ", contrast(temperature=torch.tensor(1e-4)), ValueError, ("> 0.0009766", "0.0001")
    ),
    Bad("contrast valid", contrast(valid=(VALID, VALID)), TypeError, ("valid", "torch.Tensor")),
    Bad("contrast backend", contrast(backend="gpu"), ValueError, ("unknown backend 'gpu'",)),
    # the whole loss
    Bad("λ", whole(lambda_=-1), ValueError, ("lambda_", ">= 0", "got -1")),
    Bad("samples", whole(features=X[:1]), ValueError, ("(S, S) = (1, 1)", "got (2, 2)")),
    Bad("slices dict", whole(num={}), TypeError, ("num_slices", "torch.Tensor", "got dict")),
    Bad("λ tensor", whole(lambda_=torch.tensor(-1.0)), ValueError, ("lambda_", ">= 0", "got -1")),
    Bad("two λ", whole(lambda_=torch.ones(2)), TypeError, ("one floating-point", "(2,)")),
    Bad("λ of integers", whole(lambda_=torch.tensor(1)), TypeError, ("lambda_", "int64")),
    # modules check when they are made
    Bad("module λ", lambda: sal.SALLoss(lambda_=-1), ValueError, ("lambda_", "got -1")),
    Bad("module t", lambda: sal.SALLoss(t=2), ValueError, ("[0, 1]", "got 2")),
    Bad("module τ", lambda: sal.SALLoss(temperature=0), ValueError, ("temperature", "got 0")),
    Bad("module GP τ", lambda: sal.GPLoss(0), ValueError, ("temperature", "got 0")),
    Bad("module eps", lambda: sal.WLALoss(eps=-1), ValueError, ("eps", "got -1")),
    Bad("module SAL eps", lambda: sal.SALLoss(eps=0), ValueError, ("eps", "got 0")),
    Bad("module reduction", lambda: sal.WLALoss(reduction="max"), ValueError, ("got 'max'",)),
    Bad("module set reduction", lambda: sal.WLASetLoss(reduction=1), ValueError, ("got 1",)),
    Bad("module set window", lambda: sal.WLASetLoss(0), ValueError, ("at least 1", "got 0")),
    Bad("module LA eps", lambda: sal.LALoss(eps=0), ValueError, ("eps", "got 0")),
    Bad(
        "module λ tensor",
        lambda: sal.SALLoss(lambda_=torch.tensor(-1.0)),
        ValueError,
        ("lambda_", "got -1"),
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_call(bad):
    with pytest.raises(bad.error) as caught:
        bad.call()
    assert caught.type is bad.error
    message = str(caught.value)
    assert all(word in message for word in bad.words), message
    assert "\n" not in message


def test_names_in_the_table_are_unique():
    assert len({bad.name for bad in BAD}) == len(BAD)


@pytest.mark.parametrize("window", [2, (2, 2), [2, 2], torch.Size([2, 2]), np.int64(2)], ids=repr)
def test_ways_to_write_a_window(window):
    x, y = torch.randn(2, 2, 3, 4, 5)
    assert torch.equal(sal.wla_loss(x, y, window), sal.wla_loss(x, y, 2))


def test_values_of_tensors_that_cannot_be_read_are_not_checked():
    """On a GPU, and on meta, a look at the values would synchronise or fail."""
    pairs = torch.full((2, 2), -1.0, device=META)
    assert sal.wla_set_loss(X.to(META), pairs, 2).device == META
