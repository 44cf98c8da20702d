"""What the recipes share: text, tokenizers, metrics and results. Which accelerator trains is the recipes' choice."""
