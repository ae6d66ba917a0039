"""How far readings of pairs are off at the corners, and what their doubts are worth."""

import math

import numpy as np
from scipy.special import ndtr

from cldm.changes import MOTIONS, NO_CHANGE, similarity
from cldm.pairs import CORNERS

LIMITS = 1, 3, 5  # pixels, of areas under the error curve and of success
DRAWS = 1000  # of a posterior, for TARP


def corner_distances(found, change, size):
    """Returns: (4,) distances in pixels of a square's corners from where they belong, by two changes {name: number}."""
    here, there = (similarity(*((NO_CHANGE | own)[name] for name in MOTIONS)) @ CORNERS for own in (found, change))
    return size * np.linalg.norm((here - there)[:2], axis=0)


def corner_error(found, change, size):
    """Returns: their mean."""
    return corner_distances(found, change, size).mean()


def corner_spread(found, covariance, size):
    """Returns: the root mean square error in pixels that a covariance (6, 6), of CHANGES, expects of the corners."""
    found = NO_CHANGE | found
    x, y, _ = similarity(found["rotation"], 1.0, 0.0, 0.0) @ CORNERS
    turn, zero, one = found["zoom"] * math.radians(1), np.zeros(4), np.ones(4)
    jacobian = np.array([[turn * y, x, one, zero], [-turn * x, y, zero, one]])  # (2, 4 numbers, 4 corners)
    return size * math.sqrt(np.einsum("ikc,kl,ilc->", jacobian, np.asarray(covariance)[:4, :4], jacobian) / 4)


def area_under(errors, limit):
    """Returns: the area, of at most 1, under the share of errors below a limit, from none to `limit`."""
    return np.clip(1 - np.asarray(errors) / limit, 0, 1).mean()


def risk_curve(errors, doubts):
    """Returns: (N,), mean errors of the 1, 2, … N pairs that are doubted least. Source: Geifman & El-Yaniv 2017."""
    order = np.argsort(doubts, kind="stable")
    return np.asarray(errors)[order].cumsum() / np.arange(1, len(order) + 1)


def ranks(errors, covariances):
    """Ranks of the truth among draws of normal posteriors, uniform from 0 to 1 if these are right.

    errors: (N, 6). covariances: (N, 6, 6). Returns: (N, 6), of infinitely many draws; nan for what was known.
    Source: Talts et al. 2018, simulation-based calibration.
    """
    variance = np.diagonal(covariances, axis1=1, axis2=2)
    return ndtr(-np.asarray(errors) / np.sqrt(np.where(variance > 0, variance, np.nan)))


def distance_ranks(errors, covariances, truths, rng, goes_round=False):
    """Shares of draws of normal posteriors nearer to a random place than the truth is; uniform if these are right.

    errors, truths: (N, d), in units of the ranges, from 0 to 1. covariances: (N, d, d). rng: numpy's.
    goes_round: (d,) bool, numbers whose range is a circle, on which the short way counts.
    Returns: (N,). Source: Lemos et al. 2023, TARP.
    """
    shares = []
    for error, covariance, truth in zip(errors, covariances, truths):
        place = rng.uniform(size=len(truth))
        draws = rng.multivariate_normal(truth + error, covariance, DRAWS, method="eigh")
        gaps = np.vstack([truth, draws]) - place
        distance = np.linalg.norm(np.where(goes_round, gaps - gaps.round(), gaps), axis=1)
        shares.append((distance[1:] < distance[0]).mean())
    return np.array(shares)


def middle_shares(ranks):
    """Returns: the shares of ranks in the middle 50% and 90%, and their mean; of right ones 0.5, 0.9 and 0.5."""
    away = 2 * np.abs(ranks - 0.5)
    return (away <= 0.5).mean(), (away <= 0.9).mean(), ranks.mean()
