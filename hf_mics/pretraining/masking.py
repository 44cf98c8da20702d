"""Which tokens does BERT have to guess, each time it sees a block?

Masks are drawn anew in every epoch (dynamic masking, as in RoBERTa), by transformers' own collator. What is masked in a
block depends on the seed, the epoch and the block alone: not on the rank that meets it, nor on what was drawn before.
So a run masks the same tokens on one process and on a thousand, and a resumed run goes on as if it had not stopped.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from hf_mics.errors import ConfigError


@dataclass(kw_only=True)
class MaskingArguments:
    """What a model has to guess."""

    mask_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are to be guessed."})
    whole_word_mask: bool = field(default=False, metadata={"help": "Mask whole words, not single tokens."})

    def __post_init__(self) -> None:
        if not 0 < self.mask_probability < 1:
            raise ConfigError(
                f"--mask_probability must be between 0 and 1, both excluded, got {self.mask_probability}."
            )


@dataclass
class MaskingCollator(DataCollatorForLanguageModeling):
    """Masks the blocks of a batch: 80 % of what is chosen becomes [MASK], 10 % another token, 10 % stays.

    With `whole_word_mask` all tokens of a chosen word are masked, words being what spaces separate, and all become
    [MASK] (transformers replaces by nothing else there); blocks need the column "offset_mapping". Blocks that have
    labels already, see `mask_once`, pass through. `seed` must be given.
    """

    def __post_init__(self) -> None:
        if self.whole_word_mask:
            self.mask_replace_prob, self.random_replace_prob = 1.0, 0.0
        super().__post_init__()
        # In shared memory, because workers of the data loader may outlive an epoch.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._special_ids = torch.tensor(self.tokenizer.all_special_ids)

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """Returns "input_ids" and "labels", -100 where nothing is masked; each of shape (blocks, tokens)."""
        if "labels" in examples[0]:
            return default_data_collator(examples)
        batch = super().torch_call(examples)
        return {name: batch[name] for name in ("input_ids", "labels")}  # no attention mask: nothing is padding

    def torch_mask_tokens(
        self, inputs: torch.Tensor, special_tokens_mask: Any = None, offset_mapping: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks each block with random numbers of its own, drawn from the seed, the epoch and its tokens."""
        special = torch.isin(inputs, self._special_ids)
        masked = []
        for i, block in enumerate(inputs.split(1)):
            own = zlib.crc32(block.numpy().tobytes(), zlib.crc32(f"{self.seed} {self.epoch}".encode()))
            self.generator = self.get_generator(own)
            offsets = None if offset_mapping is None else offset_mapping[i : i + 1]
            masked.append(super().torch_mask_tokens(block, special[i : i + 1], offsets))
        new_inputs, labels = zip(*masked, strict=True)
        return torch.cat(new_inputs), torch.cat(labels)


class CountEpochs(TrainerCallback):
    """Tells the collator which epoch it is, so that masks are new ones; a resumed run counts on."""

    def __init__(self, collator: MaskingCollator) -> None:
        self.collator, self.next_epoch = collator, 0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the Trainer's count, or its own where the Trainer has none (streams are one endless epoch to it)."""
        epoch = max(int(state.epoch or 0), self.next_epoch)
        self.collator.epoch.fill_(epoch)
        self.next_epoch = epoch + 1


def masking_collator(tokenizer: PreTrainedTokenizerBase, arguments: MaskingArguments, seed: int) -> MaskingCollator:
    """Returns the collator that masks as `arguments` say; `tokenizer` must have a token for masks."""
    return MaskingCollator(
        tokenizer, mlm_probability=arguments.mask_probability, whole_word_mask=arguments.whole_word_mask, seed=seed
    )


def mask_once(blocks: Dataset, collator: MaskingCollator) -> Dataset:
    """Returns the blocks with one mask for good, to evaluate on the same question every time."""
    batch = collator(list(blocks))
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in batch.items()})
