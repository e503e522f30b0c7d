import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfed.cloud_server.plateau import plateaus


@settings(deadline=None)
@given(st.lists(st.integers(-4, 4).map(float) | st.floats(-1e6, 1e6), max_size=40), st.integers(1, 5), st.sampled_from([0.5, 0.1]))
def test_rates_are_reduced_as_torch_reduces_them(losses, rounds, factor):
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=factor, patience=rounds - 1, threshold=0.0, threshold_mode="abs", eps=0.0
    )
    for count, loss in enumerate(losses, 1):
        torchs.step(loss)
        assert factor ** plateaus(losses[:count], rounds) == pytest.approx(optimiser.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("losses", "rounds", "count"),
    [([], 1, 0), ([3.0], 1, 0), ([3.0, 3.0], 1, 1), ([3.0, 2.0, 1.0], 1, 0), ([-1.0, -0.5, -1.5], 2, 0), ([1.0, 2.0, 2.0, 1.5, 1.5], 2, 2)],
)
def test_a_plateau_is_so_many_rounds_in_a_row_without_a_lower_loss(losses, rounds, count):
    assert plateaus(losses, rounds) == count
