"""Tiny random Llamas in float32: small enough to decode thousands of tokens in a test."""

import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from src.decoding.cache import CachedModel
from src.decoding.drafts import ModelDraft

VOCAB_SIZE = 61
# These matrices are too small to share: threads would only wait for one another.
torch.set_num_threads(1)


@functools.cache
def llama(seed: int, vocab_size: int = VOCAB_SIZE, layers: int = 2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # peaked enough that greedy decoding does not settle on one token
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@functools.cache
def relative(seed: int, noise: float = 0.05, vocab_size: int = VOCAB_SIZE):
    """A draft for llama(seed): its weights with some noise, so that it is right now and then."""
    model = llama(seed, vocab_size)
    torch.manual_seed(seed + 1)
    draft = LlamaForCausalLM(model.config).eval()
    draft.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += noise * torch.randn_like(parameter) * parameter.std()
    return draft


def drafting(model, draw):
    """The draft argument of Decoder for a model."""
    return lambda batch_size, capacity: ModelDraft(CachedModel(model, batch_size, capacity), draw)
