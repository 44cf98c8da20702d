"""What holds for every test: one thread, no hub, examples that are the same on every run."""

from __future__ import annotations

import os

# Before torch is imported, here and in the ranks' forkserver, which inherits them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

settings.register_profile("hf_mics", deadline=None, derandomize=True, database=None)
settings.load_profile("hf_mics")
