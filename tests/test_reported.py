"""Faults that users of other kernel packages report, each as a kind; see also test_edges."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from cases import F64, MASKS
from targets import of_dtype, runs_on, slow_in_the_interpreter

import salkernels


def maps(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


def in_a_process(code):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"{run.returncode}\n{run.stdout}{run.stderr}"
    return run.stdout


# ---- Thresholds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.05, 0.1, 0.2, 0.3, 0.35, 1 / 3, 0.7, 1.0])
def test_a_distance_of_exactly_t_is_not_near(t):
    """All slices of all scans of up to 24 slices, against fractions."""
    from fractions import Fraction

    exact = Fraction(str(t)).limit_denominator(1000)
    slices = [(i, count) for count in range(1, 25) for i in range(count)]
    index, count = (torch.tensor(column) for column in zip(*slices, strict=True))
    places = [Fraction(i, n) for i, n in slices]
    expected = torch.tensor([[abs(p - q) < exact for q in places] for p in places])
    expected &= ~torch.eye(len(places), dtype=torch.bool)
    assert torch.equal(salkernels.pairs.near_positions(index, count, t), expected)
    positions = index.double() / count
    assert torch.equal(salkernels.positional_positives(positions, t), expected)
    assert torch.equal(salkernels.positional_positives(positions.float(), t), expected)
    near = salkernels.slice_pairs(count, index, count, t)  # one scan for each number of slices
    assert torch.equal(near, expected & (count[:, None] == count[None, :]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_positions_of_few_bits_are_told_apart_as_far_as_they_go(dtype):
    index = torch.arange(20)
    positions = (index / 20).to(dtype)
    expected = salkernels.pairs.near_positions(index, torch.full((20,), 20), 0.1)
    assert torch.equal(salkernels.positional_positives(positions, 0.1), expected)
    same = torch.full((2,), 0.5, dtype=dtype)
    assert salkernels.positional_positives(same, 0.03)[0, 1], "a distance of 0 is near"


def test_sal_loss_takes_the_same_threshold_for_both_terms():
    ids = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4], [10, 10, 10, 10]]).unbind()
    features, embeddings = torch.randn(4, 8, 4, 4), torch.randn(4, 5)
    terms = salkernels.sal_loss(features, embeddings, *ids, 2, t=0.1)
    assert (terms.gp, terms.la) == (0, 0), "neighbours of 10 slices are at exactly 0.1"


# ---- Weights -------------------------------------------------------------------------------------


def test_a_weight_of_zero_that_is_learnt_gets_its_gradient(backend, device):
    features = maps(3, 4, 4, 4, device=device)
    weights = torch.tensor([[0, 1.0, 0], [0.5, 0, 0], [0, 0, 2.0]], device=device)
    losses = salkernels.wla_set_loss(
        features, torch.ones(3, 3, dtype=torch.bool, device=device), 2, reduction="none"
    ).detach()
    expected = weights.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((expected * losses).sum() / expected.sum(), expected)
    weights.requires_grad_()
    loss = salkernels.wla_set_loss(features, weights, 2, backend=backend)
    (grad,) = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(grad, wanted)


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((5, 6), (2, 2)),
        ((17, 18), (6, 6)),
        ((9, 10), (9, 10)),  # beyond a tile of Triton's
        pytest.param((17, 18), (17, 18), marks=slow_in_the_interpreter),  # int32 indices
    ],
)
def test_squares_beyond_fp32_are_nan_and_not_zero(size, window, dtype, backend, device):
    """‖x‖² overflows from 1.8e19 on: the loss was 1 with no gradient on some backends."""
    features = maps(4, 8, *size, device=device, dtype=dtype)
    with torch.no_grad():
        features[1, :, 3, 4] = 3e19
    pairs = MASKS["one"](4).to(device)
    pairs[0, 1] = pairs[1, 2] = True
    found = salkernels.align_set(features, pairs, window, backend=backend)
    (grad,) = torch.autograd.grad(found.max_sim.sum(), features)
    clean = features.detach().clone()
    clean[1, :, 3, 4] = torch.nan
    expected = salkernels.align_set(clean, pairs, window, backend=backend)
    torch.testing.assert_close(found.max_sim, expected.max_sim, equal_nan=True)
    assert found.max_sim.isnan().any()
    assert grad[1, :, 3, 4].isnan().all()
    assert grad[3].isfinite().all()


@pytest.mark.parametrize("eps", [1e-39, 1e-20, 1e39])
def test_eps_is_a_norm_that_fp32_can_tell(eps):
    x = torch.randn(2, 3, 4, 4)
    for call in (
        lambda: salkernels.wla_loss(x, x, 2, eps=eps),
        lambda: salkernels.SALLoss(eps=eps),
        lambda: salkernels.WLALoss(eps=eps),
    ):
        with pytest.raises(ValueError, match="eps must be a norm that fp32 can tell"):
            call()


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((1, 2**60, 2, 2), 2),
        ((2**40, 1, 1, 1), 1),
        ((1, 1, 2**31, 2), 1),
        ((1, 1, 2**16, 2**16), 1),
    ],
)
def test_extents_that_no_memory_holds_are_refused(shape, window):
    x = torch.zeros(1, 1, 1, 1).expand(shape)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 samples"):
        salkernels.wla_loss(x, x, window)


@runs_on("cpu", "cpu")
def test_the_operator_itself_refuses_them():
    for shape in ((1, 1, 2**62, 1, 1), (2**40, 1, 1, 1, 1), (1, 2**20, 1, 1, 1)):
        x = torch.zeros(1, 1, 1, 1, 1).expand(shape)
        with pytest.raises(RuntimeError, match=r"fewer than 2\^31 samples, pairs"):
            torch.ops.salkernels.match(x, x, None, None, [1, 1], 1e-12, "cpu")


@runs_on("cpu", "cpu")
def test_results_that_do_not_fit_are_an_error_that_names_no_other_machine():
    """Messages of the library named the folder in which it was built."""
    x = torch.zeros(1, 1, 1, 1).expand(2**15, 1, 2**15, 2**15)
    with pytest.raises(RuntimeError, match=r"no room for a result of 3\.5") as caught:
        salkernels.wla_loss(x, x, 1, backend="cpu")
    assert not any(part in str(caught.value) for part in ("/tmp", "/root", "/home", "/work"))


class Subclass(torch.Tensor):
    """As MONAI's MetaTensor: another type, and the same values."""


