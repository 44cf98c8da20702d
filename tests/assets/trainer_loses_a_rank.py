"""A Trainer script one of whose ranks is killed in the second optimizer step: `trainer_loses_a_rank.py RANK`."""

import os
import signal
import sys
import tempfile

import torch.distributed as dist
from transformers import TrainerCallback

from hf_mics import MiCSCallback, MiCSPlugin
from tests.assets.trainer_door import make_trainer


class Die(TrainerCallback):
    """Ends this process as the kernel does when memory runs out."""

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1 and dist.get_rank() == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)


callbacks = [Die(), MiCSCallback(MiCSPlugin(partition_size=2))]
make_trainer("gpt2", tempfile.mkdtemp(), 2, callbacks, max_steps=4, eval_strategy="no").train()
