"""Which models and batches do all systems train on? The same ones, drawn from the same seeds on every rank."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_mics.bench.configuration import Configuration

VOCABULARY = 2048
LEARNING_RATE = 1e-3
# Few and wide: what Python costs per layer, which is nothing in a large model, would hide what the links cost.
_WIDTHS = {"gpt2": (448, 4), "bert": (448, 4), "gpt2-short": (128, 4)}
_MASK_TOKEN, _FIRST_TOKEN = 3, 4
_MASKED_SHARE = 0.25


def build_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A GPT-2-like (10.6 M parameters) or BERT-like (10.8 M) model without dropout; weights drawn from `seed`."""
    torch.manual_seed(seed)
    width, layers = _WIDTHS[name]
    if name == "bert":
        return BertForMaskedLM(
            BertConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                intermediate_size=4 * width,
                vocab_size=VOCABULARY,
                max_position_embeddings=128,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=width,
            n_layer=layers,
            n_head=width // 64,
            vocab_size=VOCABULARY,
            n_positions=128,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def block_class(name: str) -> str:
    """The class name of the model's repeated block."""
    return "BertLayer" if name == "bert" else "GPT2Block"


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks, in order."""
    name = "BertLayer" if isinstance(model, BertForMaskedLM) else "GPT2Block"
    return [module for module in model.modules() if type(module).__name__ == name]


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the parameters as they are now, sharded or not."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)


def micro_batch(configuration: Configuration, step: int, micro_step: int, rank: int) -> dict[str, torch.Tensor]:
    """What `rank` trains on in one micro-step: input_ids and labels, (rows, tokens) each.

    The same tokens whatever the system; every row has as many labels, so that means over ranks and micro-steps are the
    mean over the global batch.
    """
    c = configuration
    index = (step * c.micro_steps + micro_step) * c.world_size + rank
    generator = torch.Generator().manual_seed(1_000_003 + index)
    shape = (c.rows, c.tokens)
    # Squared: some tokens are frequent, as in text, so that there is something to learn.
    draws = torch.rand(shape, generator=generator).square()
    ids = _FIRST_TOKEN + (draws * (VOCABULARY - _FIRST_TOKEN)).long()
    if c.model != "bert":
        return {"input_ids": ids, "labels": ids.clone()}
    masked = torch.rand(shape, generator=generator).argsort(dim=1)[:, : max(1, int(c.tokens * _MASKED_SHARE))]
    labels = torch.full(shape, -100).scatter(1, masked, ids.gather(1, masked))
    return {"input_ids": ids.scatter(1, masked, _MASK_TOKEN), "labels": labels}
