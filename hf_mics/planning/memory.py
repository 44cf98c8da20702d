"""How many bytes of one GPU's memory does a training step need, and what for?

Closed form, from the tensors that PyTorch's autograd and FSDP2 keep, counted per token and layer for each family. Four
moments are compared, because which one holds the peak depends on the shape: the loss, the backward of the last layer,
that of the first one, and the end of backward, where the root's gradients are whole.

Left out: the CUDA context and NCCL's buffers (the decimal GB of data sheets leave about as much again), fragmentation
(the reserve stands for both), dropout masks, padding masks, temporaries of an optimizer that updates all tensors at
once (the Trainer's fused AdamW has none), and what the user's script keeps. Attention is taken to keep no scores, as
the flash and memory-efficient kernels do; V100s have the latter only. Under CPU offload, which no tracked run has
checked, also one unit's shard on its way to the GPU, and the host's memory beyond the three fp32 values that it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from hf_mics.errors import ConfigError
from hf_mics.planning.timing import System
from hf_mics.planning.workload import ModelShape, Unit, Workload
from hf_mics.topology import Topology

Kind = Literal["parameters", "gradients", "optimizer", "activations", "communication"]
MEMORY_KINDS: tuple[Kind, ...] = ("parameters", "gradients", "optimizer", "activations", "communication")

# fp32 values that the optimizer keeps for each parameter.
_STATES = {"adamw": 2, "sgd-momentum": 1, "sgd": 0}
# DistributedDataParallel reduces buckets of 25 MB, two of them in flight.
_DDP_BUCKETS_BYTES = 2 * 25 * 2**20
# What the loss holds of its most before backward: logits as computed, in fp32, and their logarithms, of three in fp32.
_FORWARD_LOGITS = 10 / 12


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one GPU by kind, the moment of the peak, and bytes of host memory per GPU under CPU offload."""

    memory_bytes: dict[Kind, float]
    moment: str
    host_bytes: float = 0.0

    @property
    def total_bytes(self) -> float:
        """All kinds together."""
        return sum(self.memory_bytes.values())


def peak_memory(
    workload: Workload, topology: Topology, *, system: System = "mics", hierarchical: bool = True
) -> Memory:
    """The peak of one GPU.

    Args:
        topology: the groups; its partition size must be the system's own (1 for "ddp", the world for ZeRO).
        system: "mics"; "hsdp" holds the same but for hierarchical buffers; "zero3" is one partition group of all GPUs;
            "zero2" besides keeps a whole copy of the parameters in the precision of computation; "ddp" keeps
            everything, parameters and gradients in fp32, and has no CPU offload.

    Under CPU offload the fp32 shards, their optimizer state and the reduced gradients live on the host. On the GPU stay
    a whole copy for computation and the partial sums that wait for hop 2, which the host has a copy of too.

    Raises:
        ConfigError: CPU offload with "ddp".
    """
    if system == "ddp" and workload.cpu_offload:
        raise ConfigError(
            "DistributedDataParallel keeps parameters and optimizer state on the GPU: leave out --cpu-offload, or plan "
            "mics, hsdp, zero3 or zero2."
        )
    shards = _Shards(workload, topology, staged=hierarchical and system == "mics" and topology.is_hierarchical)
    whole = system in ("zero2", "ddp")
    moments = _moments(workload, shards, gathers=not whole)
    static = shards.static(workload)
    if system == "zero2":
        static["parameters"] += workload.compute_bytes * workload.model.num_parameters
    if system == "ddp":
        # autocast keeps a copy of every weight in 16 bits from forward to backward.
        static["parameters"] += 2 * workload.model.num_parameters if workload.compute_bytes == 2 else 0
        moments = {
            name: {**moment, "gradients": shards.fp32(), "communication": _DDP_BUCKETS_BYTES}
            for name, moment in moments.items()
        }
    name = max(moments, key=lambda key: sum(moments[key].values()))
    peak: dict[Kind, float] = {kind: static.get(kind, 0.0) + moments[name].get(kind, 0.0) for kind in MEMORY_KINDS}
    host = 0.0
    if workload.cpu_offload:
        host = shards.fp32() + peak["optimizer"] + shards.fp32()
        peak["parameters"] -= shards.fp32()
        peak["optimizer"] = 0.0
    return Memory(peak, name, host)


