"""The loop's bookkeeping: by hand, and its kernel against the operations it stands for."""

import pytest
import torch

from src.contract import SamplerOutput
from src.decoding.state import State

PADDING = -1


def state_of(batch_size, spec_length, eos=(), device="cpu", capacity=40):
    return State(batch_size, capacity, spec_length, eos, device)


def output_of(token_ids, num_accepted, device="cpu"):
    return SamplerOutput(
        torch.tensor(token_ids, device=device),
        torch.tensor(num_accepted, dtype=torch.int32, device=device),
    )


def test_a_round_is_taken_up_to_what_was_accepted_the_limit_and_the_first_eos():
    state = state_of(5, 2, eos=(99, 98))
    state.fill([[1, 2], [3], [4], [5]], 3, [7, 7, 7, 7])  # the fifth row is done from the start
    ids = [[10, 11, PADDING], [99, 21, 22], [30, 98, 32], [40, PADDING, PADDING], [50, 51, 52]]
    drafts = torch.tensor([[10, 60], [99, 21], [30, 98], [-1, -1], [50, 51]])
    state.advance(output_of(ids, [1, 2, 2, 0, 2]), drafts)
    assert state.rows(5) == [[1, 2, 10, 11], [3, 99], [4, 30, 98], [5, 40], [0]]
    assert state.newest.tolist() == [[10, 11], [3, 99], [30, 98], [5, 40], [0, 0]]
    assert int(state.left) == 2  # of the fourth row
    assert int(state.rounds) == 4
    assert state.drafted.tolist() == state.examined.tolist() == [3, 3]
    assert state.accepted.tolist() == [3, 2]
    assert state.offsets[:, 0].tolist() == [5, 6, 7]
    ids = [[12, 13, 14]] * 5
    state.advance(output_of(ids, [2] * 5), torch.tensor(ids)[:, :2])
    assert state.rows(4) == [[1, 2, 10, 11, 12], [3, 99], [4, 30, 98], [5, 40, 12, 13]]
    assert int(state.left) == 0
    assert int(state.rounds) == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("eos", [(), (3,), (3, 5, 8)])
@pytest.mark.parametrize("batch_size, spec_length", [(1, 0), (1, 4), (3, 31), (33, 2), (70, 8)])
def test_the_kernel_leaves_what_the_operations_do(batch_size, spec_length, eos):
    generator = torch.Generator().manual_seed(batch_size + spec_length)
    rows = max(1, batch_size - 1)
    prompts = [[row % 7 + 1] * (1 + row % 5) for row in range(rows)]
    states = [state_of(batch_size, spec_length, eos, "cuda", 160) for _ in range(2)]
    assert states[0]._in_one_launch
    states[1]._in_one_launch = False
    for state in states:
        state.fill(prompts, 100, list(range(rows)))
    columns = torch.arange(spec_length + 1)

    def random(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    for _ in range(30):
        num_accepted = random(spec_length + 1, batch_size).int()
        ids = random(60, batch_size, spec_length + 1)
        drafts = torch.where(random(5, batch_size, spec_length) == 0, -1, ids[:, :-1]).cuda()
        ids = torch.where(columns <= num_accepted[:, None], ids, PADDING)
        for state in states:
            state.advance(SamplerOutput(ids.cuda(), num_accepted.cuda()), drafts)
        by_kernel, by_operations = (vars(state) for state in states)
        for name, tensor in by_kernel.items():
            if isinstance(tensor, torch.Tensor) and name != "tokens":
                assert torch.equal(tensor, by_operations[name]), name
        assert states[0].rows(batch_size) == states[1].rows(batch_size)
