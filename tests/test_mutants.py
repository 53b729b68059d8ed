"""The planted faults of `make mutants` still fit the sources they are planted in."""

import pytest

from tests.mutants import MUTANTS, ROOT, TESTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_the_fault_can_be_planted_once(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant.old
    assert mutant.file in TESTS


def test_no_fault_is_listed_twice():
    assert len({mutant.fault for mutant in MUTANTS}) == len(MUTANTS)
