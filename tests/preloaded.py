"""What do ranks find loaded when they are forked? What is slow to import and used by more than one test module."""

from __future__ import annotations

import gc
import threading

import datasets  # noqa: F401
import evaluate  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401
import sklearn.dummy
import sklearn.metrics  # noqa: F401
from tensorboard.backend.event_processing import event_accumulator  # noqa: F401
from torch.distributed import checkpoint  # noqa: F401
from torch.utils import tensorboard  # noqa: F401
from tqdm import tqdm

import hf_mics.callback
import hf_mics.checkpoint.export
import hf_mics.pretraining.results  # noqa: F401
from tests import tiny, toy  # noqa: F401

# Its own is a semaphore of the machine, which a rank that is killed leaves behind.
tqdm.set_lock(threading.RLock())
# A rank that collects garbage would otherwise copy every page that holds a Python object.
gc.collect()
gc.freeze()
