import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from lwfed.config import load_config
from lwfed.config.schema import SslSection
from lwfed.models.ssl import LOSSES
from lwfed.models.ssl.moco_v3 import info_nce


def vectors(count, seed, batch=7, width=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, width, generator=generator) for _ in range(count)]


def naive(q, k, tau):
    """The paper's formula, a sample at a time."""
    total = 0.0
    for i in range(len(q)):
        cosines = [float(q[i] @ k[j] / (q[i].norm() * k[j].norm())) for j in range(len(k))]
        total -= math.log(math.exp(cosines[i] / tau) / sum(math.exp(cosine / tau) for cosine in cosines))
    return total / len(q)


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_against_loops(tau):
    q, k = vectors(2, 0)
    assert info_nce(q, k, tau).item() == pytest.approx(naive(q, k, tau), rel=1e-5)


def test_against_cross_entropy():
    q, k = vectors(2, 1)
    logits = torch.stack([F.cosine_similarity(row[None], k) for row in q]) / 0.2
    torch.testing.assert_close(info_nce(q, k, 0.2), F.cross_entropy(logits, torch.arange(7)))


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_closed_forms(tau):
    same, orthogonal = torch.ones(6, 4), torch.eye(6)
    assert info_nce(same, same, tau).item() == pytest.approx(math.log(6), rel=1e-5)
    assert info_nce(3 * orthogonal, orthogonal, tau).item() == pytest.approx(math.log(1 + 5 * math.exp(-1 / tau)), abs=1e-6)
    worst = info_nce(orthogonal, orthogonal.roll(1, 0), tau).item()
    assert worst == pytest.approx(1 / tau + math.log(1 + 5 * math.exp(-1 / tau)), rel=1e-5)


def test_loss_is_symmetric_over_crossed_views():
    q1, q2, k1, k2 = vectors(4, 2)
    ssl = load_config("base").ssl
    loss = LOSSES["moco_v3"]
    assert loss((q1, q2), (k1, k2), ssl).item() == pytest.approx(naive(q1, k2, 0.05) + naive(q2, k1, 0.05), rel=1e-5)
    torch.testing.assert_close(loss((q1, q2), (k1, k2), ssl), loss((q2, q1), (k2, k1), ssl))


def test_gradient_is_finite_where_a_query_is_zero():
    q, k = vectors(2, 3)
    q[0] = 0
    info_nce(q.requires_grad_(), k, 0.05).backward()
    assert q.grad.isfinite().all()


def test_registry_holds_every_method_that_can_be_configured():
    assert set(LOSSES) == set(get_args(SslSection.model_fields["method"].annotation))
