"""Every loss against loops, a closed form and, where it has one, an independent library."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lwfed.config import load_config
from lwfed.config.schema import SslSection
from lwfed.models.ssl import METHODS, alignment
from lwfed.models.ssl.byol import negative_cosine
from lwfed.models.ssl.mae import normalised, patches, reconstruction
from lwfed.models.ssl.moco_v3 import info_nce
from lwfed.models.ssl.simclr import nt_xent
from lwfed.plan import HEADS

SSL = load_config("base").ssl


def vectors(count, seed, batch=7, width=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, width, generator=generator) for _ in range(count)]


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def naive_info_nce(q, k, tau):
    """The paper's formula, a sample at a time."""
    total = 0.0
    for i in range(len(q)):
        total -= math.log(math.exp(cosine(q[i], k[i]) / tau) / sum(math.exp(cosine(q[i], key) / tau) for key in k))
    return total / len(q)


def naive_nt_xent(z1, z2, tau):
    both = [*z1, *z2]
    total = 0.0
    for i, mine in enumerate(both):
        partner = both[(i + len(z1)) % len(both)]
        others = sum(math.exp(cosine(mine, other) / tau) for j, other in enumerate(both) if j != i)
        total -= math.log(math.exp(cosine(mine, partner) / tau) / others)
    return total / len(both)


class Predictor(nn.Module):
    """A network whose P halves and turns what it gets."""

    def __init__(self):
        super().__init__()
        self.predictor = nn.Linear(5, 5, bias=False)
        with torch.no_grad():
            self.predictor.weight.copy_(torch.eye(5).roll(1, 0) / 2)


def test_every_method_that_can_be_configured_is_there_and_has_heads():
    assert set(METHODS) == set(get_args(SslSection.model_fields["method"].annotation)) == set(HEADS)


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_info_nce_against_loops(tau):
    q, k = vectors(2, 0)
    assert info_nce(q, k, tau).item() == pytest.approx(naive_info_nce(q, k, tau), rel=1e-5)


def test_info_nce_against_cross_entropy():
    q, k = vectors(2, 1)
    logits = torch.stack([F.cosine_similarity(row[None], k) for row in q]) / 0.2
    torch.testing.assert_close(info_nce(q, k, 0.2), F.cross_entropy(logits, torch.arange(7)))


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_info_nce_closed_forms(tau):
    same, orthogonal = torch.ones(6, 4), torch.eye(6)
    assert info_nce(same, same, tau).item() == pytest.approx(math.log(6), rel=1e-5)
    assert info_nce(3 * orthogonal, orthogonal, tau).item() == pytest.approx(math.log(1 + 5 * math.exp(-1 / tau)), abs=1e-6)
    worst = info_nce(orthogonal, orthogonal.roll(1, 0), tau).item()
    assert worst == pytest.approx(1 / tau + math.log(1 + 5 * math.exp(-1 / tau)), rel=1e-5)


def test_gradient_is_finite_where_a_query_is_zero():
    q, k = vectors(2, 3)
    q[0] = 0
    info_nce(q.requires_grad_(), k, 0.05).backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_nt_xent_against_loops(tau):
    z1, z2 = vectors(2, 4)
    assert nt_xent(z1, z2, tau).item() == pytest.approx(naive_nt_xent(z1, z2, tau), rel=1e-5)


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_nt_xent_closed_forms(tau):
    same, orthogonal = torch.ones(6, 4), torch.eye(6)
    assert nt_xent(same, same, tau).item() == pytest.approx(math.log(11), rel=1e-5)
    assert nt_xent(orthogonal, 2 * orthogonal, tau).item() == pytest.approx(math.log(1 + 10 * math.exp(-1 / tau)), abs=1e-6)


def test_byol_against_loops_and_the_squared_distance():
    q, k = vectors(2, 5)
    assert negative_cosine(q, k).item() == pytest.approx(-sum(map(cosine, q, k)) / 7, rel=1e-5)
    distance = (F.normalize(q, dim=1) - F.normalize(k, dim=1)).square().sum(1).mean()  # eq. 2
    torch.testing.assert_close(distance, 2 + 2 * negative_cosine(q, k))
    assert negative_cosine(q, 3 * q).item() == pytest.approx(-1)


