"""The operator as torch sees it: opcheck, compile, export, fake tensors, function transforms."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import F32, F64, MASKS, lay_out
from targets import of_dtype, slow_in_the_interpreter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import salkernels

match = torch.ops.salkernels.match.default
match_backward = torch.ops.salkernels.match_backward.default

PAIRS = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]]).bool()
IDS = torch.tensor([[0, 0, 1, 1], [1, 2, 1, 5], [9, 9, 8, 8]]).unbind()


def maps(samples=4, dtype=F32, device="cpu", layout="contiguous"):
    x = torch.randn(samples, 3, 5, 6, device=device).to(dtype)
    return lay_out(x, layout).requires_grad_()


OPERATOR = {
    "pairwise": {},
    "float64": {"dtype": F64},
    "bfloat16": {"dtype": torch.bfloat16},
    "channels_last": {"layout": "channels_last"},
    "strided": {"layout": "strided"},
    "expanded": {"layout": "expanded"},
    "no sample": {"samples": 0},
    "set": {"mask": PAIRS},
    "set, channels_last": {"mask": PAIRS, "layout": "channels_last"},
    "set, bfloat16": {"mask": PAIRS, "dtype": torch.bfloat16},
    "set, no pair": {"mask": PAIRS & False},
    "set, window is the map": {"mask": PAIRS, "window": (5, 6)},
    "set, valid": {"mask": PAIRS, "valid": True},
    "groups, other keys": {"groups": True, "mask": PAIRS[:, :3]},
    "groups, other keys, valid": {"groups": True, "mask": PAIRS[:, :3], "valid": True},
}


IN_THE_INTERPRETER = ("set, channels_last", "groups, other keys", "no sample")


def marks_of(name):
    """Which targets a variant is meant for."""
    marks = [] if name in IN_THE_INTERPRETER else [slow_in_the_interpreter]
    return [*marks, of_dtype(OPERATOR[name].get("dtype", F32))]


every_variant = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks_of(name)) for name in OPERATOR]
)


def variant_input(backend, device, *, mask=None, groups=False, valid=False, window=(2, 3), **how):
    """Arguments of `match`: B pairs, one set, or two groups of 4 queries and 3 keys."""
    x, y = maps(device=device, **how), maps(device=device, **how)
    if groups:
        query, key = torch.stack((x, y)), torch.stack((y[:3], x[:3]))
        mask = torch.stack((mask, ~mask))
        query, key = (z.detach().requires_grad_() for z in (query, key))
    elif mask is None:
        query, key = x[:, None], y[:, None]
    else:
        query, key = x[None], None
    pairs = None if mask is None else mask.reshape(-1).nonzero().squeeze(1).to(device)
    if valid:
        samples = query.shape[1] + (0 if key is None else key.shape[1])
        valid = torch.rand(len(query), samples, *query.shape[3:], device=device) < 0.7
    else:
        valid = None
    return query, key, pairs, valid, window, 1e-12, backend


@every_variant
def test_opcheck_forward(name, backend, device):
    opcheck(match, variant_input(backend, device, **OPERATOR[name]))


@every_variant
def test_opcheck_backward(name, backend, device):
    """Without tensors that require a gradient: the second derivative is an error by design."""
    query, key, *rest = variant_input(backend, device, **OPERATOR[name])
    query, key = query.detach(), None if key is None else key.detach()
    _, *kept = match(query, key, *rest)
    args = (torch.randn_like(kept[0]), query, key, *rest[:2], *kept, *rest[2:])
    opcheck(match_backward, args)


@pytest.mark.parametrize("name", OPERATOR)
def test_opcheck_of_the_negatives(name):
    """As `match`, of which it takes the arguments; the operator is one for every backend."""
    query, key, pairs, valid, window, eps, _ = variant_input(
        "reference", torch.device("cpu"), **OPERATOR[name]
    )
    settings = (window, 0.1, eps, "reference")
    opcheck(torch.ops.salkernels.window_lse, (query, key, pairs, valid, *settings))
    query, key = query.detach(), None if key is None else key.detach()
    lse = torch.ops.salkernels.window_lse(query, key, pairs, valid, *settings)
    args = (torch.randn_like(lse), query, key, pairs, valid, lse, *settings)
    opcheck(torch.ops.salkernels.window_lse_backward, args)


LOSSES = {
    "wla": lambda f, e, p, w: salkernels.wla_loss(f, f.flip(0), (2, 3)),
    "wla none": lambda f, e, p, w: salkernels.wla_loss(f, f.flip(0), 2, reduction="none").sum(),
    "la": lambda f, e, p, w: salkernels.la_loss(f, f.flip(0)),
    "set": lambda f, e, p, w: salkernels.wla_set_loss(f, p, 2),
    "set with weights": lambda f, e, p, w: salkernels.wla_set_loss(f, w, 2),
    "set, valid": lambda f, e, p, w: salkernels.wla_set_loss(
        f, p, 2, valid=f.detach()[:, 0] > -0.5
    ),
    "align": lambda f, e, p, w: (2 - salkernels.align(f, f.flip(0), 2).max_sim).square().mean(),
    "contrast": lambda f, e, p, w: salkernels.wla_contrast(f, p, ~p, 2),
    "contrast, valid": lambda f, e, p, w: salkernels.wla_contrast(
        f, p, ~p, 2, valid=f.detach()[:, 0] > -0.5
    ),
    "contrast, keys": lambda f, e, p, w: salkernels.wla_contrast(f, p, ~p, 2, keys=f.flip(0)),
    "gp": lambda f, e, p, w: salkernels.gp_loss(e, p),
    "SALLoss": lambda f, e, p, w: salkernels.SALLoss(2)(f, e, *IDS).loss,
}


def inputs(samples=4, height=5, width=6):
    generator = torch.Generator().manual_seed(samples)
    features = torch.randn(samples, 3, height, width, generator=generator).requires_grad_()
    embeddings = torch.randn(samples, 7, generator=generator).requires_grad_()
    pairs = torch.rand(samples, samples, generator=generator) > 0.4
    return features, embeddings, pairs, torch.rand(samples, samples, generator=generator) * pairs


def agrees(compiled, loss, args):
    """Value and gradients of the compiled loss are those of the eager one."""
    actual, expected = compiled(*args), loss(*args)
    torch.testing.assert_close(actual, expected)
    grads = [
        torch.autograd.grad(out, args[:2], allow_unused=True, materialize_grads=True)
        for out in (actual, expected)
    ]
    torch.testing.assert_close(*grads)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_compile_without_a_graph_break(loss):
    agrees(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, inputs())


@pytest.mark.parametrize("name", LOSSES)
def test_compile_with_dynamic_shapes(name):
    loss = LOSSES[name]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    agrees(compiled, loss, inputs())
    if name != "SALLoss":  # its ids have four samples
        with torch.compiler.set_stance("fail_on_recompile"):
            agrees(compiled, loss, inputs(samples=6, height=7, width=9))


def test_compile_of_the_objective_by_inductor():
    loss = LOSSES["SALLoss"]
    agrees(torch.compile(loss, fullgraph=True), loss, inputs())


def test_compile_where_a_setting_changes():
    """λ on a schedule: dynamo makes a float that changes symbolic, and must still trace it."""
    module = salkernels.SALLoss(2)
    features, embeddings, *_ = inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for lambda_ in (1.0, 0.5, 0.25):
        module.lambda_ = lambda_
        torch.testing.assert_close(
            compiled(features, embeddings, *IDS), module(features, embeddings, *IDS)
        )


def test_compile_where_the_threshold_changes():
    """A float that changes becomes a symbol, also where it is decided in integers."""
    compiled = torch.compile(salkernels.slice_pairs, fullgraph=True, backend="aot_eager")
    objective = torch.compile(salkernels.sal_loss, fullgraph=True, backend="aot_eager")
    features, embeddings, *_ = inputs()
    for t in (0.1, 0.2, 0.35, 1 / 3):
        assert torch.equal(compiled(*IDS, t), salkernels.slice_pairs(*IDS, t))
        actual = objective(features, embeddings, *IDS, 2, t=t)
        torch.testing.assert_close(actual, salkernels.sal_loss(features, embeddings, *IDS, 2, t=t))


@pytest.mark.parametrize("name", salkernels.backends.BACKENDS)
def test_the_choice_of_a_backend_can_be_compiled(name):
    """On a GPU every backend is asked within the graph; here by hand."""
    backend = salkernels.backends.get(name)

    def asked(x):
        return x.sum() + (backend.why_not(x, None, (2, 2)) is None)

    x = torch.ones(2, 3, 4, 4)
    compiled = torch.compile(asked, fullgraph=True, backend="aot_eager")
    assert compiled(x) == asked(x)


def test_compile_under_autocast():
    features, *_ = inputs()

    def loss(x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return salkernels.wla_loss(x, y, 2)

    x = features.detach().bfloat16().requires_grad_()
    agrees(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, (x, features))


class SetLoss(torch.nn.Module):
    def forward(self, features, pairs):
        return salkernels.wla_set_loss(features, pairs, 2)


class WholeMapLoss(torch.nn.Module):
    def forward(self, x, y):
        return salkernels.la_loss(x, y)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(strict):
    dynamic = torch.export.Dim.DYNAMIC
    features, _, pairs, _ = inputs()
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic, 1: dynamic})
    program = torch.export.export(
        SetLoss(), (features.detach(), pairs), dynamic_shapes=shapes, strict=strict
    )
    other, _, other_pairs, _ = inputs(samples=6, height=7, width=9)
    torch.testing.assert_close(program.module()(other, other_pairs), SetLoss()(other, other_pairs))

    program = torch.export.export(
        WholeMapLoss(),
        (features.detach(), features.detach().flip(0)),
        dynamic_shapes=(shapes[0],) * 2,
        strict=strict,
    )
    torch.testing.assert_close(
        program.module()(other, other.flip(0)), WholeMapLoss()(other, other.flip(0))
    )


ABSTRACT = {
    "wla": (lambda f, e, p, ids: salkernels.wla_loss(f, f, 2), ()),
    "wla none": (lambda f, e, p, ids: salkernels.wla_loss(f, f, 2, reduction="none"), (4,)),
    "la": (lambda f, e, p, ids: salkernels.la_loss(f, f), ()),
    "set": (lambda f, e, p, ids: salkernels.wla_set_loss(f, p, 2), ()),
    "set none": (lambda f, e, p, ids: salkernels.wla_set_loss(f, p, 2, reduction="none"), (4, 4)),
    "set weights": (lambda f, e, p, ids: salkernels.wla_set_loss(f, p.float(), 2), ()),
    "align": (lambda f, e, p, ids: salkernels.align(f, f, 2)[0], (4, 5, 6)),
    "set valid": (lambda f, e, p, ids: salkernels.wla_set_loss(f, p, 2, valid=f[:, 0] > 0), ()),
    "contrast": (lambda f, e, p, ids: salkernels.wla_contrast(f, p, ~p, 2), ()),
    "contrast none": (
        lambda f, e, p, ids: salkernels.wla_contrast(f, p, ~p, 2, keys=f, reduction="none"),
        (4, 4),
    ),
    "gp": (lambda f, e, p, ids: salkernels.gp_loss(e, p), ()),
    "SAL": (lambda f, e, p, ids: salkernels.SALLoss()(f, e, *ids).loss, ()),
}


def check_abstract(call, shape, convert):
    features, embeddings, pairs, _ = inputs()
    features, embeddings = (convert(z.detach()).requires_grad_() for z in (features, embeddings))
    out = call(features, embeddings, convert(pairs), [convert(column) for column in IDS])
    assert out.shape == shape
    assert out.dtype == F32
    assert out.device == features.device
    if out.requires_grad:
        leaves = (features, embeddings)
        grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
        used = [(g, leaf) for g, leaf in zip(grads, leaves, strict=True) if g is not None]
        assert used
        assert all(g.shape == leaf.shape and g.dtype == leaf.dtype for g, leaf in used)


@pytest.mark.parametrize(("call", "shape"), ABSTRACT.values(), ids=ABSTRACT)
def test_meta_tensors(call, shape):
    check_abstract(call, shape, lambda x: x.to("meta"))


@pytest.mark.parametrize(("call", "shape"), ABSTRACT.values(), ids=ABSTRACT)
def test_fake_tensors(call, shape):
    """What compilers and memory planners use: on the CPU, but with no values to look at."""
    with FakeTensorMode() as mode:
        check_abstract(call, shape, mode.from_tensor)


FUNCTIONS = {
    "wla": lambda x: salkernels.wla_loss(x, x.flip(0), 2),
    "la": lambda x: salkernels.la_loss(x, x.flip(0)),
    "set": lambda x: salkernels.wla_set_loss(x, MASKS["others"](4), 2),
    "contrast": lambda x: salkernels.wla_contrast(x, MASKS["band"](4), ~MASKS["band"](4), 2),
}
TRANSFORMS = {
    "grad": lambda loss, x: torch.func.grad(loss)(x),
    "vjp": lambda loss, x: torch.func.vjp(loss, x),
    "jacrev": lambda loss, x: torch.func.jacrev(loss)(x),
    "jvp": lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
    "jacfwd": lambda loss, x: torch.func.jacfwd(loss)(x),
    "hessian": lambda loss, x: torch.func.hessian(loss)(x),
    "vmap of grad": lambda loss, x: torch.vmap(torch.func.grad(loss))(x[None]),
}


@pytest.mark.parametrize("loss", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_are_an_error_not_a_wrong_number(transform, loss):
    with pytest.raises(RuntimeError, match=r"torch\.func|forward-mode") as caught:
        transform(loss, torch.randn(4, 3, 5, 6))
    assert "loss.backward()" in str(caught.value)


@pytest.mark.parametrize("loss", FUNCTIONS.values(), ids=FUNCTIONS)
def test_forward_mode_is_an_error(loss):
    x = torch.randn(4, 3, 5, 6)
    with forward_ad.dual_level():
        assert loss(x).isfinite()  # no tangent, no error
        with pytest.raises(RuntimeError, match="forward-mode"):
            loss(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("loss", FUNCTIONS.values(), ids=FUNCTIONS)
def test_vmap_without_a_gradient(loss):
    x = torch.randn(3, 4, 3, 5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch loops over the batch and says so
        batched = torch.vmap(loss)(x)
    torch.testing.assert_close(batched, torch.stack([loss(item) for item in x]))


def test_a_dispatch_mode_sees_both_operators():
    """A call may take a shorter way only where nobody looks."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    pairs = ~torch.eye(4, dtype=torch.bool)
    plain = salkernels.wla_set_loss(x, pairs, 2)
    (expected,) = torch.autograd.grad(plain, x)
    with Seen() as mode:
        mode.names = []
        loss = salkernels.wla_set_loss(x, pairs, 2)
        (grad,) = torch.autograd.grad(loss, x)
        with torch.no_grad():
            salkernels.wla_set_loss(x, pairs, 2)
    assert mode.names.count("salkernels.match.default") == 2
    assert mode.names.count("salkernels.match_backward.default") == 1
    assert loss.equal(plain)
    assert grad.equal(expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backward_within_autocast_is_as_exact_as_outside(backend):
    x = torch.randn(4, 32, 6, 6, requires_grad=True)
    pairs = ~torch.eye(4, dtype=torch.bool)

    def gradient():
        return torch.autograd.grad(salkernels.wla_set_loss(x, pairs, 3, backend=backend), x)[0]

    expected = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        assert gradient().equal(expected)
