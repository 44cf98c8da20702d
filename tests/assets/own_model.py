"""A model whose code is not in transformers: it is saved with the weights, for `trust_remote_code`."""

from transformers import GPT2LMHeadModel


class OwnModel(GPT2LMHeadModel):
    """GPT-2 by another name."""


OwnModel.register_for_auto_class("AutoModelForCausalLM")