@pytest.mark.parametrize("seed", range(3))
def test_against_lightly(seed):
    pytest.importorskip("lightly", reason="lightly is not installed: `make setup` does it")
    from lightly.loss.negative_cosine_similarity import NegativeCosineSimilarity
    from lightly.loss.ntx_ent_loss import NTXentLoss

    z1, z2 = vectors(2, seed, batch=16, width=32)
    torch.testing.assert_close(nt_xent(z1, z2, 0.1), NTXentLoss(temperature=0.1)(z1, z2))
    torch.testing.assert_close(negative_cosine(z1, z2), NegativeCosineSimilarity()(z1, z2))


@pytest.mark.parametrize(
    ("method", "one"), [("moco_v3", lambda q, k: naive_info_nce(q, k, 0.05)), ("byol", lambda q, k: -sum(map(cosine, q, k)) / 7)]
)
def test_each_view_is_compared_with_the_target_s_other_view(method, one):
    z1, z2, k1, k2 = vectors(4, 2)
    network = Predictor()
    loss = METHODS[method].loss(network, (), (z1, z2), (k1, k2), SSL)
    q1, q2 = network.predictor(z1).detach(), network.predictor(z2).detach()
    assert loss.item() == pytest.approx(one(q1, k2) + one(q2, k1), rel=1e-5)
    torch.testing.assert_close(loss, METHODS[method].loss(network, (), (z2, z1), (k2, k1), SSL))


def test_patches_are_read_row_by_row():
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    cut = patches(images, 2)
    assert cut.shape == (2, 6, 12)
    assert torch.equal(cut[1, 4].reshape(3, 2, 2), images[1, :, 2:4, 2:4])


def test_reconstruction_against_loops():
    painted, wanted = (one.reshape(7, 5, 4) for one in vectors(2, 6, batch=7, width=20))
    keep = torch.tensor([[0, 4]] * 3 + [[1, 2]] * 4)
    for sample in range(7):
        hidden = [place for place in range(5) if place not in keep[sample].tolist()]
        expected = sum(float((painted[sample, place] - wanted[sample, place]).square().mean()) for place in hidden) / 3
        assert reconstruction(painted, wanted, keep)[sample].item() == pytest.approx(expected, rel=1e-5)
    assert reconstruction(wanted, wanted, keep).tolist() == [0] * 7
    assert reconstruction(wanted + 2, wanted, keep).tolist() == pytest.approx([4] * 7)


def test_patches_are_normalised_and_flat_ones_stay_finite():
    pixels = torch.cat([torch.rand(2, 3, 12), torch.ones(2, 1, 12)], dim=1)
    made = normalised(pixels)
    torch.testing.assert_close(made[:, :3].mean(2), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(made[:, :3].var(2), torch.ones(2, 3), atol=1e-3, rtol=0)
    assert torch.equal(made[:, 3], torch.zeros(2, 12))


def test_mae_draws_distinct_patches_and_leaves_colours_alone():
    config = load_config("base", ["ssl.method=mae"])
    keep = METHODS["mae"].draw_kept(config, 50, torch.Generator().manual_seed(0))
    assert keep.shape == (50, 16)  # a quarter of 64
    assert all(sorted(set(row)) == row and row[-1] < 64 for row in keep.tolist())
    assert len({tuple(row) for row in keep.tolist()}) == 50
    (view,) = METHODS["mae"].draw_views(config, 50, torch.Generator().manual_seed(0))
    assert not any(one.any() for one in (view.jitter, view.grayscale, view.solarise, view.sigma))


def test_alignment_against_loops_and_closed_forms():
    z, z_global, z_previous = vectors(3, 7)
    assert alignment.cosine(z, z_global).item() == pytest.approx(1 - sum(map(cosine, z, z_global)) / 7, rel=1e-5)
    expected = 0.0
    for mine, near, far in zip(z, z_global, z_previous, strict=True):
        a, b = math.exp(cosine(mine, near) / 0.5), math.exp(cosine(mine, far) / 0.5)
        expected -= math.log(a / (a + b)) / 7
    assert alignment.moon(z, z_global, z_previous, 0.5).item() == pytest.approx(expected, rel=1e-5)
    assert alignment.moon(z, z, -z, 0.5).item() == pytest.approx(math.log(1 + math.exp(-4)), rel=1e-4)
    constant = alignment.moon(z.requires_grad_(), z_global, z_global, 0.5)
    constant.backward()
    assert constant.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(z.grad, torch.zeros_like(z))
