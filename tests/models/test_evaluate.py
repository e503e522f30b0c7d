import warnings

import numpy as np
import pytest
import torch

from lwfed.config import load_config
from lwfed.data.load import labelled_images
from lwfed.data.torchvision_sets import import_torchvision
from lwfed.errors import DataError
from lwfed.models.backbones import load_encoder
from lwfed.models.evaluation import finetune
from lwfed.models.evaluation.classifiers import knn, linear_probe
from lwfed.models.evaluation.collapse import collapsed, variety
from lwfed.models.evaluation.features import features, raw_pixels
from lwfed.models.evaluation.metrics import metrics
from lwfed.models.initial import init_parts


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs, labels = torch.from_numpy(data.data).float(), torch.from_numpy(data.target)
    return inputs[:400], labels[:400], inputs[400:900], labels[400:900]


def accuracy(predicted, labels):
    return (predicted == labels).double().mean().item()


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_knn_is_that_of_scikit_learn(digits, k):
    from sklearn.neighbors import KNeighborsClassifier

    bank, bank_labels, queries, _ = digits
    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = reference.fit(bank.double(), bank_labels).predict(queries.double())
    assert accuracy(knn(bank, bank_labels, queries, k), torch.from_numpy(expected)) > 0.99


def test_knn_is_a_vote_of_the_nearest(digits):
    bank, bank_labels, queries, _ = (part[:60] for part in digits)
    for query, found in zip(queries, knn(bank, bank_labels, queries, 7), strict=True):
        cosines = [(torch.dot(one, query) / (one.norm() * query.norm())).item() for one in bank]
        votes = [0.0] * 10
        for place in sorted(range(len(bank)), key=lambda place: -cosines[place])[:7]:
            votes[bank_labels[place]] += np.exp(cosines[place] / 0.07)
        assert found == int(np.argmax(votes))


