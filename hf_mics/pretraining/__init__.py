"""What the recipes share: text, tokenizers and metrics. None of it knows about MiCS."""
