"""The energy score: what it is, where it is least, and what the objective makes of it."""

from __future__ import annotations

import pytest
import torch
from test_games import Planted, slopes_of

import zoo
from inference import BadInput, EnergyScore
from inference.critic import critic_for
from inference.energy import energy_score
from inference.seeds import seeded

pytestmark = pytest.mark.usefixtures("same_noise")

B, N = 6, 20_000


@pytest.fixture
def precise():
    return zoo.FactorAnalysis(7, 3, seed=1).double()


def test_the_energy_score_is_that_of_a_double_loop():
    draws, truth = torch.randn(4, 5, 2, 3).double(), torch.randn(5, 2, 3).double()
    found = energy_score(draws, truth)
    assert found.shape == (5, 2)
    for i in range(5):
        for k in range(2):
            near = sum((d[i, k] - truth[i, k]).norm() for d in draws) / 4
            far = sum((a[i, k] - b[i, k]).norm() for a in draws for b in draws) / (4 * 3)
            torch.testing.assert_close(found[i, k], near - far / 2)


@pytest.mark.parametrize(
    ("shift", "scale"), [(0.3, 1.0), (0.0, 0.7), (0.0, 1.4), ([0.0, 0.3], [1.0, 1.0])], ids=str
)
@pytest.mark.parametrize("m", [2, 5])
def test_the_energy_score_is_least_for_the_true_law(shift, scale, m):
    root = torch.tensor([[1.0, 0.0], [-0.9, 0.5]]).double()
    truth = torch.randn(N, 2).double() @ root.T
    draws = torch.randn(m, N, 2).double() @ root.T
    other = draws * torch.tensor(scale) + torch.tensor(shift)
    gap = energy_score(other, truth) - energy_score(draws, truth)
    assert gap.mean() > 5 * gap.std() / N**0.5


def test_the_energy_score_sees_correlations():
    root = torch.tensor([[1.0, 0.0], [-0.9, (1 - 0.81) ** 0.5]]).double()
    truth = torch.randn(N, 2).double() @ root.T
    e = torch.randn(2, N, 2).double()
    gap = energy_score(e, truth) - energy_score(e @ root.T, truth)
    assert gap.mean() > 5 * gap.std() / N**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_draws_have_finite_gradients(dtype):
    draws = torch.ones(3, 4, 2, dtype=dtype, requires_grad=True)
    for truth in (torch.ones(4, 2, dtype=dtype), torch.zeros(4, 2, dtype=dtype)):
        slope = torch.autograd.grad(energy_score(draws, truth).sum(), draws)[0]
        assert torch.isfinite(slope).all()


def test_the_objective_is_the_mean_score_in_the_critics_units(precise):
    guide = Planted(precise)
    objective = EnergyScore(draws=3)
    objective.players(guide)
    z, x = precise.simulate(B, seed=2)
    with seeded(1):
        loss = objective(precise, guide, x, z)["guide"]
    with seeded(1):
        draws = guide.rsample(x, torch.Size([3]))
    judge = critic_for(guide, guide.latents, (1,), 0)
    standard = judge.standardise(x)
    y, truth = judge.relative(draws, standard), judge.relative(z["z"], standard)
    torch.testing.assert_close(loss, energy_score(y, truth).mean())
    assert all(g.any() for g in slopes_of(loss, guide))
    with pytest.raises(BadInput, match=r"^draws: expected an integer >= 2; got 1"):
        EnergyScore(draws=1)
