import pytest

from src.decoding.spec_length import Cost, choose, expected_speedup, survival


@pytest.mark.parametrize(
    "acceptance, cost, best, speedup",
    [(0.8, 0.385, 2, 1.38), (0.9, 0.385, 4, 1.61), (0.9, 0.58, 3, 1.26), (0.8, 0.05, 8, 3.09)],
)
def test_the_best_length_is_that_of_the_closed_form(acceptance, cost, best, speedup):
    rounds = 10**6
    accepted = [round(rounds * acceptance**k) for k in range(1, 5)]
    assert choose(accepted, rounds, Cost(cost, 1.0, 0.0)) == (
        best,
        pytest.approx(speedup, abs=0.01),
    )


def test_plain_decoding_is_chosen_where_nothing_pays():
    assert choose([30, 9], 100, Cost(0.7, 1.1, 0.05)) == (0, 1.0)
    assert choose([], 0, Cost(0.1, 1.0, 0.0)) == (0, 1.0)


def test_acceptance_beyond_what_was_measured_follows_its_mean():
    assert survival([80, 64], 100, 4) == pytest.approx([0.8, 0.64, 0.512, 0.4096])
    assert expected_speedup([0.5, 0.25], Cost(0.25, 1.0, 0.0)) == pytest.approx(1.75 / 1.5)
