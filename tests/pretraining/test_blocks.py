"""Do model, tokenizer and blocks fit each other, for every kind of model, and are misfits refused at once?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    MambaConfig,
    RobertaConfig,
)

from hf_mics.errors import ConfigError
from hf_mics.presets import find_preset
from hf_mics.pretraining.blocks import (
    OTHER_LEARNING_RATES,
    BlockArguments,
    build_model,
    context_length,
    prepare_blocks,
)
from hf_mics.pretraining.masking import MaskingArguments, masking_collator
from hf_mics.pretraining.text import TextArguments
from hf_mics.pretraining.tokenization import train_byte_level_bpe
from hf_mics.testing import run_ranks

LINES = [f"Sentence number {number} has a few words in it." for number in range(60)]
TINY = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    return {"train_file": [str(tmp_path / "a.txt")]}


def prepare(text: dict, task: str, config, folder: Path, streaming: bool = False, seed: int = 0, **flags):
    config.save_pretrained(folder / "config")
    arguments = BlockArguments(preset="none", model_config=str(folder / "config"), **flags)
    return prepare_blocks(arguments, TextArguments(**text, streaming=streaming), task, seed)


def test_a_masked_model_gets_a_wordpiece_tokenizer_and_its_padding(text, tmp_path: Path):
    blocks = prepare(text, "masked", BertConfig(vocab_size=300, max_position_embeddings=16, **TINY), tmp_path)
    assert blocks.tokenizer.mask_token == "[MASK]"
    assert (blocks.config.pad_token_id, blocks.config.vocab_size) == (blocks.tokenizer.pad_token_id, 300)
    assert blocks.block_size == blocks.tokenizer.model_max_length == len(blocks.train[0]["input_ids"]) == 16
    assert blocks.learning_rate == 1e-4


def test_a_preset_brings_its_own_learning_rate_and_other_models_that_of_their_task(text, tmp_path: Path):
    arguments = BlockArguments(preset="gpt-tiny", vocab_size=300, block_size=16)
    rate = prepare_blocks(arguments, TextArguments(**text), "causal", seed=0).learning_rate
    assert rate == find_preset("gpt-tiny", "causal").learning_rate
    assert rate not in OTHER_LEARNING_RATES.values()
    config = GPT2Config(vocab_size=300, n_positions=16, n_embd=12, n_head=2)
    assert prepare(text, "causal", config, tmp_path, block_size=16).learning_rate == 3e-4


def test_the_tokenizer_has_not_seen_what_is_evaluated_of_which_there_is_as_much_as_was_asked_for(text, tmp_path: Path):
    (tmp_path / "b.txt").write_text("\n".join(line.replace("e", "ж") for line in LINES))
    config = BertConfig(vocab_size=300, max_position_embeddings=16, **TINY)
    text = {**text, "validation_file": [str(tmp_path / "b.txt")]}
    blocks = prepare(text, "masked", config, tmp_path, max_eval_blocks=3)
    assert len(blocks.validation) == 3
    unknown = blocks.tokenizer.unk_token_id
    assert unknown in blocks.validation[0]["input_ids"]
    assert unknown not in blocks.train[0]["input_ids"]


def test_end_of_text_that_doubles_as_padding_is_trained_like_any_token(text, tmp_path: Path):
    """Llama and others never train the embedding of `pad_token_id`."""
    blocks = prepare(text, "causal", GPT2Config(vocab_size=300, n_positions=16, n_embd=12, n_head=2), tmp_path)
    assert blocks.tokenizer.pad_token_id == blocks.tokenizer.eos_token_id == blocks.config.eos_token_id
    assert blocks.config.pad_token_id is None


def test_a_vocabulary_smaller_than_the_tokenizer_grows_and_special_tokens_are_the_tokenizers(text, tmp_path: Path):
    tokenizer = train_byte_level_bpe(LINES, 290)
    tokenizer.add_special_tokens({"bos_token": "<start>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = GPT2Config(vocab_size=100, n_positions=16, n_embd=12, n_head=2)
    blocks = prepare(text, "causal", config, tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    assert blocks.config.vocab_size == len(tokenizer) > tokenizer.vocab_size > 256
    assert blocks.config.bos_token_id == tokenizer.convert_tokens_to_ids("<start>")
    assert blocks.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_a_stream_is_evaluated_on_rows_that_were_read_once(text, tmp_path: Path):
    config = BertConfig(vocab_size=300, max_position_embeddings=16, **TINY)
    streamed = prepare({**text, "validation_documents": 20}, "masked", config, tmp_path, True, max_eval_blocks=3)
    assert isinstance(streamed.train, IterableDataset)
    assert isinstance(streamed.validation, Dataset)
    assert len(streamed.validation) == 3
    other = prepare({**text, "validation_documents": 20}, "masked", config, tmp_path, True, seed=1)
    orders = [[block["input_ids"] for block in blocks.train] for blocks in (streamed, streamed, other)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_roberta_trains_on_all_the_positions_it_has_and_no_more(text, tmp_path: Path):
    """Its positions start after that of padding; one token too many would be outside the embedding."""
    blocks = prepare(text, "masked", RobertaConfig(vocab_size=300, max_position_embeddings=18, **TINY), tmp_path)
    assert blocks.block_size == 18 - blocks.tokenizer.pad_token_id - 1
    collator = masking_collator(blocks.tokenizer, MaskingArguments(), 0)
    model = build_model(AutoModelForMaskedLM, blocks.config)
    batch = collator(list(blocks.train.take(2)))
    assert torch.isfinite(model(**batch).loss)
    batch["input_ids"] = torch.cat([batch["input_ids"], batch["input_ids"][:, -1:]], dim=1)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=batch["input_ids"])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BertConfig(max_position_embeddings=512), 512),
        (GPT2Config(n_positions=1024), 1024),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (AutoConfig.for_model("xlm-roberta", max_position_embeddings=514, pad_token_id=1), 512),
        (MambaConfig(), None),
    ],
)
def test_context_lengths(config, expected: int | None):
    assert context_length(config) == expected


@pytest.mark.parametrize("name", ["data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet"])
def test_a_model_that_numbers_positions_from_padding_takes_its_whole_context_and_no_more(name: str):
    more = {"luke": {"entity_vocab_size": 9, "entity_emb_size": 12}, "longformer": {"attention_window": [4]}}
    sizes = {"vocab_size": 50, "max_position_embeddings": 18, "pad_token_id": 0, **TINY, **more.get(name, {})}
    config = AutoConfig.for_model(name, **sizes)
    model = AutoModelForMaskedLM.from_config(config)
    tokens = torch.full((1, context_length(config) + 1), 7)
    assert torch.isfinite(model(input_ids=tokens[:, 1:]).logits).all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=tokens)


@pytest.mark.parametrize(
    ("task", "config", "flags", "expected"),
    [
        ("masked", BertConfig(max_position_embeddings=16), {"block_size": 17}, r"context: .*at most 16, got 17"),
        ("causal", MambaConfig(), {}, r"'mamba' model has no longest sequence.*--block_size"),
        ("masked", BertConfig(max_position_embeddings=16), {"block_size": 2}, r"block_size must be at least 3.*got 2"),
        ("masked", BertConfig(), {"vocab_size": 10}, r"at least 257 tokens.*got 10"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(text, tmp_path: Path, task: str, config, flags: dict, expected: str):
    with pytest.raises(ConfigError, match=expected):
        prepare(text, task, config, tmp_path, **flags)


def test_a_tokenizer_without_a_mask_or_padding_token_is_refused(text, tmp_path: Path):
    tokenizer = train_byte_level_bpe(LINES, 290)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=r"no mask token.*<\|endoftext\|>.*--tokenizer"):
        prepare(text, "masked", BertConfig(), tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    tokenizer.mask_token, tokenizer.pad_token = "<mask>", None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    with pytest.raises(ConfigError, match=r"no padding token.*--tokenizer"):
        prepare(text, "masked", BertConfig(), tmp_path, tokenizer=str(tmp_path / "unpadded"))


def test_presets_of_another_task_and_blocks_that_teach_or_evaluate_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"expected one of bert-tiny.*got 'gpt2'"):
        prepare_blocks(BlockArguments(preset="gpt2"), TextArguments(), "masked", seed=0)
    with pytest.raises(ConfigError, match=r"--max_eval_blocks must be at least 1, got 0"):
        BlockArguments(preset="bert-tiny", max_eval_blocks=0)
    with pytest.raises(ConfigError, match=r"--block_size must be at least 2, got 1"):
        BlockArguments(preset="gpt-tiny", block_size=1)


def test_a_vocabulary_to_train_beside_a_tokenizer_that_is_there_is_refused():
    with pytest.raises(ConfigError, match=r"expected it or --tokenizer, got both \(300 and 'gpt2'\)"):
        BlockArguments(preset="gpt-tiny", tokenizer="gpt2", vocab_size=300)


def test_a_model_without_the_head_is_refused():
    with pytest.raises(ConfigError, match=r"a 'gpt2' model has no head for AutoModelForMaskedLM"):
        build_model(AutoModelForMaskedLM, GPT2Config(n_embd=12, n_head=2, n_layer=1))
    with pytest.raises(ConfigError, match=r"a 'vit' model has no head for AutoModelForCausalLM"):
        build_model(AutoModelForCausalLM, AutoConfig.for_model("vit"))


@pytest.mark.parametrize(("task", "auto_class"), [("causal", AutoModelForCausalLM), ("masked", AutoModelForMaskedLM)])
def test_an_encoder_sees_what_follows_unless_it_is_trained_as_a_causal_model(text, tmp_path: Path, task, auto_class):
    blocks = prepare(text, task, BertConfig(vocab_size=300, max_position_embeddings=16, **TINY), tmp_path)
    model = build_model(auto_class, blocks.config).eval()
    ids = torch.tensor(blocks.train[0]["input_ids"])[None]
    changed = ids.clone()
    changed[:, 8:] = 5
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, :8], model(changed).logits[:, :8]) == (task == "causal")


def _device_of_the_model() -> str:
    PartialState(cpu=True)
    return build_model(AutoModelForCausalLM, GPT2Config(n_embd=12, n_head=2, n_layer=1)).device.type


def test_only_the_main_process_of_all_nodes_holds_weights():
    assert run_ranks(_device_of_the_model, 2, node_size=1) == ["cpu", "meta"]
