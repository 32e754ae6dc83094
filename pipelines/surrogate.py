"""What a search believes about trials it has not run: Gaussian processes, and the hypervolume a trial may add.

Pure functions of arrays. Shape legend: N trials known, C candidates, F features in [0, 1], M front members.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from scipy import linalg, optimize, special

Floats = npt.NDArray[np.float64]

_JITTER = 1e-8
#: Prior of the logarithms: mean and standard deviation of length scales (in a unit cube) and of the noise's share.
_LENGTH_PRIOR = (np.log(0.7), 0.8)
_NOISE_PRIOR = (np.log(0.03), 1.0)
_NOISE_BOUNDS = (np.log(1e-3), np.log(0.5))
_LENGTH_BOUNDS = (np.log(0.05), np.log(20.0))


@dataclasses.dataclass(frozen=True)
class Belief:
    """Independent normal beliefs about each candidate: mean and standard deviation, [C] each."""

    mean_C: Floats
    std_C: Floats


def matern(a_NF: Floats, b_CF: Floats, length_F: Floats) -> Floats:
    """Matérn 5/2 with a length scale per feature, [N, C] (Rasmussen & Williams 2006, equation 4.17)."""
    squares = (((a_NF[:, None, :] - b_CF[None, :, :]) / length_F) ** 2).sum(axis=-1)
    r = np.sqrt(5.0 * squares)
    return (1.0 + r + r * r / 3.0) * np.exp(-r)


def believe(x_NF: Floats, y_N: Floats, x_CF: Floats) -> Belief:
    """A Gaussian process over features, its length scales and noise at their most probable value, asked at candidates.

    The signal's variance is the one that maximises the likelihood in closed form; the mean is linear in the features,
    shrunk towards a constant.
    """
    shift, scale = float(y_N.mean()), float(y_N.std()) or 1.0
    z_N = (y_N - shift) / scale
    theta = _fit(x_NF, z_N)
    length_F, noise = np.exp(theta[:-1]), float(np.exp(theta[-1]))
    factor, weights_N, signal = _solve(x_NF, z_N, length_F, noise)
    cross_NC = _kernel(x_NF, x_CF, length_F)
    mean_C = cross_NC.T @ weights_N
    half_NC = linalg.solve_triangular(factor, cross_NC, lower=True)
    prior_C = _diagonal(x_CF)
    variance_C = signal * np.maximum(prior_C - (half_NC**2).sum(axis=0), 1e-10)
    return Belief(mean_C=shift + scale * mean_C, std_C=scale * np.sqrt(variance_C))


def _kernel(a_NF: Floats, b_CF: Floats, length_F: Floats) -> Floats:
    """Matérn plus a linear trend (Bayesian linear regression with unit weights around the middle of the cube)."""
    return matern(a_NF, b_CF, length_F) + (a_NF - 0.5) @ (b_CF - 0.5).T + 1.0


def _diagonal(x_CF: Floats) -> Floats:
    return 2.0 + ((x_CF - 0.5) ** 2).sum(axis=-1)


def _solve(x_NF: Floats, z_N: Floats, length_F: Floats, noise: float) -> tuple[Floats, Floats, float]:
    """Cholesky factor, weights, and the most likely variance of the signal."""
    gram = _kernel(x_NF, x_NF, length_F) + (noise**2 + _JITTER) * np.eye(len(x_NF))
    factor = linalg.cholesky(gram, lower=True)
    weights_N = linalg.cho_solve((factor, True), z_N)
    return factor, weights_N, max(float(z_N @ weights_N) / len(z_N), 1e-6)


def _fit(x_NF: Floats, z_N: Floats) -> Floats:
    """Most probable logarithms of [length scales, noise]."""
    features = x_NF.shape[1]
    prior = np.array([_LENGTH_PRIOR[0]] * features + [_NOISE_PRIOR[0]])
    spread = np.array([_LENGTH_PRIOR[1]] * features + [_NOISE_PRIOR[1]])

    def loss(theta: Floats) -> float:
        factor, _, signal = _solve(x_NF, z_N, np.exp(theta[:-1]), float(np.exp(theta[-1])))
        likelihood = -0.5 * len(z_N) * np.log(signal) - np.log(np.diag(factor)).sum()
        return float(-likelihood + 0.5 * (((theta - prior) / spread) ** 2).sum())

    bounds = [_LENGTH_BOUNDS] * features + [_NOISE_BOUNDS]
    found = optimize.minimize(loss, prior, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40})
    return np.asarray(found.x, dtype=np.float64)


def expected_improvement(threshold: Floats | float, belief: Belief) -> Floats:
    """E[max(0, threshold − y)] of each candidate."""
    z_C = (threshold - belief.mean_C) / belief.std_C
    density_C = np.exp(-0.5 * z_C**2) / np.sqrt(2 * np.pi)
    return belief.std_C * (z_C * special.ndtr(z_C) + density_C)


def expected_hypervolume_improvement(front_M2: Floats, reference_2: Floats, first: Belief, second: Belief) -> Floats:
    """Expected hypervolume that each candidate adds to a front of two minimised objectives, [C]. Exact.

    The plane left of the reference is cut into strips between the front's members, and in each the area that a point
    gains is a product of one factor per objective (Emmerich, Deutz & Klinkenberg 2011, as a sum over strips).
    """
    inside = (front_M2 < reference_2).all(axis=1)
    ordered = front_M2[inside][np.argsort(front_M2[inside][:, 0])]
    edges = np.concatenate([ordered[:, 0], [reference_2[0]]])
    tops = np.concatenate([[reference_2[1]], ordered[:, 1]])
    gain_C = np.zeros_like(first.mean_C)
    left_C = np.zeros_like(first.mean_C)
    for edge, top in zip(edges, tops, strict=True):
        right_C = expected_improvement(edge, first)
        gain_C += (right_C - left_C) * expected_improvement(top, second)
        left_C = right_C
    return gain_C