class _Shards:
    """Sizes of the model on these groups, in bytes."""

    def __init__(self, workload: Workload, topology: Topology, *, staged: bool) -> None:
        self._p = topology.partition_size
        self._node = topology.node_size
        self._width = workload.compute_bytes
        self._staged = staged
        self._offloads = workload.cpu_offload
        self.replicates = topology.replication_size > 1
        units = workload.model.units
        self._padded = padded_total(workload.model, self._p)
        self.root = self.gathered(units[0])
        self.embedding = sum(self.gathered(unit) for unit in units if unit.kind == "embedding")
        self.head = sum(self.gathered(unit) for unit in units if unit.kind == "head")
        layers = [unit for unit in units if unit.kind == "layer"]
        self.layer = max(self.gathered(unit) for unit in layers)
        self.first_layer, self.last_layer = self.gathered(layers[0]), self.gathered(layers[-1])
        self.layers_fp32 = self.fp32() - 4.0 * sum(
            unit.padded_numel(self._p) / self._p for unit in units if unit.kind != "layer"
        )

    def gathered(self, unit: Unit) -> float:
        """A whole unit as it is gathered."""
        return float(self._width * unit.padded_numel(self._p))

    def fp32(self) -> float:
        """One fp32 value for each parameter of this GPU's shard."""
        return 4.0 * self._padded / self._p

    def staging(self, size: float) -> float:
        """The buffer of a hierarchical collective of `size` bytes: one shard for each node of the group."""
        return size / self._node if self._staged else 0.0

    def leaving(self, size: float) -> float:
        """The reduced fp32 gradients of a unit of `size` gathered bytes on their way to the host, under CPU offload."""
        return 4.0 * size / self._width / self._p if self._offloads else 0.0

    def static(self, workload: Workload) -> dict[Kind, float]:
        """What is there all the time."""
        return {"parameters": self.fp32(), "optimizer": _STATES[workload.optimizer] * self.fp32()}


@lru_cache(maxsize=4096)
def padded_total(model: ModelShape, partition_size: int) -> int:
    """Elements of all units' shards together, padded."""
    counts: dict[tuple[tuple[int, int], ...], int] = {}
    for unit in model.units:
        counts[unit.matrices] = counts.get(unit.matrices, 0) + 1
    return sum(n * Unit("", "layer", matrices).padded_numel(partition_size) for matrices, n in counts.items())


class LayerActivations(NamedTuple):
    """Bytes of one layer for a micro-batch.

    `input` is what activation checkpointing keeps, `saved` what is kept without it (or while the layer is recomputed),
    `backward` the gradients of activations on top of that at the worst moment of its backward, and `late` what is left
    when the feed-forward, `ffn_share` of the parameters, has its gradients and only the attention's backward remains.
    """

    input: float
    saved: float
    backward: float
    late: float
    ffn_share: float


def layer_activations(workload: Workload, *, decoder: bool = False) -> LayerActivations:
    """What a layer keeps; `decoder` asks for T5's decoder.

    Counted in the autograd graphs of transformers 5.23, in elements of the computing precision per token unless it says
    bytes; fp32 norms of Llama and T5 keep 4-byte copies.
    """
    m, width = workload.model, workload.compute_bytes
    tokens = float(workload.tokens_per_micro_step)
    h, f, a, kv = m.hidden_size, m.ffn_size, m.attention_width, m.kv_width
    log_sums = 4.0 * m.num_heads
    if m.family == "gpt":
        # Norms keep input and output; gelu_new keeps four tensors of the feed-forward width, its output is the fifth.
        saved = width * (4 * h + 3 * a + a + 5 * f) + log_sums
        backward = width * (h + 2 * f)
    elif m.family == "bert":
        saved = width * (4 * h + 4 * a + 2 * f) + log_sums
        backward = width * max(4 * h, h + f)
    elif m.family == "llama":
        norms = (18 if width == 2 else 24) * h
        saved = norms + width * (2 * a + 2 * kv + 4 * f) + log_sums
        backward = width * (h + 2 * f)
    else:
        return _t5_layer(workload, decoder)
    attention = saved - width * (4 if m.family == "llama" else 5 if m.family == "gpt" else 2) * f
    late = attention + width * (2 * h + (3 * f if m.family == "llama" else f))
    products = (3 if m.family == "llama" else 2) * h * f
    share = products / (products + 2 * h * a + 2 * h * kv)
    return LayerActivations(tokens * width * h, tokens * saved, tokens * backward, tokens * late, share)


