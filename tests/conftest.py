"""What holds for every test: one thread, no hub, examples that are the same on every run, GPUs for GPU tests alone."""

from __future__ import annotations

import os

# Before torch is imported, here and in the ranks' forkserver, which inherits them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

from hf_mics.testing import start_server

settings.register_profile("hf_mics", deadline=None, derandomize=True, database=None)
settings.load_profile("hf_mics")


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs unless `-m gpu` asks for them: accelerate would put the CPU tests' models there."""
    if config.option.markexpr.strip() != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Loads what ranks need while the tests are collected."""
    if not session.config.option.collectonly:
        start_server("tests.preloaded")
