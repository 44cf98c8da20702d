"""What did an optimizer step cost: tokens, model FLOPS, and the time and bytes of hop 1 and hop 2?

Computes, never logs. Evaluation and saving between optimizer steps are left out of every figure.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_mics.clock import CollectiveClock
from hf_mics.engine import MiCSEngine
from hf_mics.meter import Key, Tally
from hf_mics.throughput import flops_per_token, throughput_metrics
from hf_mics.traffic import StepTraffic, node_bytes


class TrainingMeter:
    """Measures the optimizer steps of one model under MiCS, from construction until `close`.

    Args:
        model: the root module.
        engine: its engine, whose collectives are timed from now on.
    """

    def __init__(self, model: nn.Module, engine: MiCSEngine) -> None:
        self._model = model
        self._engine = engine
        self._clock = engine.meter.clock = CollectiveClock()
        self._hook = model.register_forward_pre_hook(torch.compiler.disable(self._count_tokens), with_kwargs=True)
        self._shape = _model_shape(model)
        self._before: dict[Key, Tally] = {}
        self._start_s = self._pause_s = time.perf_counter()
        self._clear()

    def begin_step(self) -> None:
        """Call before the first micro-step of an accumulation window."""
        self._before = self._engine.meter.read()
        self._clock.running = True

    def end_step(self) -> None:
        """Call after the optimizer step."""
        self._clock.running = False
        for key, tally in self._engine.meter.read().items():
            before = self._before.get(key, Tally())
            added = Tally(tally.calls - before.calls, tally.bytes_sent - before.bytes_sent)
            self._sent[key] = self._sent.get(key, Tally()) + added
        self._steps += 1
        self._pause_s = time.perf_counter()

    def skip_pause(self) -> None:
        """Leaves the time since the last optimizer step (or the last call of this) out: evaluation, saving."""
        now = time.perf_counter()
        self._start_s += now - self._pause_s
        self._pause_s = now

    def collect(self) -> dict[str, float]:
        """Figures of the optimizer steps since the last call; a collective, empty when there were none.

        Means over ranks, per optimizer step where they are times or bytes; GB are 10^9 bytes. See docs/trainer.md.
        """
        steps, seconds = self._steps, time.perf_counter() - self._start_s
        if steps == 0:
            return {}
        hops = self._clock.read()
        sent = StepTraffic(self._sent, {})
        crossed = node_bytes(self._engine.topology, self._sent, backend=self._engine.backend)
        mine = [*map(float, (self._tokens, self._squares, sent.hop1_bytes, sent.hop2_bytes, crossed)), *hops.values()]
        everyone = torch.tensor(mine, dtype=torch.float64, device=self._engine.units[0].device)
        dist.all_reduce(everyone)
        tokens, squares, *costs = everyone.tolist()
        world = self._engine.topology.world_size
        hop1_bytes, hop2_bytes, crossed, hop1_s, hop2_s = (cost / world / steps for cost in costs)
        metrics = self._throughput(tokens, squares, seconds)
        metrics |= {"step_time_s": seconds / steps, "hop1_time_s": hop1_s, "hop2_time_s": hop2_s}
        metrics |= {
            "hop1_sent_gb": hop1_bytes / 1e9,
            "hop2_sent_gb": hop2_bytes / 1e9,
            "crossed_nodes_gb": crossed / 1e9,
        }
        self._clear()
        self._clock.reset()
        return metrics

    def close(self) -> None:
        """Stops counting and timing."""
        self._hook.remove()
        self._engine.meter.clock = None

    def _clear(self) -> None:
        self._steps = 0
        self._sent: dict[Key, Tally] = {}
        # Tokens, and the sum over tokens of the length of their sequence; tensors once a mask was counted.
        self._tokens: int | torch.Tensor = 0
        self._squares: int | torch.Tensor = 0
        self._start_s = self._pause_s = time.perf_counter()

    def _count_tokens(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
            return
        mask = kwargs.get("attention_mask")
        tokens = mask.sum() if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else ids.numel()
        self._tokens = self._tokens + tokens
        self._squares = self._squares + tokens * ids.shape[1]

    def _throughput(self, tokens: float, squares: float, seconds: float) -> dict[str, float]:
        if tokens == 0:
            return {}
        world = self._engine.topology.world_size
        if self._shape is None:
            return {"tokens_per_s_per_device": tokens / seconds / world}
        flops = flops_per_token(*self._shape, squares / tokens)
        metrics = throughput_metrics(tokens, seconds, flops, world)
        metrics.pop("tokens_per_s")
        return metrics


def _model_shape(model: nn.Module) -> tuple[float, int, int] | None:
    """(parameters, layers, width) for `flops_per_token`, None for models that do not say.

    A frozen weight costs no gradient of its own, one third of its 6 FLOP per token.
    """
    config = getattr(model, "config", None)
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not isinstance(layers, int) or not isinstance(width, int):
        return None
    parameters = sum(p.numel() * (1 if p.requires_grad else 2 / 3) for p in model.parameters())
    return parameters, layers, width
