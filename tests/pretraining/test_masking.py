"""Are masks drawn anew in every epoch, and from nothing but the seed, the epoch and the block?"""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, TrainerControl, TrainerState, TrainingArguments

from hf_mics.errors import ConfigError
from hf_mics.pretraining.masking import CountEpochs, MaskingArguments, MaskingCollator, mask_once, masking_collator
from hf_mics.pretraining.text import pack
from hf_mics.pretraining.tokenization import train_wordpiece

LINES = [f"Sentence number {number} has a few extraordinary words in it, or not." for number in range(400)]
BLOCK_TOKENS = 32


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_wordpiece(LINES, 90)  # so few that words fall into several tokens


@pytest.fixture(scope="module")
def blocks(tokenizer: PreTrainedTokenizerFast) -> list[dict]:
    return list(pack(Dataset.from_dict({"text": LINES}), tokenizer, BLOCK_TOKENS, with_offsets=True))


def collator(tokenizer: PreTrainedTokenizerFast, whole_words: bool = False, seed: int = 0) -> MaskingCollator:
    return masking_collator(tokenizer, MaskingArguments(whole_word_mask=whole_words), seed)


def without_offsets(blocks: list[dict]) -> list[dict]:
    return [{"input_ids": block["input_ids"]} for block in blocks]


@pytest.mark.parametrize("whole_words", [False, True])
def test_masks_do_not_depend_on_who_meets_the_block_with_which_others_or_when(tokenizer, blocks, whole_words: bool):
    together = collator(tokenizer, whole_words)(blocks[:8])
    alone = collator(tokenizer, whole_words)
    torch.manual_seed(123)
    backwards = [alone([block]) for block in reversed(blocks[:8])][::-1]
    for name in ("input_ids", "labels"):
        assert torch.equal(together[name], torch.cat([batch[name] for batch in backwards]))


def test_masks_change_with_the_epoch_and_the_seed_which_are_told_apart(tokenizer, blocks):
    first = collator(tokenizer)
    zero = first(without_offsets(blocks))["labels"]
    first.epoch.fill_(1)
    one = first(without_offsets(blocks))["labels"]
    other_seed = collator(tokenizer, seed=1)(without_offsets(blocks))["labels"]
    assert not torch.equal(zero, one)
    assert not torch.equal(zero, other_seed)
    assert torch.equal(zero, collator(tokenizer)(without_offsets(blocks))["labels"])
    swapped = []
    for seed, epoch in ((1, 11), (11, 1)):
        masks = collator(tokenizer, seed=seed)
        masks.epoch.fill_(epoch)
        swapped.append(masks(without_offsets(blocks))["labels"])
    assert not torch.equal(*swapped)


def test_a_data_loader_worker_that_outlives_the_epoch_masks_anew(tokenizer, blocks):
    masks = collator(tokenizer)
    loader = DataLoader(
        without_offsets(blocks)[:4], batch_size=4, collate_fn=masks, num_workers=1, persistent_workers=True
    )
    (zero,) = loader
    masks.epoch.fill_(1)
    (one,) = loader
    assert not torch.equal(zero["labels"], one["labels"])


@pytest.mark.parametrize("probability", [0.15, 0.3])
def test_share_of_masked_tokens_and_what_becomes_of_them(tokenizer, blocks, probability: float):
    masks = masking_collator(tokenizer, MaskingArguments(mask_probability=probability), seed=0)
    batch = masks(without_offsets(blocks))
    before = torch.tensor([block["input_ids"] for block in blocks])
    is_masked = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_masked], before[is_masked])
    assert torch.equal(batch["input_ids"][~is_masked], before[~is_masked])
    inner = before.ne(tokenizer.cls_token_id) & before.ne(tokenizer.sep_token_id)
    assert not (is_masked & ~inner).any()
    # Shares of n independent draws: 5 standard deviations, sqrt(p (1 - p) / n) each.
    n = int(inner.sum())
    assert n > 5000
    deviation = (probability * (1 - probability) / n) ** 0.5
    assert is_masked.sum().item() / n == pytest.approx(probability, abs=5 * deviation)
    m = int(is_masked.sum())
    replaced = (batch["input_ids"][is_masked] == tokenizer.mask_token_id).sum().item() / m
    assert replaced == pytest.approx(0.8, abs=5 * (0.8 * 0.2 / m) ** 0.5 + 1 / len(tokenizer))


