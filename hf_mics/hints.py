"""What does an error of torch's mean that names neither shards nor the way out?"""

from __future__ import annotations

import functools
import sys
from types import TracebackType

# What torch says where a whole tensor meets a shard, and where a part of the model runs before the model ever did.
_SIGNS = ("mixed torch.Tensor and DTensor", "'FSDPCommContext' object has no attribute")

_HINT = (
    "MiCS: outside the model's own forward its weights are shards (DTensors). A part of the model that is called by "
    "itself, and a method other than forward, find those: torch.distributed.fsdp.register_fsdp_forward_method(model, "
    "name) after prepare(). A copy of the weights from before prepare() meets whole ones in param.full_tensor(), on "
    "every rank. Each habit and what it needs: docs/scripts.md."
)


@functools.cache  # once
def explain_shards() -> None:
    """From now on an uncaught error of torch's that comes from shards is followed by what to do."""
    former = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        former(kind, error, trace)
        if any(sign in str(error) for sign in _SIGNS):
            print(_HINT, file=sys.stderr, flush=True)

    sys.excepthook = excepthook
