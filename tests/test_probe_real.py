"""The probe on real photos: for tests marked `data`. SSLPRE_TEST_DATA names <set>/{train,test}/<class>/*.jpg."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sslpre.data.find import find, subset
from sslpre.encoder import build
from sslpre.probe import centres, labelled, linear, probe
from sslpre.probe.features import extract, layout


def part(source, per_class):
    """The first `per_class` images of every class."""
    return subset(source, np.concatenate([np.flatnonzero(source.labels == i)[:per_class] for i in range(10)]))


@pytest.fixture
def cifar(real_data):
    """600 training and 300 test images of CIFAR-10."""
    found = find(real_data / "cifar10")
    assert len(found.train.classes) == 10
    return part(found.train, 60), part(found.test, 30)


@pytest.fixture
def network():
    torch.manual_seed(0)
    encoder = build("test_resnet", image_size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return encoder.eval()


@pytest.mark.data
def test_raw_pixels_of_photos_are_above_chance(cifar, network):
    report = probe(network, *cifar, side=32, linear=True, knn=True, workers=2)
    assert (report.train_images, report.test_images, report.chance) == (600, 300, 0.1)
    assert report.last("raw pixels").linear.low > report.chance
    assert report.last("raw pixels").knn.low > report.chance
    assert not report.beats()["linear"]["random weights"], "the encoder has random weights itself"
    assert not any("pixel for pixel" in note for note in report.warnings)


@pytest.mark.data
def test_linear_agrees_with_scikit_learn_on_photos(cifar, network):
    data = labelled(*cifar, seed=0)
    plan = layout(network)
    wanted = [(network, tuple(range(len(plan.names))))]
    (train, raw), (test, raw_test) = (
        extract(wanted, plan, part, True) for part in centres(data, 32, 32, torch.device("cpu"), 2, 0.0)
    )
    pairs = dict(zip(plan.names, zip(train[0], test[0], strict=True), strict=True))
    y, y_test = torch.from_numpy(data.train_labels), torch.from_numpy(data.test_labels)
    for name, (x, x_test) in {"raw pixels": (raw, raw_test), **pairs}.items():
        fit, _ = linear.search(x, y, 10, seed=0)
        standard, standard_test = (((one.double() - fit.mean) / fit.std).numpy() for one in (x, x_test))
        theirs = LogisticRegression(C=fit.strength, tol=1e-6, max_iter=20_000).fit(standard, y.numpy())
        ours = (fit.predict(x_test) == y_test).double().mean().item()
        assert abs(ours - theirs.score(standard_test, y_test.numpy())) <= 0.005, name