def test_knn_weighs_by_nearness():
    """Two that are near enough win over one that is nearest; three that are far do not."""
    bank = torch.tensor([[1.0, 0.0], [0.999, 0.0447], [0.999, -0.0447], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    query, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([1, 0, 0, 2, 2, 2])
    assert knn(bank, labels, query, 3) == 0
    assert knn(bank, labels, query, 1) == 1
    assert knn(bank, labels, query, 6) == 0
    assert knn(bank, labels, query, 50) == 0
    assert knn(torch.eye(2), torch.tensor([1, 0]), torch.ones(1, 2), 2) == 0, "equal votes go to the smaller label"


def test_probe_is_that_of_scikit_learn(digits):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    bank, bank_labels, queries = digits[0][:40], digits[1][:40], digits[2]  # few, so that the penalty counts
    scaler = StandardScaler().fit(bank)
    reference = LogisticRegression(max_iter=5000, tol=1e-8).fit(scaler.transform(bank), bank_labels)
    found = linear_probe(bank, bank_labels, queries)
    assert accuracy(found, torch.from_numpy(reference.predict(scaler.transform(queries)))) > 0.995
    assert torch.equal(found, linear_probe(bank, bank_labels, queries))


def test_probe_accepts_a_constant_feature():
    inputs, labels = torch.tensor([[0.0, 7.0], [1.0, 7.0]]).repeat(5, 1), torch.tensor([0, 1]).repeat(5)
    assert torch.equal(linear_probe(inputs, labels, inputs), labels)


def test_a_class_that_the_bank_lacks_is_never_predicted():
    inputs, known = torch.eye(3), torch.tensor([0, 1])
    for found in (knn(inputs[:2], known, inputs, 1), linear_probe(inputs[:2], known, inputs)):
        assert found[:2].tolist() == [0, 1]
        assert found[2] < 2


@pytest.mark.parametrize("measure", [lambda *given: knn(*given, k=5), linear_probe])
def test_without_images(measure):
    nothing, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    with pytest.raises(DataError, match="at least one"):
        measure(nothing, labels, torch.zeros(3, 4))


@pytest.mark.parametrize("seed", range(6))
def test_metrics_are_those_of_scikit_learn(seed):
    """Of uneven classes, some of which are never predicted and some of which are not there."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_recall_fscore_support

    generator = np.random.default_rng(seed)
    labels = generator.choice(6, 40, p=[0.5, 0.2, 0.2, 0.1, 0, 0])
    predicted = np.where(generator.random(40) < 0.6, labels, generator.choice([0, 1, 2, 4], 40))
    found = metrics(torch.from_numpy(predicted), torch.from_numpy(labels))
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    assert (found.accuracy, found.precision, found.recall, found.f1) == pytest.approx(
        (accuracy_score(labels, predicted), precision, recall, f1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are predicted and not there
        assert found.class_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_variety_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    every = torch.randn(4000, 16, generator=generator)
    assert variety(every).spread == pytest.approx(1, abs=0.01)
    assert variety(every).rank == pytest.approx(16, abs=0.1)
    four = torch.cat([every[:, :4], torch.zeros(4000, 12)], dim=1)
    assert variety(four).rank == pytest.approx(4, abs=0.1)


def test_features_that_are_all_alike_have_collapsed():
    generator = torch.Generator().manual_seed(0)
    constant = torch.randn(1, 32, generator=generator).expand(200, -1)
    rounding = constant * (1 + 1e-6 * torch.randn(200, 32, generator=generator))
    line = torch.randn(200, 1, generator=generator) * torch.randn(1, 32, generator=generator) + 5
    for features_ in (constant, rounding, line, torch.zeros(200, 32), torch.full((200, 32), torch.nan)):
        assert collapsed(variety(features_))


@pytest.mark.parametrize("preset", ["demo", "base", "bloodcells", "mobilenet"])
def test_an_untrained_encoder_has_not_collapsed(preset):
    config = load_config(preset)
    images = labelled_images(load_config("demo", [f"model={{image_size: {config.model.image_size}, patch_size: 4}}"])).pixels[:100]
    tensors = init_parts(config, config.plan(config.stage_count).present)
    assert not collapsed(variety(features(load_encoder(config.model, tensors), images)))


def test_features_do_not_depend_on_the_batch(tiny, images):
    config = tiny()
    encoder = load_encoder(config.model, init_parts(config, config.plan(1).present))
    whole = features(encoder, images)
    assert whole.shape == (20, 16)
    torch.testing.assert_close(features(encoder, torch.from_numpy(images), batch_size=7), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, encoder(torch.from_numpy(images) / 255))


def test_raw_pixels(images):
    assert np.array_equal(raw_pixels(images).numpy(), images.reshape(20, -1) / np.float32(255))


def test_fine_tuning_is_set_as_in_the_paper(tiny, images, monkeypatch):
    """arXiv 2401.11647, section 4.1."""
    import_torchvision()
    assert (finetune.EPOCHS, finetune.BATCH_SIZE, finetune.WEIGHT_DECAY) == (40, 256, 1e-5)
    rates = [finetune._lr(epoch / 40) for epoch in (0, 5, 10, 25, 40)]
    assert rates == pytest.approx([0, 0.5e-3, 1e-3, 0.5e-3, 0], abs=1e-9)
    seen, augment = [], finetune._rand_augment()

    def watched(image):
        seen.append(augment(image))
        return seen[-1]

    monkeypatch.setattr(finetune, "_rand_augment", lambda: watched)
    config, shown = tiny(), torch.from_numpy(images)
    tensors = init_parts(config, ["stem", "layer.1", "norm"])
    finetune.finetune(config.model, tensors, finetune.Labelled(shown, torch.arange(20) % 2), shown, 0, 2)
    assert len(seen) == 40
    assert not torch.equal(torch.stack(seen[:20]).sort(0).values, shown.sort(0).values)


def test_fine_tuning_learns_and_leaves_the_encoder_alone(tiny, monkeypatch):
    """Which half of an image is bright, the left one or the upper one."""
    import_torchvision()
    monkeypatch.setattr(finetune, "BATCH_SIZE", 16)
    monkeypatch.setattr(finetune, "LR", 5e-3)
    labels = torch.arange(96) % 2
    shown = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (96, 3, 8, 8), dtype=np.uint8))
    shown[labels == 0, :, :, :4] += 150
    shown[labels == 1, :, :4] += 150
    config = tiny("stages.strategy=end_to_end")
    tensors = init_parts(config, ["stem", "layer.1", "layer.2", "layer.3", "norm"])
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    losses = []
    found = finetune.finetune(
        config.model, tensors, finetune.Labelled(shown[:64], labels[:64]), shown[64:], 0, 25, lambda _, loss: losses.append(loss)
    )
    assert accuracy(found, labels[64:]) > 0.75
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
