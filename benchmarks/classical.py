"""What one would reach for without a model: registration by features, spectra and intensities, and a fit of the light.

Every method is a function(reference, target, sought) -> Answer; pictures are PIL's, of SIZE pixels a side, and what is
not sought is known not to change. Pixels' centres have whole coordinates, as OpenCV and scikit-image have them.
"""

import contextlib
import math
from dataclasses import dataclass, field

import cv2
import numpy as np
from skimage.filters import difference_of_gaussians, window
from skimage.registration import phase_cross_correlation
from skimage.transform import EuclideanTransform, SimilarityTransform, warp, warp_polar

from benchmarks.common import decompose
from benchmarks.doubt import corner_spread
from cldm.changes import MOTIONS, NO_CHANGE, similarity
from cldm.fit import Fit

SIZE = 128  # pixels
PIXELS = np.array([[1 / SIZE, 0, 0.5 / SIZE - 0.5], [0, 1 / SIZE, 0.5 / SIZE - 0.5], [0, 0, 1]])  # to positions
RATIO = 0.8  # of the distances to the nearest and the second feature: Lowe's test
INLIER = 1.5  # pixels
LEVELS = 4, 3, 2, 1  # of ECC's pyramids, when it starts from no change
FIRST_BLUR = 0.7  # pixels from which a blur is fitted, since a fit's derivative at 0 is 0


@dataclass
class Answer:
    found: dict  # {name: number}, of what the method reads
    doubt: float | None = None  # larger where it is less sure, in whatever unit
    covariance: list | None = None  # (6, 6), of the errors of CHANGES; 0 for what is known
    flags: list = field(default_factory=list)


def gray(picture):
    return np.asarray(picture.convert("L"), np.float32) / 255


def from_pixels(matrix):
    """matrix: (3, 3), from pixels of the target to those of the reference. Returns: {name: number} of MOTIONS."""
    return decompose(PIXELS @ np.linalg.inv(matrix) @ np.linalg.inv(PIXELS))


def to_pixels(motion):
    """motion: {name: number}. Returns: (2, 3), from pixels of the target to those of the reference."""
    matrix = similarity(*(motion[name] for name in MOTIONS))
    return (np.linalg.inv(PIXELS) @ np.linalg.inv(matrix) @ PIXELS)[:2]


def ascend(reference, target, sought, start, levels):
    """Returns: the correlation that OpenCV's ECC reaches from a motion, {name: number}, and the motion; -1: none.

    The motion is the simplest of OpenCV's that holds what is sought.
    """
    options, matrix = cv2.ECCParameters(), to_pixels(start).astype(np.float32)
    options.motionType = cv2.MOTION_AFFINE if "zoom" in sought else cv2.MOTION_EUCLIDEAN
    options.nlevels = levels
    with contextlib.suppress(cv2.error):  # where it does not converge
        correlation, matrix = cv2.findTransformECCMultiScale(gray(target), gray(reference), matrix, options)
        if np.linalg.det(matrix[:, :2]) > 0:  # else it mirrors
            return correlation, from_pixels(np.vstack([matrix, [0, 0, 1]]).astype(float))
    return -1.0, start


def ecc(reference, target, sought, starts=()):
    """OpenCV's enhanced correlation coefficient over pyramids; its doubt is what the correlation lacks of 1.

    The best of pyramids of several heights is taken, since the tallest often does not converge on pictures this small;
    starts: further motions to start from, without a pyramid.
    """
    ways = [(NO_CHANGE, levels) for levels in LEVELS] + [(start, 1) for start in starts]
    found = [ascend(reference, target, sought, *way) for way in ways]
    correlation, motion = max(found, key=lambda result: result[0])
    return Answer(motion, 1 - correlation)


