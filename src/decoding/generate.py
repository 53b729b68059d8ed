"""The loop as transformers users call things:

model.generate(**inputs, custom_generate=speculative_generate, draft=draft_model)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from src import samplers
from src.contract import SamplerOutput
from src.decoding.cache import CachedModel
from src.decoding.drafts import ModelDraft, PromptLookupDraft
from src.decoding.speculative import Decoder, Distribution

# These look at the scores alone. The others also read the tokens so far, which differ from
# position to position of a round.
_PROCESSORS = (
    "EpsilonLogitsWarper EtaLogitsWarper InfNanRemoveLogitsProcessor LogitNormalization "
    "MinPLogitsWarper SuppressTokensLogitsProcessor TemperatureLogitsWarper TopHLogitsWarper "
    "TopKLogitsWarper TopPLogitsWarper TypicalLogitsWarper"
).split()
_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")


def speculative_generate(
    model,
    input_ids: torch.Tensor,
    logits_processor=None,
    stopping_criteria=None,
    generation_config=None,
    draft="prompt-lookup",
    spec_length: int = 4,
    sampler: str = "vectorized",
    mode: str = "eager",
    seeds=None,
    **model_kwargs,
) -> torch.Tensor:
    """[B, L + new] int64: input_ids and what follows, padded on the right as generate pads.

    Called by model.generate, which prepares the arguments; these are this project's:
    draft: a causal LM with the model's vocabulary, or "prompt-lookup".
    spec_length: draft tokens a round. sampler: a name of src/samplers.py. mode: "eager" or
        "graphed" (CUDA). seeds: one int a row; drawn from torch's default generator without.
    Raises ValueError for a logits processor that reads earlier tokens, for a stopping criterion
    other than length and EOS, and for beams.
    """
    config = generation_config
    _refuse(logits_processor, _PROCESSORS, "logits processor")
    _refuse(stopping_criteria, _CRITERIA, "stopping criterion")
    for name, wanted in (("num_beams", 1), ("return_dict_in_generate", False)):
        value = getattr(config, name, None)
        if value and value != wanted:
            raise ValueError(f"{name} is {value}; speculative_generate wants {wanted}")
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    prompts = [row[seen.bool()].tolist() for row, seen in zip(input_ids, mask, strict=True)]
    new = config.max_length - input_ids.shape[1]
    eos = config.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    sample = samplers.get(sampler).load(model.device.type)
    decoder = Decoder(
        model,
        draft_maker(draft, sample),
        sample,
        spec_length=spec_length,
        max_length=config.max_length,
        batch_size=len(prompts),
        distribution=Distribution(logits_processor, greedy=not config.do_sample),
        eos_token_ids=eos,
        mode=mode,
        capturable=sampler != "baseline",
    )
    rows = decoder.generate(prompts, new, seeds=seeds).token_ids
    pad = config.pad_token_id if config.pad_token_id is not None else (eos or [0])[0]
    longest = max(len(row) for row in rows)
    padded = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    return torch.cat([input_ids, padded.to(input_ids.device)], 1)


def draft_maker(draft, draw: Callable[..., SamplerOutput]):
    """The draft argument of Decoder for a causal LM, a CachedModel of one, or "prompt-lookup".

    draw: the sampler that draws the draft model's tokens.
    """
    if isinstance(draft, str):
        if draft != "prompt-lookup":
            raise ValueError(f"draft is {draft!r}; wanted a causal LM or 'prompt-lookup'")
        return lambda batch_size, capacity: PromptLookupDraft()

    def make(batch_size: int, capacity: int) -> ModelDraft:
        ready = isinstance(draft, CachedModel)
        return ModelDraft(draft if ready else CachedModel(draft, batch_size, capacity), draw)

    return make


def _refuse(members, known, kind: str) -> None:
    for member in members or ():
        if type(member).__name__ not in known:
            raise ValueError(
                f"{kind} {type(member).__name__} is not supported; wanted {' or '.join(known)}"
            )
