"""Does the same code train on GPUs over NCCL? `pytest -m gpu -rs`; skipped, with the reason, without GPUs or `-m gpu`.

Recent NCCL lets several ranks share one GPU, so a single one is enough for the coalesced two-stage path.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import GradScalerKwargs
from torch.distributed import ReduceOp
from torch.distributed.device_mesh import init_device_mesh

from hf_mics import MiCSAccelerator, MiCSPlugin, mics_engine
from hf_mics.collectives import MiCSAllGather, MiCSReduceScatter
from hf_mics.meter import TrafficMeter
from hf_mics.process_groups import hop_groups
from hf_mics.testing import run_ranks
from hf_mics.topology import Topology
from tests import tiny

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NCCL = torch.cuda.nccl.version() if GPUS else (0, 0, 0)
SHARES_A_GPU = NCCL >= (2, 32, 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="no CUDA device here, or run without -m gpu"),
]
four_ranks = pytest.mark.skipif(
    GPUS < 4 and not SHARES_A_GPU,
    reason=f"four NCCL ranks need four GPUs, or NCCL 2.32 to share one (here: {GPUS} GPUs, NCCL {NCCL})",
)
ENVIRONMENT = {} if GPUS >= 4 else {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}


def compare_collectives() -> None:
    """Staged and flat collectives against a reference that is exact: small integers in every dtype."""
    topology = Topology(world_size=4, node_size=2, partition_size=4)
    mesh = init_device_mesh("cuda", (1, 4), mesh_dim_names=("dp_replicate", "dp_shard"))
    rank, meter = dist.get_rank(), TrafficMeter()
    for hierarchical in (True, False):
        groups = hop_groups(mesh, 1, topology, hierarchical=hierarchical)
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            for numel in (1, 7, 4097):
                for async_op in (False, True):
                    output = torch.empty(4 * numel, dtype=dtype, device="cuda")
                    shard = output.chunk(4)[rank].fill_(rank + 1)
                    work = MiCSAllGather(groups, meter)(output, shard, groups.partition, async_op=async_op)
                    if work is not None:
                        work.wait()
                    expected = torch.arange(1, 5, device="cuda").repeat_interleave(numel).to(dtype)
                    assert torch.equal(output, expected)
        for wire in (torch.float32, torch.bfloat16):
            for op, scale in ((ReduceOp.SUM, 1.0), (ReduceOp.AVG, 0.25), (dist._make_nccl_premul_sum(0.5), 0.5)):
                contribution = torch.arange(4 * 9, device="cuda", dtype=torch.float32).remainder(8) * (rank + 1)
                output = torch.empty(9, device="cuda")
                MiCSReduceScatter(groups, meter, wire)(output, contribution.to(wire), groups.partition, op)
                total = torch.arange(4 * 9, device="cuda", dtype=torch.float32).remainder(8) * 10 * scale
                assert torch.equal(output, total.chunk(4)[rank])


@four_ranks
def test_staged_and_flat_collectives_over_nccl_equal_an_exact_reference() -> None:
    run_ranks(compare_collectives, 4, node_size=2, backend="nccl", environment=ENVIRONMENT)


def train(name: str, partition_size: int, steps: int, **kwargs: Any) -> dict[str, Any]:
    """Trains with 3 micro-steps per optimizer step on this rank's rows; returns losses, norms and weights."""
    accelerator = MiCSAccelerator(
        mics_plugin=MiCSPlugin(partition_size=partition_size), gradient_accumulation_steps=3, **kwargs
    )
    model = tiny.build(name)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    engine = mics_engine(model)
    losses, norms = [], []
    for step in range(3 * steps):
        rows = tiny.token_rows(2 * dist.get_world_size(), seed=step).chunk(dist.get_world_size())[dist.get_rank()]
        rows = rows.to(accelerator.device)
        with accelerator.accumulate(model):
            loss = model(input_ids=rows, labels=rows).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    traffic = engine.meter.read()
    engine_calls = {"/".join(key): tally.calls for key, tally in traffic.items()}
    return {
        "losses": losses,
        "norms": norms,
        "weights": {n: p.full_tensor().float().cpu() for n, p in model.named_parameters()},
        "calls": engine_calls,
        "units": len(engine.units),
    }


def train_alone(name: str, world_size: int, steps: int) -> dict[str, Any]:
    """The same in this process on the CPU, with nothing but torch."""
    model = tiny.build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, norms = [], []
    for step in range(3 * steps):
        rows = tiny.token_rows(2 * world_size, seed=step)
        loss = model(input_ids=rows, labels=rows).loss
        (loss / 3).backward()
        losses.append(loss.item())
        if step % 3 == 2:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.step()
            optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "weights": {n: p.detach() for n, p in model.named_parameters()}}


# TF32 is off by default for matmuls, so both sides compute in fp32; kernels order their additions differently, which
# moves sums of some hundred terms by about 1e-6 and, after 5 steps of rate 0.1, weights by about as much.
TOLERANCE = 1e-5


@four_ranks
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5"])
def test_four_nccl_ranks_on_the_hierarchical_path_train_as_one_process(name: str) -> None:
    ours = run_ranks(train, 4, name, 4, 5, node_size=2, backend="nccl", environment=ENVIRONMENT)[0]
    reference = train_alone(name, 4, 5)
    assert ours["losses"] == pytest.approx(reference["losses"], abs=TOLERANCE)
    assert ours["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    for key, weight in reference["weights"].items():
        assert torch.allclose(ours["weights"][key], weight, atol=TOLERANCE, rtol=0), key
    assert ours["calls"]["reduce_scatter/inter_node"] == 15 * ours["units"]


@four_ranks
def test_two_hop_over_nccl_runs_hop_2_once_per_optimizer_step() -> None:
    ours = run_ranks(train, 4, "gpt2", 2, 5, node_size=4, backend="nccl", environment=ENVIRONMENT)[0]
    assert ours["calls"]["all_reduce/replication"] == 5 * ours["units"]
    reference = train_alone("gpt2", 4, 5)
    assert ours["losses"] == pytest.approx(reference["losses"], abs=TOLERANCE)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_one_gpu_trains_in_every_precision(precision: str) -> None:
    ours = run_ranks(_train_on_one_gpu, 1, precision, backend="nccl")[0]
    reference = train_alone("gpt2", 1, 5)
    # bf16 keeps 8 bits of a loss of about 4: steps of 1/64 at worst, and fp16 11 bits.
    tolerance = {"no": TOLERANCE, "bf16": 0.05, "fp16": 0.02}[precision]
    assert ours["losses"] == pytest.approx(reference["losses"], abs=tolerance)


def _train_on_one_gpu(precision: str) -> dict[str, Any]:
    # The loss is fp16 too: at the scaler's own first scale, 65536, its gradient is inf, and a step would be skipped.
    handlers = [GradScalerKwargs(init_scale=1024.0)] if precision == "fp16" else []
    return train("gpt2", 1, 5, mixed_precision=precision, kwargs_handlers=handlers)
