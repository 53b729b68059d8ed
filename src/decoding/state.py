"""What a decoding round reads and writes, all of it on the device.

B = batch size, K = spec length; the position of a token is its index in its row's text, prompt
included.
"""

from __future__ import annotations

import torch

from src import samplers
from src.contract import SamplerOutput

# A row's columns are the lanes of a warp.
_MOST_COLUMNS = 32


class State:
    """Rows of up to `capacity` tokens, decoded K draft tokens a round.

    tokens: [B, capacity + 1], the last column takes what is not kept.
    start: [B], position of the newest token, which no cache holds yet.
    newest: [B, 2], the token before that one and that one; before the first token the first is
        repeated.
    limit: [B], position of the last token a row may have; a row that has it is done.
    seeds: [B]; offsets: [K + 1, B], where in its stream a row's next round draws each draft token
        and begins to verify.
    counts: [1 + 3 K], as views of it rounds, drafted, examined, accepted (see Stats).
    left: tokens that the row furthest from its limit may still take.
    eos: the tokens that end a row. columns: 0 to K. All are int64.
    """

    def __init__(self, batch_size: int, capacity: int, spec_length: int, eos_token_ids, device):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.spec_length = spec_length
        self.eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        self.tokens = zeros(batch_size, capacity + 1)
        self.start = zeros(batch_size)
        self.newest = zeros(batch_size, 2)
        self.limit = zeros(batch_size)
        self.seeds = zeros(batch_size)
        self.offsets = zeros(spec_length + 1, batch_size)
        self.counts = zeros(1 + 3 * spec_length)
        self.rounds = self.counts[0]
        self.drafted, self.examined, self.accepted = self.counts[1:].view(3, spec_length)
        self.left = zeros()
        self.columns = torch.arange(spec_length + 1, device=device)
        self._newest = torch.arange(-1, 1, device=device)
        # Where the extension has CUDA: elsewhere the same is some thirty launches.
        self._in_one_launch = (
            self.tokens.is_cuda
            and spec_length < _MOST_COLUMNS
            and samplers.get("cuda").is_available("cuda")
        )

    def clear(self) -> None:
        """No rows: every one is done, and stays where it is in a round."""
        for tensor in (self.tokens, self.start, self.newest, self.limit, self.seeds):
            tensor.zero_()
        self.counts.zero_()
        self.left.zero_()
        self.offsets.copy_(self.columns[:, None].expand_as(self.offsets))

    def fill(self, prompts, max_new_tokens: int, seeds) -> int:
        """Begins a row for each prompt, the others being done; the longest prompt's length."""
        count, device = len(prompts), self.tokens.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        tokens = torch.zeros((count, longest), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        self.clear()
        # Shorter prompts are padded on the right: what prefill writes there is behind the mask
        # until the row's own tokens overwrite it.
        self.tokens[:count, :longest] = tokens.to(device)
        self.start[:count] = (lengths - 1).to(device)
        self.limit[:count] = (lengths - 1 + max_new_tokens).to(device)
        self.seeds[:count] = torch.tensor(seeds).to(device)
        self._update_newest()
        return longest

    def rows(self, count: int) -> list[list[int]]:
        """The tokens of the first rows, prompt included."""
        ends, tokens = self.start.tolist(), self.tokens.tolist()
        return [tokens[row][: ends[row] + 1] for row in range(count)]

    def advance(self, output: SamplerOutput, draft_token_ids: torch.Tensor) -> None:
        """Takes what a round emitted into the rows that are not done: up to the limit, and up to
        the first EOS, which ends its row by moving the limit to it.

        draft_token_ids: [B, K] int64, -1 where there was none.
        """
        token_ids = output.token_ids.long()
        if self._in_one_launch:
            torch.ops.decoding_round.advance(
                *(token_ids, output.num_accepted, draft_token_ids, self.eos, self.tokens),
                *(self.start, self.newest, self.limit, self.offsets, self.counts, self.left),
            )
        else:
            self._advance(token_ids, output.num_accepted[:, None], draft_token_ids)

    def _advance(self, token_ids, num_accepted, draft_token_ids) -> None:
        columns = self.columns
        active = (self.start < self.limit)[:, None]
        position = self.start[:, None] + 1 + columns
        keep = active & (columns <= num_accepted) & (position <= self.limit[:, None])
        is_eos = (token_ids[..., None] == self.eos).any(-1) & keep
        keep = keep & (is_eos.cumsum(1) == is_eos)
        junk = self.tokens.shape[1] - 1
        self.tokens.scatter_(1, torch.where(keep, position, junk), token_ids)

        self.rounds += active.sum()
        drafted = (draft_token_ids >= 0) & active
        self.drafted += drafted.sum(0)
        self.examined += (drafted & (columns[:-1] <= num_accepted)).sum(0)
        self.accepted += (active & (columns[:-1] < num_accepted)).sum(0)
        self.start += keep.sum(1)
        self.limit.copy_(torch.where(is_eos.any(1), self.start, self.limit))
        self._update_newest()
        self.offsets += 2 * self.spec_length + 1
        torch.amax(self.limit - self.start, 0, out=self.left)

    def _update_newest(self) -> None:
        at = (self.start[:, None] + self._newest).clamp(min=0)
        torch.gather(self.tokens, 1, at, out=self.newest)
