import numpy as np
import pytest
import torch

from lwfed.errors import DataError
from lwfed.models.backbones import load_encoder
from lwfed.models.evaluate import features, knn_accuracy, probe_accuracy, raw_pixels
from lwfed.models.initial import init_parts


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs, labels = torch.from_numpy(data.data).float(), torch.from_numpy(data.target)
    return inputs[:400], labels[:400], inputs[400:900], labels[400:900]


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_knn_is_that_of_scikit_learn(digits, k):
    from sklearn.neighbors import KNeighborsClassifier

    bank, bank_labels, queries, labels = digits
    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: 1 - distance / 2)
    expected = reference.fit(bank.double(), bank_labels).score(queries.double(), labels)
    assert knn_accuracy(bank, bank_labels, queries, labels, k) == pytest.approx(expected, abs=0.004)


def test_knn_votes():
    """A majority wins over the nearest; with one vote each, the nearest wins."""
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    query, truth = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(bank, torch.tensor([1, 0, 0]), query, truth, 3) == 1
    assert knn_accuracy(bank, torch.tensor([0, 1, 2]), query, truth, 3) == 1
    assert knn_accuracy(bank, torch.tensor([1, 0, 0]), query, truth, 1) == 0
    assert knn_accuracy(bank, torch.tensor([1, 0, 0]), query, truth, 50) == 1


def test_probe_is_that_of_scikit_learn(digits):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    bank, bank_labels, queries, labels = digits
    scaler = StandardScaler().fit(bank)
    reference = LogisticRegression(max_iter=2000).fit(scaler.transform(bank), bank_labels)
    measured = probe_accuracy(bank, bank_labels, queries, labels)
    assert measured == pytest.approx(reference.score(scaler.transform(queries), labels), abs=0.005)
    assert measured == probe_accuracy(bank, bank_labels, queries, labels)


def test_probe_accepts_a_constant_feature():
    inputs, labels = torch.tensor([[0.0, 7.0], [1.0, 7.0]]).repeat(5, 1), torch.tensor([0, 1]).repeat(5)
    assert probe_accuracy(inputs, labels, inputs, labels) == 1.0


def test_a_class_that_the_bank_lacks_counts_as_wrong():
    inputs = torch.eye(3)
    known, labels = torch.tensor([0, 1]), torch.arange(3)
    assert knn_accuracy(inputs[:2], known, inputs, labels, 1) == pytest.approx(2 / 3)
    assert probe_accuracy(inputs[:2], known, inputs, labels) == pytest.approx(2 / 3)


@pytest.mark.parametrize("measure", [lambda *args: knn_accuracy(*args, k=5), probe_accuracy])
def test_without_images(measure):
    nothing, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    with pytest.raises(DataError, match="at least one"):
        measure(nothing, labels, torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))


def test_features_do_not_depend_on_the_batch(tiny, images):
    config = tiny()
    encoder = load_encoder(config.model, init_parts(config, config.plan(1).present))
    whole = features(encoder, images)
    assert whole.shape == (20, 16)
    torch.testing.assert_close(features(encoder, torch.from_numpy(images), batch_size=7), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, encoder(torch.from_numpy(images) / 255))


def test_raw_pixels(images):
    assert np.array_equal(raw_pixels(images).numpy(), images.reshape(20, -1) / np.float32(255))
