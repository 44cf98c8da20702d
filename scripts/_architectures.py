"""Which transformers architectures are tried, how is each made tiny, and what does it read?

Widths are odd where the architecture allows, so that shards are padded; a model has at least two layers of a kind.
"""
# ruff: noqa: C408 - keywords keep a configuration on one line

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

ROWS, VOCAB, IMAGE = 2, 101, 32


def _tokens(length: int, generator: torch.Generator) -> torch.Tensor:
    # From 5 on: the first ids are padding and other special tokens, which sequence-to-sequence models look for.
    return torch.randint(5, VOCAB - 2, (ROWS, length), generator=generator)


def _causal(config: Any, generator: torch.Generator) -> dict[str, Any]:
    ids = _tokens(11, generator)
    return {"input_ids": ids, "labels": ids}


def _masked(config: Any, generator: torch.Generator) -> dict[str, Any]:
    ids = _tokens(11, generator)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": ids.masked_fill(ids % 3 == 0, -100)}


def _sequence_to_sequence(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": _tokens(11, generator), "labels": _tokens(7, generator)}


def _image(config: Any, generator: torch.Generator) -> dict[str, Any]:
    pixels = torch.randn(ROWS, 3, IMAGE, IMAGE, generator=generator)
    size = (ROWS, IMAGE, IMAGE) if config.model_type == "segformer" else (ROWS,)
    return {"pixel_values": pixels, "labels": torch.randint(0, 2, size, generator=generator)}


def _image_and_text(config: Any, generator: torch.Generator) -> dict[str, Any]:
    pixels = torch.randn(ROWS, 3, IMAGE, IMAGE, generator=generator)
    return {"input_ids": _tokens(9, generator), "pixel_values": pixels, "return_loss": True}


def _sound(config: Any, generator: torch.Generator) -> dict[str, Any]:
    if hasattr(config, "conv_stride"):  # reads the waveform
        return {"input_values": torch.randn(ROWS, 480, generator=generator), "labels": _tokens(4, generator) % 29}
    frames = torch.randn(ROWS, 8, 26, generator=generator)
    features = frames if config.model_type == "whisper" else frames.transpose(1, 2)
    return {"input_features": features, "labels": _tokens(5, generator)}


_ROTARY = dict(vocab_size=VOCAB, hidden_size=36, intermediate_size=53, num_hidden_layers=3, num_attention_heads=3)
_LLAMA = _ROTARY | dict(hidden_size=33, num_key_value_heads=1, head_dim=6, max_position_embeddings=32)
# Experts run through torch's grouped_mm, which wants rows of whole 16 bytes.
_EXPERTS = _LLAMA | dict(hidden_size=36, intermediate_size=52, moe_intermediate_size=20, num_experts_per_tok=2)
_LATENT = dict(kv_lora_rank=9, q_lora_rank=9, qk_rope_head_dim=6, qk_nope_head_dim=7, v_head_dim=5, n_group=1)
_LATENT |= dict(n_routed_experts=4, first_k_dense_replace=1, topk_group=1, num_key_value_heads=3)
_BERT = dict(vocab_size=VOCAB, hidden_size=35, num_hidden_layers=3, num_attention_heads=5, intermediate_size=37)
_BERT |= dict(max_position_embeddings=40)
_DEBERTA = _BERT | dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False)
_STACKS = dict(vocab_size=VOCAB, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=37, decoder_ffn_dim=37)
_BART = _STACKS | dict(d_model=35, encoder_attention_heads=5, decoder_attention_heads=5, max_position_embeddings=40)
_T5 = dict(vocab_size=VOCAB, d_model=33, d_kv=7, d_ff=37, num_layers=2, num_heads=3, decoder_start_token_id=0)
_VIT = dict(image_size=IMAGE, patch_size=8, hidden_size=35, num_hidden_layers=3, num_attention_heads=5)
_VIT |= dict(intermediate_size=37)
_SEGFORMER = dict(num_encoder_blocks=2, depths=[2, 2], sr_ratios=[2, 1], hidden_sizes=[15, 21], patch_sizes=[7, 3])
_SEGFORMER |= dict(strides=[4, 2], num_attention_heads=[3, 3], decoder_hidden_size=17)
_WAV2VEC = dict(vocab_size=29, hidden_size=30, num_hidden_layers=3, num_attention_heads=5, intermediate_size=37)
_WAV2VEC |= dict(conv_dim=(14, 14), conv_kernel=(10, 8), conv_stride=(5, 4), num_feat_extract_layers=2)
_WAV2VEC |= dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
_WAV2VEC |= dict(mask_time_prob=0.0, mask_feature_prob=0.0)  # masked time steps are random draws
_SPEECH = _STACKS | dict(d_model=36, encoder_attention_heads=3, decoder_attention_heads=3, max_target_positions=16)
_SPEECH |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)

