"""The losses as modules, which hold settings and call `salkernels.functional`."""

from __future__ import annotations

from torch import Tensor, nn

from .checks import (
    Valid,
    WindowSize,
    check_eps,
    check_finite_number,
    check_reduction,
    check_threshold,
    check_window_size,
)
from .functional import SALTerms, gp_loss, sal_loss, wla_loss
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


class GPLoss(nn.Module):
    """`salkernels.gp_loss` with a fixed τ: embeddings (S, D), positives (S, S) -> loss."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = check_finite_number("temperature", temperature, above=0.0)

    def forward(self, embeddings: Tensor, positives: Tensor) -> Tensor:
        return gp_loss(embeddings, positives, self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class SALLoss(nn.Module):
    """`salkernels.sal_loss` with fixed settings (paper, Eq. 3)."""

    def __init__(
        self,
        window_size: WindowSize = 2,
        *,
        lambda_: float = 1.0,
        t: float = 0.35,
        temperature: float = 0.1,
        eps: float = EPS,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_window_size(window_size)
        self.window_size = window_size
        self.lambda_ = check_finite_number("lambda_", lambda_, above=0.0, inclusive=True)
        self.t = check_threshold(t)
        self.temperature = check_finite_number("temperature", temperature, above=0.0)
        self.eps = check_eps(eps)
        self.backend = backend

    def forward(
        self,
        features: Tensor,  # (S, C, H, W)
        embeddings: Tensor,  # (S, D)
        volume: Tensor,  # (S,)
        index: Tensor,  # (S,)
        num_slices: Tensor,  # (S,)
        valid: Tensor | None = None,  # (S, H, W)
    ) -> SALTerms:
        return sal_loss(
            features,
            embeddings,
            volume,
            index,
            num_slices,
            self.window_size,
            valid=valid,
            lambda_=self.lambda_,
            t=self.t,
            temperature=self.temperature,
            eps=self.eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, lambda_={self.lambda_}, t={self.t}, "
            f"temperature={self.temperature}, eps={self.eps}, backend={self.backend!r}"
        )