def test_special_tokens_of_every_kind_are_never_to_be_guessed(tokenizer):
    ids = [*tokenizer.all_special_ids, *range(len(tokenizer) - 10, len(tokenizer))] * 20
    batch = masking_collator(tokenizer, MaskingArguments(mask_probability=0.9), seed=0)([{"input_ids": ids}])
    is_special = torch.isin(torch.tensor([ids]), torch.tensor(tokenizer.all_special_ids))
    assert torch.equal(batch["input_ids"][is_special], torch.tensor([ids])[is_special])
    assert (batch["labels"][is_special] == -100).all()
    assert (batch["labels"][~is_special] != -100).any()


@pytest.mark.filterwarnings("error:Random token replacement")
def test_whole_words_are_masked_as_wholes(tokenizer, blocks):
    """And replaced by nothing but [MASK], of which transformers need not warn."""
    batch = collator(tokenizer, whole_words=True)(blocks)
    assert (batch["input_ids"][batch["labels"] != -100] == tokenizer.mask_token_id).all()
    some_long = 0
    for block, labels in zip(blocks, batch["labels"].tolist(), strict=True):
        words: list[list[int]] = []
        previous_end = None
        for token, (start, end), label in zip(block["input_ids"], block["offset_mapping"], labels, strict=True):
            if token in tokenizer.all_special_ids:
                previous_end = None
                continue
            if start != previous_end:
                words.append([])
            words[-1].append(label)
            previous_end = end
        assert all(len({label == -100 for label in word}) == 1 for word in words)
        some_long += sum(len(word) > 2 and word[0] != -100 for word in words)
    assert some_long > 10


def test_single_tokens_are_masked_without_the_option(tokenizer, blocks):
    """The counterpart: words are broken up, so the test above can tell."""
    labels = collator(tokenizer)(without_offsets(blocks))["labels"][:, 1:-1]
    starts = torch.tensor([block["offset_mapping"] for block in blocks])[:, 1:-1]
    is_inside_word = starts[:, 1:, 0] == starts[:, :-1, 1]
    assert (is_inside_word & (labels[:, 1:] == -100) & (labels[:, :-1] != -100)).any()


def test_evaluation_asks_the_same_every_time(tokenizer, blocks):
    masks = collator(tokenizer)
    held_out = mask_once(Dataset.from_list(without_offsets(blocks[:6])), masks)
    assert held_out.column_names == ["input_ids", "labels"]
    first = masks(list(held_out))
    masks.epoch.fill_(7)
    second = masks(list(held_out))
    assert all(torch.equal(first[name], second[name]) for name in ("input_ids", "labels"))
    assert (first["labels"] != -100).any()


def test_epochs_are_counted_over_streams_and_resumed_runs(tokenizer, tmp_path):
    """The Trainer's own count stays below 1 while a stream is gone through again, and starts late in a resumed run."""
    masks = collator(tokenizer)
    arguments, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()

    def epochs(*states: float) -> list[int]:
        counter, seen = CountEpochs(masks), []
        for epoch in states:
            counter.on_epoch_begin(arguments, TrainerState(epoch=epoch), control)
            seen.append(int(masks.epoch))
        return seen

    assert epochs(0, 1.0, 2.0) == [0, 1, 2]
    assert epochs(0, 0.4, 0.8) == [0, 1, 2]
    assert epochs(3.6, 4.0) == [3, 4]


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1, 15])
def test_a_probability_that_teaches_nothing_is_refused(probability: float):
    with pytest.raises(ConfigError, match=r"--mask_probability must be between 0 and 1.*got"):
        MaskingArguments(mask_probability=probability)
