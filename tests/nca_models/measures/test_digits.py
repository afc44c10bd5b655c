"""Measures of digits, on digits whose fate is known."""

import numpy as np
import pytest

from nca_models.data.digits import digits
from nca_models.measures.digits import arrived, classifier, percent


@pytest.fixture(scope="module")
def data():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    return digits(8)


def test_the_classifier_reads_digits_that_it_never_saw(data):
    read = classifier(data)
    assert percent(read(data.test_images) == data.test_labels) > 93


def test_the_classifier_reads_nothing_from_blanks_and_nan(data):
    read = classifier(data)
    for value in (0.0, np.nan):
        guesses = read(np.full_like(data.test_images, value))
        assert len(set(guesses.tolist())) == 1  # the same for all: about a tenth is right
        assert percent(guesses == data.test_labels) < 20


def test_what_arrives(data):
    images, mean = data.test_images[:50], data.train_images.mean(0)
    assert arrived(images, images, mean).all()
    assert arrived(0.8 * images + 0.05, images, mean).all()  # a little faint, with a grey ground
    assert not arrived(np.zeros_like(images), images, mean).any()
    assert not arrived(np.broadcast_to(mean, images.shape), images, mean).any()
    assert not arrived(0.9 * mean + 0.1 * images, images, mean).any()  # hardly more than the mean
    assert not arrived(np.full_like(images, np.nan), images, mean).any()
    other = arrived(np.roll(images, 1, axis=0), images, mean)  # each shows the next one's digit
    assert percent(other) < 20


def test_percent():
    assert percent(np.array([True, False, True, True])) == 75
    assert np.isnan(percent(np.array([], bool)))