def log_polar(reference, target, sought):
    """Phase correlation of log-polar spectra for rotation and zoom, then of pictures for the shift (scikit-image).

    Spectra are normalised at every radius, which did best on training photographs. Its doubt is scikit-image's error
    of the second correlation.
    """
    pictures, radius, turns, radii = [gray(picture) for picture in (reference, target)], SIZE // 2, 720, 2 * SIZE
    spectra = []
    for picture in pictures:
        filtered = difference_of_gaussians(picture, 1, 5) * window("hann", picture.shape)
        spectrum = np.abs(np.fft.fftshift(np.fft.fft2(filtered)))
        polar = warp_polar(spectrum, radius=radius, output_shape=(turns, radii), scaling="log", order=1)[: turns // 2]
        spectra.append((polar - polar.mean(0)) / (polar.std(0) + 1e-6))
    (turn, scale), *_ = phase_cross_correlation(*spectra, upsample_factor=20, normalization=None)
    angle = (turn * 360 / turns + 90) % 180 - 90
    zoom = math.exp(scale * math.log(radius) / radii) if "zoom" in sought else 1.0
    middle = (SIZE - 1) / 2
    center = SimilarityTransform(translation=(-middle, -middle))
    turned = EuclideanTransform(rotation=math.radians(angle)) + SimilarityTransform(scale=1 / zoom)
    back = center + turned + center.inverse  # from the target's pixels to the reference's, but for the shift
    hann = window("hann", pictures[0].shape)
    moved = warp(pictures[0], back, mode="reflect") * hann
    (down, right), error, _ = phase_cross_correlation(pictures[1] * hann, moved, upsample_factor=20)
    shift = SimilarityTransform(translation=(-right, -down))
    return Answer(from_pixels((shift + back).params), float(error))


def sift(reference, target, sought, magsac=False):
    """SIFT features, matched and given to RANSAC for a similarity, or to MAGSAC++ for an affine map.

    Of the inliers, the similarity of least squares is taken; where only a rotation is sought, that about the middle.
    The doubt falls with the number of inliers.
    """
    detector = cv2.SIFT_create(contrastThreshold=0.01)
    (points, features), (others, theirs) = (
        detector.detectAndCompute(np.asarray(picture.convert("L")), None) for picture in (target, reference)
    )
    none = Answer({name: NO_CHANGE[name] for name in MOTIONS}, math.inf)
    if len(points) < 3 or len(others) < 3:
        return none
    nearest = cv2.BFMatcher().knnMatch(features, theirs, 2)
    good = [first for first, second in nearest if first.distance < RATIO * second.distance]
    here = np.array([points[match.queryIdx].pt for match in good]).reshape(-1, 2)
    there = np.array([others[match.trainIdx].pt for match in good]).reshape(-1, 2)
    inside = None
    if len(good) >= 3:
        estimate = cv2.estimateAffine2D if magsac else cv2.estimateAffinePartial2D
        method = cv2.USAC_MAGSAC if magsac else cv2.RANSAC
        _, inside = estimate(here, there, method=method, ransacReprojThreshold=INLIER, maxIters=5000)
    if inside is None or (count := int(inside.sum())) < 3:
        return none
    here, there = (part[inside[:, 0] > 0] for part in (here, there))
    if sought == ["rotation"]:
        a, b = ((part - (SIZE - 1) / 2) @ [1, 1j] for part in (here, there))  # as complex numbers
        return Answer(none.found | {"rotation": math.degrees(np.angle((a.conj() * b).sum()))}, 1 / count)
    fitted = (SimilarityTransform if "zoom" in sought else EuclideanTransform).from_estimate(here, there)
    return Answer(from_pixels(fitted.params), 1 / count) if fitted else none


def fit_all(fit, start, sought):
    """Go on from a change with a Fit. Returns: an Answer, whose doubt is what the covariance expects of the corners."""
    change, _, covariance = fit.solve(start, sought)
    spread = corner_spread(change, covariance, SIZE)
    return Answer({name: change[name] for name in sought}, spread, covariance.tolist())


def start_motions(reference, target, sought):
    return [read(reference, target, sought).found for read in (sift, log_polar)]


def chain(reference, target, sought, joint=True):
    """The best chain of classical tools: places to start from, ECC, a fit of the light, all numbers together at last.

    ECC starts from no change, SIFT's motion and the spectra's. With its motion and each of these, exposure and blur are
    fitted; the best fit goes on. joint: whether all numbers are fitted together at last; without, the doubt is the
    fit's loss.
    """
    fit, starts = Fit(reference, target), start_motions(reference, target, sought)
    light = [name for name in sought if name not in MOTIONS]
    fits = []
    for motion in (ecc(reference, target, sought, starts).found, *starts):
        known = {name: none for name, none in NO_CHANGE.items() if name not in sought}
        start = NO_CHANGE | motion | known | ({"blur": FIRST_BLUR} if light else {})
        fits.append(fit.solve(start, light or sought))
    change, loss, _ = min(fits, key=lambda own: own[1])
    if not joint:
        return Answer({name: change[name] for name in sought}, loss)
    return fit_all(fit, change, sought)
