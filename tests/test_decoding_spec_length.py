import pytest

from src.decoding.spec_length import Cost, candidates, choose, expected_speedup, survival


@pytest.mark.parametrize(
    "acceptance, cost, best",
    [(0.8, 0.385, 2), (0.9, 0.385, 4), (0.9, 0.58, 3), (0.8, 0.05, 8)],
)
def test_the_first_candidate_is_that_of_the_closed_form(acceptance, cost, best):
    rounds = 10**6
    accepted = [round(rounds * acceptance**k) for k in range(1, 5)]
    found = candidates(accepted, rounds, Cost(cost, 1.0, 0.0))
    assert found[0] == best
    assert len(found) == 3 and best - 2 <= min(found) <= max(found) <= best + 2


def test_what_cannot_pay_is_no_candidate():
    assert candidates([30, 9], 100, Cost(0.7, 1.1, 0.05)) == []
    assert candidates([], 0, Cost(0.1, 1.0, 0.0)) == []


def test_the_fastest_is_chosen_where_it_gains_by_the_margin():
    assert choose({0: 1.0, 2: 0.8, 3: 0.7}) == 3
    assert choose({0: 1.0, 2: 0.99}) == choose({0: 1.0}) == choose({0: 1.0, 4: 1.2}) == 0


def test_acceptance_beyond_what_was_measured_follows_its_mean():
    assert survival([80, 64], 100, 4) == pytest.approx([0.8, 0.64, 0.512, 0.4096])
    assert expected_speedup([0.5, 0.25], Cost(0.25, 1.0, 0.0)) == pytest.approx(1.75 / 1.5)
