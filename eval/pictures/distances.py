"""How far two sets of pictures lie apart by their features: Frechet distance (FID) and kernel distance (KID).

    features (N, D) --Moments.add, a batch at a time--> mean, covariance --frechet_distance--> one number
    features (N, D), kept --kernel_distance--> mean over subsets, their standard deviation

All float64 numpy; no network, no file. Shape legend: N pictures, D feature width, M pictures of a subset.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SUBSETS, SUBSET_SIZE = 100, 1000
"""Subsets of a kernel distance, and pictures of each (Binkowski et al. 2018, section 4)."""


class Moments:
    """Mean and covariance of features seen a batch at a time: the memory is (D, D), however many they are.

    Batches are joined by their own means (Chan et al. 1979): sums of squares would lose digits.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))
        """Sum over pictures of (feature - mean) (feature - mean)^T."""

    def add(self, features_ND: np.ndarray) -> None:
        """Take in more pictures, at least one."""
        features_ND = features_ND.astype(np.float64)
        mean = features_ND.mean(0)
        rows_ND = np.vstack([features_ND - mean, self._shifted(len(features_ND), mean)])
        self.scatter += rows_ND.T @ rows_ND

    def joined(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        both = Moments(len(self.mean))
        for one in (self, other):
            if one.count:
                row_D = both._shifted(one.count, one.mean)
                both.scatter += one.scatter
                both.scatter += np.outer(row_D, row_D)
        return both

    def covariance(self) -> np.ndarray:
        """Unbiased, (D, D). Raises ValueError for fewer than two pictures."""
        if self.count < 2:
            raise ValueError("a covariance needs two pictures")
        return self.scatter / (self.count - 1)

    def _shifted(self, count: int, mean: np.ndarray) -> np.ndarray:
        """Move the mean by `count` more pictures. Returns a row (D,) whose square the move adds to the scatter."""
        shift, total = mean - self.mean, self.count + count
        row_D = shift * np.sqrt(self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total
        return row_D


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): of two Gaussians, the squared 2-Wasserstein distance (FID).

    C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), whose roots are sums of real numbers: where
    covariances are singular, as with fewer pictures than features, nothing needs to be added to them.
    """
    first, second = one.covariance(), other.covariance()
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    crossed = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)).sum()
    apart = np.square(one.mean - other.mean).sum()
    return max(0.0, float(apart + np.trace(first) + np.trace(second) - 2 * crossed))


class KernelDistance(NamedTuple):
    """The mean over subsets, their standard deviation, their size, and a 95 % interval of the mean."""

    value: float
    deviation: float
    size: int
    interval: tuple[float, float]


def kernel_distance(one_ND: np.ndarray, other_ND: np.ndarray, seed: int) -> KernelDistance:
    """Kernel distance (KID): the unbiased squared MMD, a mean over 100 subsets drawn of both sets.

    Subsets have 1,000 pictures, and half of the smaller set where that is fewer. The interval is that of the jackknife
    that deletes many (Shao and Wu 1989): from subsets of M of N pictures, a deviation sqrt(M / (N - M)) times theirs.
    Raises ValueError for fewer than four pictures.
    """
    count = min(len(one_ND), len(other_ND))
    size = min(SUBSET_SIZE, count // 2)
    if size < 2:
        raise ValueError("a kernel distance needs four pictures")
    random = np.random.default_rng(seed)
    distances = [
        squared_mmd(*(features[random.choice(len(features), size, replace=False)] for features in (one_ND, other_ND)))
        for _ in range(SUBSETS)
    ]
    value, deviation = float(np.mean(distances)), float(np.std(distances))
    reach = 1.96 * deviation * np.sqrt(size / (count - size))
    return KernelDistance(value, deviation, size, (float(value - reach), float(value + reach)))


def squared_mmd(one_ND: np.ndarray, other_ND: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3; below 0 where sets are alike."""
    one_ND, other_ND = one_ND.astype(np.float64), other_ND.astype(np.float64)
    within = sum(_mean_of_pairs(_kernel(features, features)) for features in (one_ND, other_ND))
    return float(within - 2 * _kernel(one_ND, other_ND).mean())


def _kernel(one_ND: np.ndarray, other_ND: np.ndarray) -> np.ndarray:
    return (one_ND @ other_ND.T / one_ND.shape[1] + 1) ** 3


def _mean_of_pairs(kernel_NN: np.ndarray) -> float:
    """Mean over pairs of two different pictures."""
    count = len(kernel_NN)
    return float((kernel_NN.sum() - np.trace(kernel_NN)) / (count * (count - 1)))
