"""Which models and data do the tests train? Tiny, of odd widths, without dropout, the same on every rank."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 61
TOKENS = 12
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def gpt2(dropout: float = 0.0) -> nn.Module:
    """Three blocks of width 15."""
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=15, n_layer=3, n_head=3, vocab_size=VOCABULARY, n_positions=16, resid_pdrop=dropout,
            embd_pdrop=dropout, attn_pdrop=dropout, **_IDS,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    """Two layers of width 15 with the head tied to the embeddings."""
    return BertForMaskedLM(
        BertConfig(
            hidden_size=15, num_hidden_layers=2, num_attention_heads=3, intermediate_size=29, vocab_size=VOCABULARY,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **_IDS,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    """Two layers of width 18 with untied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=18, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, intermediate_size=31,
            vocab_size=VOCABULARY, max_position_embeddings=16, tie_word_embeddings=False, **_IDS,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    """Two encoder and two decoder blocks of width 15."""
    return T5ForConditionalGeneration(
        T5Config(
            d_model=15, d_kv=5, d_ff=29, num_layers=2, num_heads=3, vocab_size=VOCABULARY, dropout_rate=0.0,
            decoder_start_token_id=2, **_IDS,
        )
    )  # fmt: skip


def bart() -> nn.Module:
    """One layer each way, with the persistent buffer that stock accelerate trips over."""
    return BartForConditionalGeneration(
        BartConfig(
            d_model=15, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3, decoder_attention_heads=3,
            encoder_ffn_dim=29, decoder_ffn_dim=29, vocab_size=VOCABULARY, max_position_embeddings=16, dropout=0.0,
            attention_dropout=0.0, decoder_start_token_id=1, **_IDS,
        )
    )  # fmt: skip


MODELS = {"gpt2": gpt2, "bert": bert, "llama": llama, "t5": t5, "bart": bart}


def build(name: str, seed: int = 0) -> nn.Module:
    """The model `name` with weights drawn from `seed`."""
    torch.manual_seed(seed)
    return MODELS[name]()


def token_rows(count: int, seed: int = 0) -> torch.Tensor:
    """`count` rows of token ids, (count, TOKENS)."""
    return torch.randint(3, VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(seed))
