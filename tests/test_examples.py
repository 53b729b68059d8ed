"""The examples: they run as docs/learn.md says, and what they teach holds."""

import re

import pytest
import torch

from examples import from_scratch
from tests.mutants import ROOT


def test_the_table_is_that_of_the_guide(capsys):
    def lines(text):
        cells = [line.strip("|").split("|") for line in text.splitlines()[2:]]
        return {name.strip(): [float(x) for x in numbers] for name, *numbers in cells}

    table = re.search(r"```text\n(.+?)```", (ROOT / "docs/learn.md").read_text(), re.DOTALL)[1]
    assert from_scratch.main([]) == 0
    ours, theirs = lines(capsys.readouterr().out), lines(table)
    assert list(ours) == list(theirs)
    for name, (tokens, distance) in theirs.items():  # another PyTorch may draw other numbers
        assert ours[name] == [pytest.approx(tokens, abs=0.1), pytest.approx(distance, abs=0.005)]


@pytest.mark.parametrize("spec_length", [1, 4])
def test_a_round_follows_the_target_and_the_wrong_one_does_not(spec_length):
    generator = torch.Generator().manual_seed(3)
    target, draft = from_scratch.toy_models(6, 1.0, generator)
    measured = {
        name: from_scratch.measure(one_round, target, draft, spec_length, 6_000, generator)
        for name, one_round in from_scratch.METHODS.items()
    }
    (one, noise), (tokens, distance), (_, wrong) = measured.values()
    assert one == 1 and 1 < tokens <= spec_length + 1
    assert distance < 2 * noise and wrong > 3 * noise