@pytest.mark.parametrize("kind", [Subclass, torch.nn.Parameter])
def test_values_of_subclasses_are_checked(kind):
    def of(x):
        return x.as_subclass(Subclass) if kind is Subclass else kind(x, requires_grad=False)

    ids = of(torch.tensor([0, 9])), torch.tensor([5, 5])
    with pytest.raises(ValueError, match=r"each index must be in \[0, num_slices\)"):
        salkernels.slice_pairs(torch.tensor([0, 0]), *ids, 0.3)
    with pytest.raises(ValueError, match="finite and >= 0"):
        salkernels.wla_set_loss(torch.randn(2, 3, 4, 4), of(torch.full((2, 2), -1.0)), 2)


# ---- Kinds of numbers and tensors ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, np.array])
def test_numbers_of_other_libraries(kind):
    x, e = torch.randn(4, 8, 4, 4), torch.randn(4, 5)
    ids = torch.tensor([[0, 0, 1, 1], [1, 2, 1, 5], [9, 9, 8, 8]]).unbind()
    settings = {"lambda_": 0.5, "t": 0.5, "temperature": 0.25, "eps": 2.0**-30}
    expected = salkernels.sal_loss(x, e, *ids, 2, **settings)
    if kind is np.array:
        with pytest.raises(TypeError, match="must be a number, got ndarray"):
            salkernels.sal_loss(x, e, *ids, 2, **{k: kind(v) for k, v in settings.items()})
        return
    given = {name: kind(value) for name, value in settings.items()}
    assert salkernels.sal_loss(x, e, *ids, 2, **given) == expected
    assert salkernels.SALLoss(2, **given)(x, e, *ids) == expected


