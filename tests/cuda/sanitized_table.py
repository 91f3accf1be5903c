"""The table of cases in a form that is quick under the sanitizers; test_on_host.py runs this file.

Without them `test_pairwise` and `test_set` say more.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from tolerances import TOLERANCES

from salkernels import reference


@pytest.mark.parametrize("form", ["pairwise", "set"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_table(case, form, host_kernels):
    x, y = case.features().detach(), case.features(stream=1).detach()
    if form == "set":
        pairs = case.pairs().flatten().nonzero().squeeze(1)
        arguments = (x[None], None, pairs, None, case.window, case.eps)
    else:
        arguments = (x[:, None], y[:, None], None, None, case.window, case.eps)
    actual, expected = (k.match(*arguments) for k in (host_kernels, reference))
    tolerance = TOLERANCES[case.dtype]
    for name in ("loss", "max_sim"):
        ours, theirs = (getattr(x, name) for x in (actual, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance.similarity)
    grad_sim = torch.randn_like(actual.max_sim)
    saved = (grad_sim, *arguments[:4], *expected[1:], *arguments[4:])
    for ours, theirs in zip(
        host_kernels.match_backward(*saved), reference.match_backward(*saved), strict=True
    ):
        if ours is not None:
            torch.testing.assert_close(
                ours, theirs, rtol=tolerance.element, atol=10 * tolerance.relative_l2
            )
