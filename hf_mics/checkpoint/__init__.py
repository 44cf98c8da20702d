"""Checkpoints that a crash never costs, that move between layouts, and that become a Hugging Face folder."""
