"""The built-in sample set: the same bytes for ever, and a class that neither colours nor position give away."""

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from sslpre.data.sample import CLASSES, COUNT, FINE, SIDE, draw, layout, sample

CHANCE = 1 / len(CLASSES)
TRAIN, TEST = 1600, 400  # with 400 test images, 1.8 times chance is five standard errors above chance


def digest(images: np.ndarray) -> str:
    return sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


def accuracies(train: np.ndarray, test: np.ndarray, train_labels: np.ndarray, test_labels: np.ndarray) -> list[float]:
    """Test accuracy of a logistic regression and of kNN on standardised features."""
    scaler = StandardScaler().fit(train)
    models = [LogisticRegression(C=0.1, max_iter=200), KNeighborsClassifier(20)]
    train, test = scaler.transform(train), scaler.transform(test)
    return [float(model.fit(train, train_labels).score(test, test_labels)) for model in models]


@pytest.fixture(scope="module")
def scenes() -> dict[str, np.ndarray]:
    found = sample(TRAIN, seed=0)
    assert found.test is not None
    return {
        "train": np.stack([found.train.read(i) for i in range(TRAIN)]),
        "test": np.stack([found.test.read(i) for i in range(TEST)]),
        "train_labels": found.train.labels,
        "test_labels": found.test.labels,
    }


def test_it_is_a_source_with_balanced_classes_and_a_test_split():
    found = sample()
    assert found.test is not None and (len(found.train), len(found.test)) == (COUNT, COUNT // 4)
    for split in (found.train, found.test):
        assert split.labels.dtype == np.int64 and split.labels.shape == (len(split),)
        assert np.bincount(split.labels).tolist() == [len(split) // len(CLASSES)] * len(CLASSES)
        assert split.classes == list(CLASSES)
        assert split.where == "the built-in sample set"
        names = [split.name(i) for i in range(len(split))]
        assert len(set(names)) == len(names)
        image = split.read(3, side=8)
        assert image.dtype == np.uint8 and image.shape == (SIDE, SIDE, 3) and split.size(3) == (SIDE, SIDE)
    assert found.train.name(13) == "train/horse/00013.png" and found.test.name(0) == "test/boat/00000.png"
    with pytest.raises(IndexError):
        found.train.read(COUNT)
    with pytest.raises(IndexError):
        found.train.size(COUNT)


def test_what_a_caller_does_to_an_image_stays_with_the_caller():
    train = sample(20).train
    first = train.read(0)
    before = digest(first)
    first[:] = 0
    assert digest(train.read(0)) == before


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**40), split=st.integers(0, 1), index=st.integers(0, 10**6))
def test_any_scene_can_be_drawn_and_is_drawn_alike_twice(seed: int, split: int, index: int):
    image = draw(seed, split, index)
    assert image.dtype == np.uint8 and image.shape == (SIDE, SIDE, 3)
    assert image.std() > 5  # not a blank
    assert np.array_equal(image, draw(seed, split, index))


def test_an_image_does_not_depend_on_the_count_the_order_or_the_thread():
    one_by_one = sample(40, seed=5).train
    other = sample(200, seed=5).train
    with ThreadPoolExecutor(4) as threads:
        images = list(threads.map(other.read, [*range(40), *range(39, -1, -1)]))
    for i in range(40):
        assert np.array_equal(images[i], one_by_one.read(i))
        assert np.array_equal(images[79 - i], one_by_one.read(i))


