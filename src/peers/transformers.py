"""transformers' `_speculative_sampling`: logits, one request at a time."""

from __future__ import annotations

import torch

from src.contract import PLACEHOLDER_TOKEN_ID, SamplerOutput
from src.peers.adapter import Adapter, LogitsAdapter, find

_PARAMETERS = (
    "candidate_input_ids",
    "candidate_logits",
    "candidate_length",
    "new_logits",
    "is_done_candidate",
)


def load(device: str) -> Adapter:
    """The adapter, for tensors on any device. Its softmax works in the dtype it is given, and
    generate gives it float32: so does this, made before its time counts. Raises
    SamplerUnavailable."""
    module = "transformers.generation.utils"
    sample = find("transformers", "4.46", "5.17.0", module, "_speculative_sampling", _PARAMETERS)

    def prepare(draft_token_ids, draft_logits, target_logits):
        batch_size, spec_length = draft_token_ids.shape
        ids = draft_token_ids.long()
        new_logits = target_logits.float()
        if draft_logits is None:
            candidate_logits = torch.full_like(new_logits[:, :spec_length], float("-inf"))
            candidate_logits.scatter_(-1, ids[..., None], 0.0)
        else:
            candidate_logits = draft_logits.float()

        def call():
            rows, counts = [], []
            for b in range(batch_size):
                tokens, matches = sample(
                    candidate_input_ids=ids[b : b + 1],
                    candidate_logits=candidate_logits[b : b + 1],
                    candidate_length=spec_length,
                    new_logits=new_logits[b : b + 1],
                    is_done_candidate=False,
                )
                missing = spec_length + 1 - tokens.shape[1]
                rows.append(
                    torch.nn.functional.pad(tokens, (0, missing), value=PLACEHOLDER_TOKEN_ID)
                )
                counts.append(matches)
            token_ids = torch.cat(rows).to(draft_token_ids.dtype)
            return SamplerOutput(token_ids, torch.stack(counts).to(torch.int32))

        return call

    return LogitsAdapter(prepare)
