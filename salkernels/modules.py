"""The losses as modules, which hold settings and call `salkernels.functional`."""

from __future__ import annotations

from torch import Tensor, nn

from .checks import (
    Column,
    Rows,
    Valid,
    WindowSize,
    check_eps,
    check_number,
    check_reduction,
    check_threshold,
    check_window_size,
)
from .functional import SALTerms, gp_loss, la_loss, sal_loss, wla_loss, wla_set_loss
from .matching import EPS


class WLALoss(nn.Module):
    """`salkernels.wla_loss` with fixed settings: x (B, C, H, W), y (B, C, H, W) -> loss."""

    def __init__(
        self,
        window_size: WindowSize = 2,
        *,
        reduction: str = "mean",
        eps: float = EPS,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_window_size(window_size)
        check_reduction(reduction)
        self.window_size = window_size
        self.reduction = reduction
        self.eps = check_eps(eps)
        self.backend = backend

    def forward(self, x: Tensor, y: Tensor, valid: Valid = None) -> Tensor:
        return wla_loss(
            x,
            y,
            self.window_size,
            valid=valid,
            reduction=self.reduction,
            eps=self.eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, reduction={self.reduction!r}, eps={self.eps}, "
            f"backend={self.backend!r}"
        )


class LALoss(nn.Module):
    """`salkernels.la_loss` with fixed settings: x (B, C, H, W), y (B, C, H, W) -> loss."""

    def __init__(
        self, *, reduction: str = "mean", eps: float = EPS, backend: str | None = None
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction
        self.eps = check_eps(eps)
        self.backend = backend

    def forward(self, x: Tensor, y: Tensor, valid: Valid = None) -> Tensor:
        return la_loss(
            x, y, valid=valid, reduction=self.reduction, eps=self.eps, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, eps={self.eps}, backend={self.backend!r}"


class WLASetLoss(nn.Module):
    """`salkernels.wla_set_loss` with fixed settings: features (S, C, H, W), pairs -> loss."""

    def __init__(
        self,
        window_size: WindowSize = 2,
        *,
        detach_keys: bool = False,
        reduction: str = "mean",
        eps: float = EPS,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_window_size(window_size)
        check_reduction(reduction)
        self.window_size = window_size
        self.detach_keys = detach_keys
        self.reduction = reduction
        self.eps = check_eps(eps)
        self.backend = backend

    def forward(
        self,
        features: Tensor,  # (S, C, H, W)
        pairs: Rows,  # (S, S) or (S, M), or indices (K, 2)
        keys: Tensor | None = None,  # (M, C, H, W)
        valid: Valid = None,  # (S, H, W), or a pair of masks
    ) -> Tensor:
        return wla_set_loss(
            features,
            pairs,
            self.window_size,
            keys=keys,
            detach_keys=self.detach_keys,
            valid=valid,
            reduction=self.reduction,
            eps=self.eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, detach_keys={self.detach_keys}, "
            f"reduction={self.reduction!r}, eps={self.eps}, backend={self.backend!r}"
        )


class GPLoss(nn.Module):
    """`salkernels.gp_loss` with one τ: embeddings (S, D), positives (S, S) -> loss.

    An `nn.Parameter` as τ is a parameter of the module, and is learnt.
    """

    def __init__(self, temperature: float | Tensor = 0.1) -> None:
        super().__init__()
        self.temperature = _learnable("temperature", temperature)

    def forward(self, embeddings: Tensor, positives: Rows) -> Tensor:
        return gp_loss(embeddings, positives, self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={_shown(self.temperature)}"


class SALLoss(nn.Module):
    """`salkernels.sal_loss` with fixed settings (paper, Eq. 3).

    An `nn.Parameter` as λ or τ is a parameter of the module, and is learnt.
    """

    def __init__(
        self,
        window_size: WindowSize = 2,
        *,
        detach_keys: bool = False,
        lambda_: float | Tensor = 1.0,
        t: float = 0.35,
        temperature: float | Tensor = 0.1,
        eps: float = EPS,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_window_size(window_size)
        self.window_size = window_size
        self.detach_keys = detach_keys
        self.lambda_ = _learnable("lambda_", lambda_, inclusive=True)
        self.t = check_threshold(t)
        self.temperature = _learnable("temperature", temperature)
        self.eps = check_eps(eps)
        self.backend = backend

    def forward(
        self,
        features: Tensor,  # (S, C, H, W)
        embeddings: Tensor,  # (S, D)
        volume: Column,  # (S,)
        index: Column,  # (S,)
        num_slices: Column,  # (S,)
        valid: Valid = None,  # (S, H, W)
    ) -> SALTerms:
        return sal_loss(
            features,
            embeddings,
            volume,
            index,
            num_slices,
            self.window_size,
            detach_keys=self.detach_keys,
            valid=valid,
            lambda_=self.lambda_,
            t=self.t,
            temperature=self.temperature,
            eps=self.eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, detach_keys={self.detach_keys}, "
            f"lambda_={_shown(self.lambda_)}, t={self.t}, "
            f"temperature={_shown(self.temperature)}, "
            f"eps={self.eps}, backend={self.backend!r}"
        )


def _shown(value: float | Tensor) -> float | str:
    if not isinstance(value, Tensor):
        return value
    return "a tensor" if value.is_meta else f"{value.item():.6g} (a tensor)"


def _learnable(name: str, value: float | Tensor, *, inclusive: bool = False) -> float | Tensor:
    """A setting as it is checked, but a parameter as itself, so that the module holds it."""
    checked = check_number(name, value, above=0.0, inclusive=inclusive)
    return value if isinstance(value, nn.Parameter) else checked