def test_a_temperature_that_is_learnt_is_one_number_in_words():
    with pytest.raises(TypeError, match="temperature must be a number or a tensor of one"):
        salkernels.gp_loss(torch.randn(2, 3), MASKS["others"](2), torch.ones(2, requires_grad=True))


def test_sparse_and_8_bit_features_are_refused_in_words():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(TypeError, match=r"x must be a dense tensor, got layout .* x\.to_dense\(\)"):
        salkernels.wla_loss(x.to_sparse(), x, 2)
    with pytest.raises(TypeError, match=r"got torch\.float8_e4m3fn; convert it.*x\.float\(\)"):
        salkernels.wla_loss(x.to(torch.float8_e4m3fn), x, 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_columns(dtype):
    columns = torch.tensor([[0, 0, 1], [4, 1, 1], [9, 9, 9]])
    expected = salkernels.slice_pairs(*columns, 0.35)
    assert torch.equal(salkernels.slice_pairs(*columns.to(dtype), 0.35), expected)


# ---- Derivatives ---------------------------------------------------------------------------------


def test_batched_gradients_and_vectorised_jacobians(backend, device):
    x = maps(3, 4, 4, 5, device=device)

    def losses(x):
        return salkernels.wla_loss(x, x.flip(0), 2, reduction="none", backend=backend)

    eye = torch.eye(3, device=device)
    (batched,) = torch.autograd.grad(losses(x), x, eye, is_grads_batched=True)
    singly = [torch.autograd.grad(losses(x), x, row)[0] for row in eye]
    torch.testing.assert_close(batched, torch.stack(singly))
    jacobian = torch.autograd.functional.jacobian(losses, x.detach(), vectorize=True)
    torch.testing.assert_close(jacobian, batched)


def test_a_derivative_through_the_upstream_gradient(backend, device):
    """GradNorm: weights of losses by the norms of their gradients. Linear, so it can be had."""
    x = maps(3, 4, 4, 5, device=device)
    weights = torch.rand(3, device=device).requires_grad_()

    def norm(weights):
        losses = salkernels.wla_loss(x, x.flip(0), 2, reduction="none", backend=backend)
        (grad,) = torch.autograd.grad((weights * losses).sum(), x, create_graph=True)
        return grad.square().sum()

    (actual,) = torch.autograd.grad(norm(weights), weights)
    step = 1e-2
    for i in range(3):
        move = step * torch.eye(3, device=device)[i]
        slope = (norm(weights + move) - norm(weights - move)) / (2 * step)  # it is quadratic
        assert actual[i].item() == pytest.approx(slope.item(), rel=1e-2)


@of_dtype(F64)
def test_gradcheck_of_the_derivative_through_the_upstream_gradient(backend, device):
    x, y = maps(2, 3, 4, 5, device=device, dtype=F64), maps(2, 3, 4, 5, device=device, dtype=F64)
    valid = torch.rand(2, 4, 5, device=device) < 0.8
    pairs = MASKS["all"](2).to(device)

    def gradients(upstream):
        pairwise = salkernels.align(x, y, 2, valid=valid, backend=backend).max_sim
        of_set = salkernels.align_set(x, pairs, (2, 5), valid=valid, backend=backend).max_sim
        total = (pairwise * upstream[:2]).sum() + (of_set * upstream[2:]).sum()
        return torch.autograd.grad(total, (x, y), create_graph=True)

    upstream = torch.randn(6, 4, 5, device=device, dtype=F64).requires_grad_()
    torch.autograd.gradcheck(gradients, (upstream,), fast_mode=True)
    with pytest.raises(RuntimeError, match="second derivative with respect to the features"):
        sum(g.square().sum() for g in gradients(upstream)).backward()


def test_lambda_0_keeps_the_embedding_in_the_graph():
    """DistributedDataParallel stops where a parameter gets no gradient in some step."""
    ids = torch.tensor([[0, 0, 1, 1], [1, 2, 1, 5], [9, 9, 8, 8]]).unbind()
    embed, x, e = torch.nn.Conv2d(8, 8, 1), torch.randn(4, 8, 4, 4), maps(4, 5)
    terms = salkernels.sal_loss(embed(x), e, *ids, 2, lambda_=0)
    terms.loss.backward()
    assert terms.la == 0
    assert torch.equal(terms.loss, terms.gp)
    assert (embed.weight.grad == 0).all()
    assert e.grad.abs().sum() > 0


# ---- The process ---------------------------------------------------------------------------------


LATE = """
    import atexit

    class Last:
        def __del__(self):
            late()

    def late():
        for call in (lambda: salkernels.wla_loss(x, x, 2, backend="{backend}"), loss.backward):
            try:
                call()
            except RuntimeError as error:
                print("error", error)

    if "{when}" == "atexit":
        atexit.register(late)  # runs after what torch registers
    import torch, salkernels
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    loss = salkernels.wla_loss(x, x, 2, backend="{backend}")
    if "{when}" == "del":
        last = Last()
    """


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("when", ["atexit", "del"])
def test_a_call_while_python_ends_is_an_error_at_most(when, backend):
    printed = in_a_process(LATE.format(when=when, backend=backend))
    if when == "atexit":
        assert printed.count("while Python is shutting down") == 2


def test_a_mistyped_instruction_set_is_said():
    code = """
        import os, warnings
        os.environ["SALKERNELS_CPU_ISA"] = "axv2"
        with warnings.catch_warnings(record=True) as caught:
            import salkernels
        assert "must be one of baseline, avx2, avx512, got 'axv2'" in str(caught[0].message)
        status = {s.name: s for s in salkernels.backends()}["cpu"]
        assert not status.available and "axv2" in status.reason
        """
    in_a_process(code)


def test_every_module_can_be_loaded_again():
    """As notebooks with autoreload do."""
    code = """
        import importlib, sys, torch, salkernels
        x = torch.randn(2, 4, 4, 4, requires_grad=True)
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "salkernels" and isinstance(module, type(sys)):
                importlib.reload(module)
            salkernels.wla_loss(x, x.flip(0), 2).backward()
            salkernels.backends()
        """
    in_a_process(code)


def test_the_package_can_be_taken_out_and_imported_again():
    code = """
        import gc, sys, torch, salkernels
        for name in [name for name in sys.modules if name.split(".")[0] == "salkernels"]:
            del sys.modules[name]
        del salkernels
        gc.collect()
        import salkernels
        x = torch.randn(2, 4, 4, 4, requires_grad=True)
        salkernels.wla_loss(x, x.flip(0), 2).backward()
        """
    in_a_process(code)


def test_a_mask_made_in_inference_mode():
    x = maps(2, 3, 4, 4)
    with torch.inference_mode():
        valid = torch.rand(2, 4, 4) < 0.8
    for loss in (
        salkernels.align_set(x, MASKS["others"](2), 2, valid=valid).max_sim.sum(),
        salkernels.wla_loss(x, x.flip(0), 2, valid=valid),
    ):
        loss.backward()


def test_the_function_can_be_imported_and_found_as_a_module():
    code = """
        import importlib.util
        import salkernels.wla_loss
        from salkernels import wla_loss
        from salkernels.wla_loss import wla_loss as by_module
        assert by_module is wla_loss
        assert salkernels.wla_loss is wla_loss
        assert importlib.util.find_spec("salkernels.wla_loss").origin.endswith("wla_loss.py")
        import inspect, pickle
        assert pickle.loads(pickle.dumps(wla_loss)) is wla_loss
        assert list(inspect.signature(wla_loss).parameters)[:3] == ["x", "y", "window_size"]
        """
    in_a_process(code)
    assert importlib.util.find_spec("salkernels.wla_loss") is not None
