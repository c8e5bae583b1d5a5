"""Norms of gradients: exact enough that a mesh, which splits a large gradient, clips as one process does."""

import torch

from llmtrain.parallel.gradients import square_sum


def test_the_norm_of_a_large_gradient_is_exact_to_rounding():
    large, small = torch.randn(6_000_000, generator=torch.Generator().manual_seed(0)).view(-1, 1000), torch.ones(3, 5)
    exact = large.double().square().sum().item() + 15 / 2
    assert abs(square_sum([large, small], [1, 2]) / exact - 1) < 1e-5
