"""Runs a recipe, then reports what hop 2 did: `run_recipe.py REPORT_FOLDER mics|alone RECIPE [flags] [--then flags]`.

"alone" takes MiCS out: the stock Trainer without a callback, or accelerate's own Accelerator, in one process. `--then`
runs the recipe again in the same processes, which saves their start.
"""

import json
import runpy
import sys
from itertools import groupby
from pathlib import Path

import accelerate
from transformers import TrainerCallback

import hf_mics

folder, mode, script = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
runs = [list(flags) for ends, flags in groupby(sys.argv[4:], "--then".__eq__) if not ends]
engines = []
if mode == "alone":

    class PlainAccelerator(accelerate.Accelerator):
        """Accelerate's own, with what only a MiCSAccelerator has as nothing."""

        def save_with_checkpoints(self, *companions):
            pass

        def should_stop(self):
            return False

    hf_mics.MiCSCallback, hf_mics.MiCSAccelerator = TrainerCallback, PlainAccelerator
else:
    from hf_mics.engine import MiCSEngine

    original = MiCSEngine.__init__

    def remember(self, *args, **kwargs):
        original(self, *args, **kwargs)
        engines.append(self)

    MiCSEngine.__init__ = remember

for flags in runs:
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")

if engines:
    from accelerate import PartialState

    calls = [
        {"units": len(e.units), **{"/".join(key): tally.calls for key, tally in e.meter.read().items()}}
        for e in engines
    ]
    (folder / f"rank{PartialState().process_index}.json").write_text(json.dumps(calls))
