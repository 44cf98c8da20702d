"""Does a classifier start from any Hugging Face folder, decoders without padding included, or from nothing?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_mics.errors import ConfigError
from hf_mics.pretraining.classifiers import load_classifier, tokenize
from hf_mics.pretraining.tokenization import train_byte_level_bpe, train_wordpiece

TEXTS = ["a short one", "a much longer text, which does not fit into so few tokens", "another"]
NAMES = ["no", "yes", "perhaps"]


def save_bert(folder: Path, dtype: torch.dtype = torch.float32, vocab_size: int = 90) -> str:
    train_wordpiece(TEXTS * 5, 80).save_pretrained(folder)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
    )
    BertForMaskedLM(config).to(dtype).save_pretrained(folder)
    return str(folder)


def logits(model, tokenizer, texts: list[str]) -> torch.Tensor:
    rows = tokenize(Dataset.from_dict({"text": texts, "label": [0] * len(texts)}), tokenizer, model, None)
    batch = DataCollatorWithPadding(tokenizer)(list(rows))
    assert batch.pop("labels").tolist() == [0] * len(texts)
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_a_pretrained_encoder_keeps_its_weights_and_gets_a_head_with_names(tmp_path: Path):
    folder = save_bert(tmp_path, torch.bfloat16)
    model, tokenizer = load_classifier(folder, (), NAMES)
    pretrained = BertForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, pretrained.bert.embeddings.word_embeddings.weight)
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert logits(model, tokenizer, TEXTS).shape == (3, 3)


def test_a_decoder_is_padded_without_changing_its_answers(tmp_path: Path):
    train_byte_level_bpe(TEXTS * 5, 300).save_pretrained(tmp_path)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=12, n_head=2, n_layer=1, n_positions=64, **ids)).save_pretrained(
        tmp_path
    )
    model, tokenizer = load_classifier(str(tmp_path), (), NAMES)
    alone = torch.cat([logits(model, tokenizer, [text]) for text in TEXTS])
    # The same sums; attention over padding adds exact zeros, but in blocks of another size.
    assert torch.allclose(logits(model, tokenizer, TEXTS), alone, atol=1e-6)


def test_a_classifier_of_other_classes_gets_a_new_head(tmp_path: Path):
    folder = save_bert(tmp_path / "a")
    model, tokenizer = load_classifier(folder, (), NAMES)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "b")
    again, _ = load_classifier(str(tmp_path / "b"), (), ["left", "right"])
    assert again.config.label2id == {"left": 0, "right": 1}
    assert again.classifier.out_features == 2


def test_without_a_model_a_tiny_bert_starts_afresh():
    model, tokenizer = load_classifier(None, TEXTS * 5, NAMES)
    assert model.config.model_type == "bert"
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert logits(model, tokenizer, TEXTS).shape == (3, 3)


def test_texts_are_cut_to_what_the_model_takes(tmp_path: Path):
    model, tokenizer = load_classifier(save_bert(tmp_path), (), NAMES)
    rows = Dataset.from_dict({"text": [*TEXTS, None], "label": [0] * 4})
    assert max(map(len, tokenize(rows, tokenizer, model, None)["input_ids"])) == 12
    assert max(map(len, tokenize(rows, tokenizer, model, 5)["input_ids"])) == 5
    for length in (2, 13):
        with pytest.raises(ConfigError, match=rf"--max_length must be from 3 to 12.*got {length}"):
            tokenize(rows, tokenizer, model, length)
    tokenizer.model_max_length = 7  # what a model was pretrained on, of more positions
    assert max(map(len, tokenize(rows, tokenizer, model, None)["input_ids"])) == 7


def test_texts_are_cut_to_512_tokens_where_nobody_says_and_the_model_takes_more(tmp_path: Path):
    model, tokenizer = load_classifier(save_bert(tmp_path), (), NAMES)
    model.config.max_position_embeddings = tokenizer.model_max_length = 2000
    rows = Dataset.from_dict({"text": ["one " * 1500], "label": [0]})
    assert len(tokenize(rows, tokenizer, model, None)["input_ids"][0]) == 512
    assert len(tokenize(rows, tokenizer, model, 1000)["input_ids"][0]) == 1000


def test_what_cannot_be_fine_tuned_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no tokenizer.*'/no/such'"):
        load_classifier("/no/such", (), NAMES)
    with pytest.raises(ConfigError, match=r"do not belong together: expected at most 20 tokens, got"):
        load_classifier(save_bert(tmp_path / "small", vocab_size=20), (), NAMES)
    train_wordpiece(TEXTS * 5, 80).save_pretrained(tmp_path / "only")
    with pytest.raises(ConfigError, match=r"no model to fine-tune.*only"):
        load_classifier(str(tmp_path / "only"), (), NAMES)
    (tmp_path / "only" / "mics_checkpoint.json").touch()
    with pytest.raises(ConfigError, match=r"It is a training checkpoint: `hf-mics export .*only FOLDER`"):
        load_classifier(str(tmp_path / "only"), (), NAMES)
    train_wordpiece(TEXTS * 5, 80).save_pretrained(tmp_path / "vit")
    ViTForImageClassification(
        ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    ).save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError, match=r"no model to fine-tune.*vit"):
        load_classifier(str(tmp_path / "vit"), (), NAMES)
