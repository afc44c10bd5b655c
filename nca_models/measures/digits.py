"""How well digits come through: whether they arrive, and what a classifier reads them as."""

from collections.abc import Callable

import numpy as np

from nca_models.data.digits import Digits

CLASSES = 10
_MOST = 10_000  # digits that the classifier is trained on: its time grows with their square


def classifier(data: Digits) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that tells the digits of images `[n, size, size]`, as `[n]` int.

    It is scikit-learn's support vector machine (`SVC`, radial kernel), trained on the first 10,000
    of `data.train_images`: it has seen neither the test digits nor anything that an automaton made.
    """
    from sklearn.svm import SVC

    machine = SVC(C=10.0, gamma="scale")
    machine.fit(_rows(data.train_images[:_MOST]), data.train_labels[:_MOST])
    return lambda images: np.asarray(machine.predict(_rows(images)))


def _rows(images: np.ndarray) -> np.ndarray:
    """Images `[n, size, size]` as `[n, size * size]`, every pixel from 0 to 1."""
    clean = np.clip(np.nan_to_num(np.asarray(images, np.float32)), 0, 1)
    return clean.reshape(len(clean), -1)


def arrived(results: np.ndarray, images: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Tell of each result whether it shows its digit, `[n]` bool.

    It does if its squared error is less than half as large as those of the mean digit and of a
    blank: so neither a blank face nor the same picture for all digits counts.

    Args:
        results: what was to become `images`, `[n, size, size]`.
        images: the digits, `[n, size, size]`.
        mean: the mean of all digits that were trained on, `[size, size]`.
    """

    def distance(guess: np.ndarray) -> np.ndarray:
        return np.square(np.asarray(guess) - images).sum(axis=(1, 2))

    rivals = np.minimum(distance(mean), distance(np.zeros_like(mean)))
    shown: np.ndarray = distance(results) < rivals / 2
    return shown


def percent(flags: np.ndarray) -> float:
    """Return the share of true values, in percent; NaN if there are none at all."""
    return 100 * float(np.mean(flags)) if len(flags) else float("nan")