def _t5_layer(workload: Workload, decoder: bool) -> LayerActivations:
    m, width = workload.model, workload.compute_bytes
    tokens = float(workload.tokens_per_micro_step)
    h, f, a = m.hidden_size, m.ffn_size, m.attention_width
    norm = (10 if width == 2 else 12) * h
    attentions = 2 if decoder else 1
    # The gated feed-forward runs gelu_new, which keeps four tensors; ReLU keeps its output, which the product reads.
    ffn = width * (8 * f if m.gated_ffn else f)
    saved = (attentions + 1) * norm + attentions * (width * 4 * a + 4.0 * m.num_heads) + ffn
    # The layer's copy of the bias of positions, in the decoder with the mask on it. It is one for the whole batch; its
    # gradient is not.
    bias = _position_bias(workload)
    bias_saved = bias + (workload.seq_length**2 if decoder else 0)
    # Of the gated feed-forward's eight tensors, enough are freed by the time that the gradients of others exist.
    backward = tokens * width * (h + (0 if m.gated_ffn else 2 * f))
    late = tokens * (attentions * norm + width * (4 * attentions * a + 2 * h))
    late += workload.micro_batch * bias + bias_saved
    products = (3 if m.gated_ffn else 2) * h * f
    share = products / (products + 4 * attentions * h * a)
    return LayerActivations(tokens * width * h, tokens * saved + bias_saved, backward, late, share)


def _position_bias(workload: Workload) -> float:
    """T5's bias of positions: one score for each head and pair of tokens, the same for the whole batch."""
    return float(workload.compute_bytes * workload.model.num_heads * workload.seq_length**2)


def _shared_biases(workload: Workload) -> tuple[float, float]:
    """T5's biases of positions that all layers of a stack share: (until the decoder's end, in the encoder's backward).

    Recomputed layers are given those of encoder, decoder and cross attention; the last is kept without recomputation
    too, and all zeros. A stack's first layer makes them, so one of one layer is given none, and a decoder of one has
    only cross attention's. The first layer's gradient of its stack's bias adds up from the last layer's on.
    """
    m = workload.model
    if m.family != "t5":
        return 0.0, 0.0
    bias = _position_bias(workload)
    if not workload.activation_checkpointing:
        return bias, bias
    encoder, decoder = min(m.num_layers - 1, 1), min(m.num_decoder_layers, 2)
    return (encoder + decoder) * bias, 2 * encoder * bias


def _head_activations(workload: Workload) -> tuple[float, float]:
    """(what the head keeps besides logits, logits and their gradients at the worst moment of the loss)."""
    m, width, tokens = workload.model, workload.compute_bytes, float(workload.tokens_per_micro_step)
    norm = {"gpt": 2 * width, "bert": 4 * width, "llama": 8 if width == 2 else 12, "t5": 10 if width == 2 else 12}
    # GPT and Llama widen logits to fp32 before the loss; three copies live at once.
    logits = (12 if m.family in ("gpt", "llama") else 3 * width) * m.vocab_size
    return tokens * norm[m.family] * m.hidden_size, tokens * logits