def test_a_fresh_process_draws_the_same_bytes(child):
    code = (
        "import hashlib, numpy; from sslpre.data.sample import draw;"
        "print(hashlib.sha256(numpy.stack([draw(7, 0, i) for i in range(30)]).tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], env=child, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(np.stack([draw(7, 0, i) for i in range(30)]))


def test_seeds_splits_and_indices_are_different_draws(scenes):
    images = [*scenes["train"], *scenes["test"], *(draw(1, split, i) for split in (0, 1) for i in range(100))]
    assert len({digest(image) for image in images}) == len(images)


def test_the_fingerprint_tells_seed_count_and_split():
    founds = [sample(count, seed) for count, seed in itertools.product((40, 80), (0, 1))]
    prints = [split.fingerprint for found in founds for split in (found.train, found.test)]
    assert len(set(prints)) == len(prints)
    assert all(int(text, 16) >= 0 for text in prints)
    assert sample(40, 1).train.fingerprint == sample(40, 1).train.fingerprint


def test_colours_do_not_give_the_class(scenes):
    """A 64-bin colour histogram, and the mean and spread of each channel: within 1.8 times chance."""

    def histogram(images: np.ndarray) -> np.ndarray:
        bins = (images.astype(np.int64) // 64) @ np.array([16, 4, 1])
        return np.stack([np.bincount(b.ravel(), minlength=64) for b in bins]) / SIDE**2

    def moments(images: np.ndarray) -> np.ndarray:
        return np.concatenate([images.mean((1, 2)), images.std((1, 2))], 1)

    for features in (histogram, lambda images: np.sqrt(histogram(images)), moments):
        seen = [features(scenes[split]) for split in ("train", "test")]
        found = accuracies(*seen, scenes["train_labels"], scenes["test_labels"])
        assert max(found) < 1.8 * CHANCE, found


def test_the_box_of_the_object_does_not_give_the_class():
    """Left, top, right and bottom of all its parts together, and their area: of what can be seen in the picture."""

    def boxes(split: int, count: int) -> np.ndarray:
        rows = []
        for i in range(count):
            u = iter(np.random.default_rng([9, split, i]).random(256).tolist()).__next__
            outlines = np.clip(np.concatenate([outline for outline, _ in layout(u, i % len(CLASSES))[2]]), 0, FINE)
            low, high = outlines.min(0), outlines.max(0)
            rows.append([*low, *high, *(high - low)])
        return np.array(rows)

    labels = np.arange(TRAIN) % len(CLASSES)
    found = accuracies(boxes(0, TRAIN), boxes(1, TEST), labels, labels[:TEST])
    assert max(found) < 1.8 * CHANCE, found


def test_the_pixels_themselves_give_the_class_only_in_part(scenes):
    """Above chance, for the class is in the picture; far below what a trained encoder's features reach."""
    small = [scenes[k].reshape(-1, 32, 2, 32, 2, 3).mean((2, 4)).reshape(-1, 3072) for k in ("train", "test")]
    scaler = StandardScaler().fit(small[0])
    train, test = (scaler.transform(images) for images in small)
    kernel = train @ train.T + 3e4 * np.eye(TRAIN)  # ridge regression on the one-hot labels, in its dual form
    scores = test @ train.T @ np.linalg.solve(kernel, np.eye(len(CLASSES))[scenes["train_labels"]])
    accuracy = float((scores.argmax(1) == scenes["test_labels"]).mean())
    assert 1.2 * CHANCE < accuracy < 0.4, accuracy


def test_up_can_be_seen(scenes):
    """The sky is brighter than the ground, and objects are brighter above than below."""
    grey = scenes["train"].mean(3)
    assert (grey[:, :12].mean((1, 2)) > grey[:, -12:].mean((1, 2)) + 10).mean() > 0.9
    left, right = grey[:, :, :12].mean((1, 2)), grey[:, :, -12:].mean((1, 2))
    assert 0.4 < (left > right).mean() < 0.6  # but nothing tells left from right


def test_colour_follows_texture(scenes):
    """Red minus blue can be guessed from the grey picture around a pixel, and from its texture more than its shade."""
    images = scenes["train"].astype(np.float64)
    grey = images @ np.array([0.299, 0.587, 0.114])
    rng = np.random.default_rng(0)
    n, y, x = rng.integers(0, TRAIN, 6000), rng.integers(4, SIDE - 4, 6000), rng.integers(4, SIDE - 4, 6000)
    around = np.stack([grey[n, y + dy, x + dx] for dy in range(-4, 5) for dx in range(-4, 5)], 1)
    mean = around.mean(1, keepdims=True)
    texture = np.abs(np.fft.rfft2((around / mean - 1).reshape(-1, 9, 9))).reshape(len(n), -1)
    colour = images[n, y, x, 0] - images[n, y, x, 2]

    def told(*features: np.ndarray) -> float:
        """Share of the variance of the colour that these explain on pixels not seen (R²)."""
        table = np.column_stack(features)
        forest = RandomForestRegressor(20, min_samples_leaf=5, random_state=0).fit(table[:4000], colour[:4000])
        return float(forest.score(table[4000:], colour[4000:]))

    assert told(mean, y, texture) > told(mean, y) + 0.1


def test_the_box_is_drawn_without_regard_to_the_class():
    """With the same numbers all classes have the same horizon and shadow, and different parts."""
    layouts = [layout(iter(np.random.default_rng(3).random(256).tolist()).__next__, k) for k in range(len(CLASSES))]
    assert len({horizon for horizon, _, _ in layouts}) == 1
    assert len({digest(shadow) for _, shadow, _ in layouts}) == 1
    assert len({digest(np.concatenate([outline for outline, _ in parts])) for _, _, parts in layouts}) == len(CLASSES)


@settings(max_examples=50, deadline=None)
@given(kind=st.integers(0, len(CLASSES) - 1), seed=st.integers(0, 10**6))
def test_every_object_fills_its_unit_square(kind: int, seed: int):
    """No class can be told by how much of its box it leaves empty at a side."""
    parts = list(CLASSES.values())[kind](iter(np.random.default_rng(seed).random(64).tolist()).__next__)
    outlines = np.concatenate([outline for outline, _ in parts])
    assert np.all(np.abs(outlines.min(0)) < 0.13) and np.all(np.abs(outlines.max(0) - 1) < 0.13)
    assert {slot for _, slot in parts} == {0, 1, 2}
