"""Fused kernels for Self-supervised Alignment Learning (SAL): window-wise cosine row-max losses."""

import typing as _typing

from ._version import __version__
from .functional import (
    SALTerms,
    explain,
    gp_loss,
    la_loss,
    sal_loss,
    wla_loss,
    wla_set_loss,
)
from .matching import Matches, align, align_set, match_pixels
from .modules import GPLoss, SALLoss, WLALoss
from .pairs import positional_positives, slice_pairs

__all__ = [
    "GPLoss",
    "Matches",
    "SALLoss",
    "SALTerms",
    "WLALoss",
    "__version__",
    "align",
    "align_set",
    "backends",
    "explain",
    "gp_loss",
    "la_loss",
    "match_pixels",
    "positional_positives",
    "sal_loss",
    "slice_pairs",
    "wla_loss",
    "wla_set_loss",
]

if _typing.TYPE_CHECKING:
    # The package `backends` can be called, which type checkers do not know of packages.
    from .backends import statuses as backends
else:
    from . import backends