def _moments(workload: Workload, shards: _Shards, *, gathers: bool) -> dict[str, dict[Kind, float]]:
    m, width = workload.model, workload.compute_bytes
    encoder = layer_activations(workload)
    last = layer_activations(workload, decoder=True) if m.family == "t5" else encoder
    kept, kept_last = ((layer.input if workload.activation_checkpointing else layer.saved) for layer in (encoder, last))
    head, logits = _head_activations(workload)
    encoder_end = head if m.family == "t5" else 0.0
    layers = m.num_decoder_layers if m.family == "t5" else m.num_layers
    biases, tail_biases = _shared_biases(workload)
    before_last = (layers - 1) * kept_last + (m.num_layers * kept + encoder_end if m.family == "t5" else 0.0) + biases
    # CPU offload sends reduced gradients to the host at once, where micro-steps add up (FSDP2's foreach_reduce). Only
    # partial sums, which wait for hop 2, add up on the GPU.
    offloads = workload.cpu_offload
    sums = shards.fp32() if workload.accumulation > 1 and (shards.replicates or not offloads) else 0.0
    reduced = 0.0 if offloads else shards.layers_fp32
    tied_gradient = float(width * m.vocab_size * m.hidden_size) if m.tied_embeddings else 0.0
    stays = shards.root if gathers else 0.0
    moments: dict[str, dict[Kind, float]] = {
        "loss": {
            "gradients": sums,
            "activations": before_last + kept_last + head + logits,
            "communication": stays + (shards.head or shards.last_layer) if gathers else 0.0,
        },
        "end of backward": {
            "gradients": (sums or reduced)
            + (3 * tied_gradient or shards.embedding)
            + shards.leaving(shards.first_layer),
            "communication": (stays if gathers else shards.root) + shards.first_layer + shards.embedding,
        },
        "optimizer step": {"gradients": 0.0 if offloads else shards.fp32()},
    }
    if gathers and shards.head:
        # Of the last unit to be gathered, FSDP2 keeps the buffer too until the next gather, which is backward's.
        moments["forward of the head"] = {
            "gradients": sums,
            "activations": before_last + kept_last + head + logits * _FORWARD_LOGITS,
            "communication": stays + 2 * shards.head,
        }
    # Between the two, what is kept shrinks by a layer's activations and gradients grow by a layer's sums, evenly.
    head_end = _Backward("backward of the last layer", last, shards.last_layer, shards.layer, before_last, sums)
    tail_end = _Backward(
        "backward of the first layer",
        encoder,
        shards.first_layer,
        # The last to arrive is the embedding, where it is a unit of its own; the one before it was a layer.
        max(shards.embedding, shards.layer),
        tail_biases,
        sums or reduced,
    )
    ends = [head_end, tail_end]
    if m.family == "t5" and layers > 1:
        # From here on there is the gradient of the bias that the decoder's layers share.
        before = before_last - kept_last + _position_bias(workload)
        ends.append(head_end._replace(name="backward of the second to last layer", before=before))
    for backward in ends:
        moments |= backward.moments(tied_gradient, stays, shards, gathers=gathers)
    return moments


class _Backward(NamedTuple):
    """The backward of one layer: `size` gathered, `arriving` the next unit's, `before` what earlier layers keep."""

    name: str
    layer: LayerActivations
    size: float
    arriving: float
    before: float
    sums: float

    def moments(
        self, tied_gradient: float, stays: float, shards: _Shards, *, gathers: bool
    ) -> dict[str, dict[Kind, float]]:
        """Three of them: all activations are there; the feed-forward is done; all gradients are there.

        The layer is gathered, the next one arrives, and the former one's reduce-scatter has yet to end.
        """
        buffers = stays + (self.size + self.arriving if gathers else 0.0) + self.size + shards.staging(self.size)
        layer = self.layer
        return {
            f"{self.name}{when}": {
                "gradients": self.sums + tied_gradient + gradients * self.size + shards.leaving(self.size),
                "activations": self.before + activations,
                "communication": buffers,
            }
            for when, gradients, activations in (
                ("", 0.0, layer.saved + layer.backward),
                (", attention", layer.ffn_share, layer.late),
                (", end", 1.0, 2 * layer.input),
            )
        }