_FAMILIES = {
    ("causal", _causal): {
        "gpt2": ("GPT2LMHeadModel", dict(vocab_size=VOCAB, n_embd=35, n_head=5, n_layer=3, n_positions=32)),
        "gptj": ("GPTJForCausalLM", dict(vocab_size=VOCAB, n_embd=36, n_head=3, n_layer=3, rotary_dim=4)),
        "llama": ("LlamaForCausalLM", _LLAMA),
        "mistral": ("MistralForCausalLM", _LLAMA),
        "qwen2": ("Qwen2ForCausalLM", _ROTARY | dict(num_key_value_heads=1, tie_word_embeddings=True)),
        "qwen3": ("Qwen3ForCausalLM", _LLAMA),
        "gemma": ("GemmaForCausalLM", _LLAMA),
        "gemma2": ("Gemma2ForCausalLM", _LLAMA),
        "gemma3_text": ("Gemma3ForCausalLM", _LLAMA),
        "phi": ("PhiForCausalLM", _ROTARY),
        "phi3": ("Phi3ForCausalLM", _ROTARY | dict(num_key_value_heads=1, pad_token_id=0)),
        "olmo2": ("Olmo2ForCausalLM", _ROTARY | dict(num_key_value_heads=1)),
        "opt": ("OPTForCausalLM", _BERT | dict(ffn_dim=37, word_embed_proj_dim=33)),
        "gpt_neox": ("GPTNeoXForCausalLM", _ROTARY),
        "falcon": ("FalconForCausalLM", _ROTARY),
        "bloom": ("BloomForCausalLM", dict(vocab_size=VOCAB, hidden_size=35, n_layer=3, n_head=5)),
        "mixtral": ("MixtralForCausalLM", _EXPERTS | dict(num_local_experts=3, output_router_logits=True)),
        "qwen3_moe": ("Qwen3MoeForCausalLM", _EXPERTS | dict(num_experts=5)),
        "gpt_oss": ("GptOssForCausalLM", _EXPERTS | dict(num_local_experts=3)),
        "deepseek_v3": ("DeepseekV3ForCausalLM", _EXPERTS | _LATENT),
        "mamba": ("MambaForCausalLM", dict(vocab_size=VOCAB, hidden_size=35, state_size=5, num_hidden_layers=3)),
    },
    ("masked", _masked): {
        "bert": ("BertForMaskedLM", _BERT),
        "roberta": ("RobertaForMaskedLM", _BERT),
        "xlm-roberta": ("XLMRobertaForMaskedLM", _BERT),
        "albert": ("AlbertForMaskedLM", _BERT | dict(embedding_size=21)),
        "distilbert": ("DistilBertForMaskedLM", dict(vocab_size=VOCAB, dim=35, n_layers=3, n_heads=5, hidden_dim=37)),
        "deberta": ("DebertaForMaskedLM", _DEBERTA),
        "deberta-v2": ("DebertaV2ForMaskedLM", _DEBERTA | dict(legacy=False)),
        "electra": ("ElectraForMaskedLM", _BERT | dict(embedding_size=21)),
        "modernbert": ("ModernBertForMaskedLM", _ROTARY | dict(global_attn_every_n_layers=2, pad_token_id=0)),
        "mpnet": ("MPNetForMaskedLM", _BERT),
    },
    ("sequence to sequence", _sequence_to_sequence): {
        "t5": ("T5ForConditionalGeneration", _T5),
        "mt5": ("MT5ForConditionalGeneration", _T5),
        "bart": ("BartForConditionalGeneration", _BART),
        "mbart": ("MBartForConditionalGeneration", _BART),
        "pegasus": ("PegasusForConditionalGeneration", _BART),
        "marian": ("MarianMTModel", _BART | dict(pad_token_id=0, decoder_start_token_id=0)),
    },
    ("vision", _image): {
        "vit": ("ViTForImageClassification", _VIT),
        "deit": ("DeiTForImageClassification", _VIT),
        "beit": ("BeitForImageClassification", _VIT | dict(use_relative_position_bias=True)),
        "dinov2": ("Dinov2ForImageClassification", _VIT),
        "swin": ("SwinForImageClassification", dict(image_size=IMAGE, patch_size=2, embed_dim=15, depths=[2, 2])),
        "convnext": ("ConvNextForImageClassification", dict(hidden_sizes=[9, 15, 21], depths=[1, 2, 2], num_stages=3)),
        "resnet": ("ResNetForImageClassification", dict(embedding_size=9, hidden_sizes=[13, 21], depths=[2, 2])),
        "segformer": ("SegformerForSemanticSegmentation", _SEGFORMER),
    },
    ("vision and text", _image_and_text): {
        "clip": ("CLIPModel", dict(text_config=_BERT | dict(eos_token_id=2), vision_config=_VIT, projection_dim=19)),
        "siglip": ("SiglipModel", dict(text_config=_BERT, vision_config=_VIT)),
    },
    ("speech", _sound): {
        "wav2vec2": ("Wav2Vec2ForCTC", _WAV2VEC),
        "hubert": ("HubertForCTC", _WAV2VEC),
        "wavlm": ("WavLMForCTC", _WAV2VEC),
        "whisper": ("WhisperForConditionalGeneration", _SPEECH | dict(num_mel_bins=8, max_source_positions=13)),
        "speech_to_text": ("Speech2TextForConditionalGeneration", _SPEECH | dict(input_feat_per_channel=8)),
    },
}


@dataclass(frozen=True)
class Architecture:
    """A model class with a tiny configuration, and what it reads."""

    family: str
    inputs: Callable[[Any, torch.Generator], dict[str, Any]]
    model_class: str
    settings: dict[str, Any]


# By transformers' model type.
ARCHITECTURES = {
    name: Architecture(family, inputs, model_class, settings)
    for (family, inputs), members in _FAMILIES.items()
    for name, (model_class, settings) in members.items()
}


def build(name: str) -> nn.Module:
    """The tiny model called `name`, in training mode and without any random draw in forward."""
    architecture = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(name, **architecture.settings)
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        for key, value in part.to_dict().items():
            # dropout, attention_dropout, layerdrop, drop_path_rate, ...: both runs would draw differently.
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return getattr(transformers, architecture.model_class)(config).train()


def micro_batch(name: str, model: nn.Module, seed: int) -> dict[str, Any]:
    """Random inputs and labels of `ROWS` rows for `model`; the same wherever they are asked for."""
    return ARCHITECTURES[name].inputs(model.config, torch.Generator().manual_seed(seed))
