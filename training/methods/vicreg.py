"""Terms of VICReg (Bardes et al., ICLR 2022) that keep features from collapsing."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .base import full_precision

EPS = 1e-4  # under the root of a variance, as in Eq. 2 of Bardes et al.


def variance_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    r"""Variance and covariance terms (Eqs. 1 and 4 of Bardes et al.) of the pixels of (S, D, H, W).

    .. math:: v = \frac{1}{D} \sum_d \max(0, 1 - \sqrt{\mathrm{Var}(z_d) + \varepsilon}), \qquad
        c = \frac{1}{D} \sum_{d \neq e} \mathrm{Cov}(z_d, z_e)^2

    Changed: z is √D times the feature of unit norm. LA sees directions only, which a layer could
    bring together while raw features keep any variance: by a large mean, for one. Of unit norm,
    both are 0 only where directions are spread evenly. v is 1 − √ε for a collapse to one
    direction; c is up to D − 1, for one line with both signs that lies between the axes.
    """
    dimensions = features.shape[1]
    with full_precision(features.device):
        unit = F.normalize(features.float(), dim=1).movedim(1, -1).flatten(0, -2)
        z = dimensions**0.5 * unit
        z = z - z.mean(dim=0)
        covariance = z.T @ z / (len(z) - 1)
    own = covariance.diagonal()
    variance = F.relu(1 - (own + EPS).sqrt()).mean()
    return variance, (covariance.square().sum() - own.square().sum()) / dimensions
