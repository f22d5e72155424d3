"""What the bench measures with: turns, spectra, errors, and the memory of a conversion."""

import time

import pytest
import torch

from ouroboros.bench import excess_error, gigabyte, scaled_residual, take_turns
from ouroboros.surgery import FULL_SVD, truncated_svd


def test_calls_take_turns_and_the_first_turn_is_not_counted():
    calls = []

    def slow():
        calls.append("b")
        time.sleep(0.01)

    seconds = take_turns({"a": lambda: calls.append("a"), "b": slow}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert len(seconds["a"]) == len(seconds["b"]) == 3 and min(seconds["b"]) >= 0.01


def test_a_scaled_residual_has_the_spectrum_of_the_one_it_comes_from():
    small = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    values, scaled = torch.linalg.svdvals(small), torch.linalg.svdvals(scaled_residual(small, (60, 45)))
    assert len(scaled) == 45
    torch.testing.assert_close(scaled[[0, -1]], values[[0, -1]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled[::4], values, rtol=1e-4, atol=1e-4)  # 44 / 11 new values to an old one


@pytest.mark.parametrize("rank", [4, 32, 64])
@pytest.mark.parametrize("shape", [(1300, 1030), (1030, 1300)])
def test_the_randomized_svd_is_within_a_percent_of_the_best_and_deterministic(shape, rank):
    assert min(shape) > FULL_SVD
    residual = torch.randn(shape, generator=torch.Generator().manual_seed(2))  # no decay: the hardest spectrum
    assert 0 <= excess_error(residual, rank) < 1
    state = torch.get_rng_state()
    (a, b), (again, same) = truncated_svd(residual, rank), truncated_svd(residual, rank)
    assert torch.equal(a, again) and torch.equal(b, same) and torch.equal(torch.get_rng_state(), state)
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
    torch.testing.assert_close(a @ a.T, torch.eye(rank), rtol=0, atol=1e-5)


def test_converting_a_gigabyte_holds_the_kept_layers_and_less_than_four_more():
    found = gigabyte("5GB")
    assert found["checkpoint MB"] > 1000
    assert found["kept MB"] < found["peak net of imports MB"] < found["kept + 4 layers MB"]
