"""Fused kernels for Self-supervised Alignment Learning (SAL): window-wise cosine row-max losses."""

import os as _os
import sys as _sys


def _leave_current_folder() -> None:
    """Keeps `python -m salkernels...` from importing files of the current folder, whoever owns it.

    Python puts that folder first on the path; while it looks for the module, argv[0] is "-m".
    """
    argv = getattr(_sys, "argv", None) or [""]
    word = _sys.orig_argv[-len(argv)].partition(".")[0] if argv[0] == "-m" else ""
    if word != "salkernels" and not (word.startswith("-") and word.endswith("msalkernels")):
        return
    own = _os.path.realpath(_os.path.dirname(_os.path.dirname(__file__)))
    try:
        here = _os.getcwd()
    except OSError:  # it is gone
        return
    if _os.path.realpath(_sys.path[0]) == here != own:
        del _sys.path[0]


_leave_current_folder()

import typing as _typing
import warnings as _warnings

from . import _shadow
from ._version import __version__

if _found := _shadow.hidden():
    _warnings.warn(_shadow.explanation(_found), RuntimeWarning, stacklevel=2)

from .backends.cpu import release_memory
from .contrast import wla_contrast
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
from .modules import GPLoss, LALoss, SALLoss, WLALoss, WLASetLoss
from .pairs import positional_positives, slice_pairs
from .plots import plot_matches

__all__ = [
    "GPLoss",
    "LALoss",
    "Matches",
    "SALLoss",
    "SALTerms",
    "WLALoss",
    "WLASetLoss",
    "__version__",
    "align",
    "align_set",
    "backends",
    "explain",
    "gp_loss",
    "la_loss",
    "match_pixels",
    "plot_matches",
    "positional_positives",
    "release_memory",
    "sal_loss",
    "slice_pairs",
    "wla_contrast",
    "wla_loss",
    "wla_set_loss",
]

if _typing.TYPE_CHECKING:
    # The package `backends` can be called, which type checkers do not know of packages.
    from .backends import statuses as backends
else:
    from . import backends
