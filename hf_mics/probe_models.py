"""How is a planned model built to be measured, or to be probed: with attention that keeps no scores?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations.sdpa_attention import create_position_bias_mask

from hf_mics.planning.workload import ModelShape


def plain_model(shape: ModelShape, depths: tuple[int, ...]) -> nn.Module:
    """The model with `depths` layers in its stack (of T5, in encoder and decoder), in training mode."""
    return _BUILDERS[shape.family](shape, depths).train()


def build_model(shape: ModelShape, depths: tuple[int, ...]) -> nn.Module:
    """The same with attention that keeps no scores, for probes."""
    model = plain_model(shape, depths)
    model.set_attn_implementation(_PROBE)  # type: ignore[operator]
    return model


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention through the kernels that GPUs take, which keep no scores; with T5's bias, the memory-efficient one."""
    if position_bias is None:
        causal = bool(getattr(module, "is_causal", False)) and query.shape[2] > 1
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = kernel(query, key, value, 0.0, causal, scale=scaling)[0]
    else:
        mask = create_position_bias_mask(position_bias, None, bool(module.is_causal), query, key)
        bias = mask.expand(query.shape[0], query.shape[1], -1, -1)
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        out = kernel(query, key, value, bias, True, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*unused: Any, **also_unused: Any) -> None:
    """Batches without padding need none; transformers only leaves it out where it can look at the data."""


# transformers' own way to bring another attention.
_PROBE = "hf_mics_probe"
transformers.AttentionInterface.register(_PROBE, _attention)
transformers.AttentionMaskInterface.register(_PROBE, _no_mask)


def _gpt(m: ModelShape, depths: tuple[int, ...]) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=m.vocab_size, n_positions=m.context_length, n_embd=m.hidden_size, n_layer=depths[0],
        n_head=m.num_heads, n_inner=m.ffn_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        tie_word_embeddings=m.tied_embeddings,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers infers it from the class's name and warns about "GPT2LMHeadModel"
    return model


def _bert(m: ModelShape, depths: tuple[int, ...]) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=m.vocab_size, max_position_embeddings=m.context_length + m.spare_positions,
        type_vocab_size=m.type_vocab_size, hidden_size=m.hidden_size, num_hidden_layers=depths[0],
        num_attention_heads=m.num_heads, intermediate_size=m.ffn_size, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def _llama(m: ModelShape, depths: tuple[int, ...]) -> nn.Module:
    shared: dict[str, Any] = {
        "vocab_size": m.vocab_size, "max_position_embeddings": m.context_length, "hidden_size": m.hidden_size,
        "intermediate_size": m.ffn_size, "num_hidden_layers": depths[0], "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads, "head_dim": m.head_dim, "tie_word_embeddings": m.tied_embeddings,
        "use_cache": False,
    }  # fmt: skip
    if m.qk_norm:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shared))
    if m.qkv_bias:
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shared))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared))


def _t5(m: ModelShape, depths: tuple[int, ...]) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=m.vocab_size, d_model=m.hidden_size, d_kv=m.head_dim, d_ff=m.ffn_size, num_layers=depths[0],
        num_decoder_layers=depths[1], num_heads=m.num_heads, dropout_rate=0.0, use_cache=False,
        relative_attention_num_buckets=m.relative_buckets,
        feed_forward_proj="gated-gelu" if m.gated_ffn else "relu",
    )  # fmt: skip
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


_BUILDERS: dict[str, Callable[[ModelShape, tuple[int, ...]], nn.Module]] = {
    "gpt": _gpt,
    "bert": _bert,
    "llama": _llama,
    "t5": _t5,
}
