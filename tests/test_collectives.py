"""Do the collectives of both hops move the right bits, the promised bytes, and no more memory than promised?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_mics.collectives import MiCSAllGather, MiCSReduceScatter
from hf_mics.errors import ConfigError, MiCSError
from hf_mics.hop2 import ReplicationGroup
from hf_mics.meter import Tally, TrafficMeter
from hf_mics.process_groups import HopGroups, hop_groups, say_to_all
from hf_mics.topology import Topology
from tests.on_ranks import Layout, on_ranks
from tests.toy import Pair

SPANNING = [Layout(4, 2, 4), Layout(6, 2, 6), Layout(8, 2, 8), Layout(8, 2, 4)]
FLAT = [Layout(4, 2, 2), Layout(4, 4, 4), Layout(4, 1, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
# Odd shards, a shard of one, and none at all: FSDP2 pads, and a rank may hold only padding.
SHARDS = [0, 1, 7, 129]
# A reduction over p ranks; factors of PREMUL_SUM are powers of 2, so that products with small integers are exact.
OPERATIONS = {"sum": ReduceOp.SUM, "avg": ReduceOp.AVG, "premul_sum": 0.25}
BF16_UNIT_ROUNDOFF = 2.0**-8
FP32_UNIT_ROUNDOFF = 2.0**-24


def groups_of(layout: Layout, *, hierarchical: bool = True) -> HopGroups:
    topology = Topology(world_size=layout.world, node_size=layout.node, partition_size=layout.partition)
    return hop_groups(layout.mesh, 1, topology, hierarchical=hierarchical)


def operation(name: str) -> Any:
    value = OPERATIONS[name]
    return dist._make_nccl_premul_sum(value) if isinstance(value, float) else value


def random_bits(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern, NaNs included: a gather must not look at its numbers."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def contribution(rank: int, numel: int, *, integers_times: int = 0) -> torch.Tensor:
    """What `rank` brings to a reduction; integers that are multiples of `integers_times` make every order exact."""
    generator = torch.Generator().manual_seed(1000 + rank)
    if integers_times:
        return integers_times * torch.randint(-4, 5, (numel,), generator=generator).float()
    return torch.randn(numel, generator=generator)


def my_slices(layout: Layout, shard: int, **kwargs: Any) -> torch.Tensor:
    """(p, shard): what every rank of this rank's partition group contributes to this rank's shard."""
    p, rank = layout.partition, dist.get_rank()
    first = rank // p * p
    rows = [contribution(peer, p * shard, **kwargs).view(p, shard)[rank % p] for peer in range(first, first + p)]
    return torch.stack(rows)


def scatter(groups: HopGroups, layout: Layout, data: torch.Tensor, op: Any, wire: torch.dtype, **kwargs: Any):
    comm = MiCSReduceScatter(groups, TrafficMeter(), wire)
    output = torch.full((data.numel() // layout.partition,), torch.nan)
    work = comm(output, data, groups.partition, op, **kwargs)
    if kwargs.get("async_op"):
        work.wait()
    return output


# -- all-gather --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("aliased", [False, True])
@on_ranks(*SPANNING, *FLAT)
def test_staged_flat_and_torchs_own_all_gather_agree_to_the_last_bit(layout: Layout, aliased: bool, async_op: bool):
    """`aliased`: as FSDP2 calls it, the input is a view of this rank's own place in the output."""
    p, shard_index = layout.partition, dist.get_rank() % layout.partition
    for dtype in DTYPES:
        for numel in SHARDS:
            mine = random_bits(dist.get_rank(), numel, dtype)
            outputs = []
            for hierarchical in (True, False):
                groups = groups_of(layout, hierarchical=hierarchical)
                comm = MiCSAllGather(groups, TrafficMeter())
                output = comm.allocate((p * numel,), dtype=dtype, device=torch.device("cpu"))
                assert output.dtype == dtype
                shard = mine.clone()
                if aliased:
                    shard = output[shard_index * numel : (shard_index + 1) * numel]
                    shard.copy_(mine)
                work = comm(output, shard, groups.partition, async_op=async_op)
                assert (work is not None) == async_op
                if work is not None:
                    work.wait()
                    assert work.is_completed()
                outputs.append(output)
            reference = torch.empty(p * numel, dtype=dtype)
            dist.all_gather_into_tensor(reference, mine, group=layout.mesh.get_group(1))
            expected = torch.cat([random_bits(peer, numel, dtype) for peer in peers(layout)])
            for output in (*outputs, reference):
                assert torch.equal(bits(output), bits(expected)), (dtype, numel)


def peers(layout: Layout) -> range:
    first = dist.get_rank() // layout.partition * layout.partition
    return range(first, first + layout.partition)


class Allocations(TorchDispatchMode):
    """Bytes of every storage that appears in a result and was in no argument, largest first."""

    def __enter__(self) -> Allocations:
        self._seen: dict[int, torch.UntypedStorage] = {}
        self._known: dict[int, torch.UntypedStorage] = {}
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in filter(torch.is_tensor, tree_leaves((args, kwargs))):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._known[storage._cdata] = storage
        result = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._seen[storage._cdata] = storage  # kept alive, so that no later one is taken for it
        return result

    def sizes(self) -> list[int]:
        return sorted((storage.nbytes() for storage in self._seen.values()), reverse=True)


@on_ranks(*SPANNING)
def test_a_staged_gather_takes_one_extra_buffer_of_one_kth_of_the_unit(layout: Layout):
    groups, numel = groups_of(layout), 77
    output, shard = torch.empty(layout.partition * numel), torch.randn(numel)
    with Allocations() as allocations:
        MiCSAllGather(groups, TrafficMeter())(output, shard, groups.partition)
    assert allocations.sizes() == [output.nbytes // layout.node], (allocations.sizes(), output.nbytes)


@on_ranks(*FLAT)
def test_a_flat_gather_takes_no_extra_buffer(layout: Layout):
    groups = groups_of(layout)
    output, shard = torch.empty(layout.partition * 77), torch.randn(77)
    with Allocations() as allocations:
        MiCSAllGather(groups, TrafficMeter())(output, shard, groups.partition)
    assert allocations.sizes() == []


@on_ranks(*SPANNING, *FLAT)
def test_a_gather_is_counted_where_it_runs(layout: Layout):
    for hierarchical in (True, False):
        groups, meter = groups_of(layout, hierarchical=hierarchical), TrafficMeter()
        output, shard = torch.empty(layout.partition * 5, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.bfloat16)
        MiCSAllGather(groups, meter)(output, shard, groups.partition)
        MiCSReduceScatter(groups, meter, torch.bfloat16)(torch.empty(5), output, groups.partition, ReduceOp.SUM)
        p, k, m = layout.partition, layout.node, layout.partition // layout.node
        for phase in ("all_gather", "reduce_scatter"):
            counted = {scope: tally for (key, scope), tally in meter.read().items() if key == phase}
            if hierarchical and layout in SPANNING:
                assert counted == {"inter_node": Tally(1, 10 * (m - 1)), "intra_node": Tally(m, 10 * m * (k - 1))}
            else:
                assert counted == {"partition": Tally(1, 10 * (p - 1))}


@on_ranks(*SPANNING, *FLAT)
def test_exchanges_send_the_bytes_that_are_counted_and_gathers_between_nodes_are_no_exchange(layout: Layout):
    for hierarchical in (True, False):
        groups, meter, sent = groups_of(layout, hierarchical=hierarchical), TrafficMeter(), []

        def isend(tensor: torch.Tensor, *args: Any, real: Any = dist.isend, **kwargs: Any) -> Any:
            sent.append(tensor.nbytes)
            return real(tensor, *args, **kwargs)

        output = torch.zeros(5 * layout.partition)
        with mock.patch.object(dist, "isend", isend):
            MiCSReduceScatter(groups, meter, torch.bfloat16)(torch.empty(5), output, groups.partition, ReduceOp.SUM)
            assert sum(sent) == sum(tally.bytes_sent for tally in meter.read().values()) > 0
            sent.clear()
            meter.reset()
            MiCSAllGather(groups, meter)(output, torch.zeros(5), groups.partition)
        inside = "partition" if layout.partition <= layout.node else "intra_node"
        assert sum(sent) == meter.read().get(("all_gather", inside), Tally()).bytes_sent


@on_ranks(*SPANNING[:1], *FLAT)
def test_collectives_end_when_the_slowest_rank_has_sent(layout: Layout):
    groups, p, rank = groups_of(layout), layout.partition, dist.get_rank()
    gather, reduce = MiCSAllGather(groups, TrafficMeter()), MiCSReduceScatter(groups, TrafficMeter(), torch.float32)
    expected = torch.cat([contribution(peer, 9) for peer in peers(layout)])
    for late in range(p):
        output, sums = torch.full((p * 9,), torch.nan), torch.full((9,), torch.nan)
        if rank % p == late:
            time.sleep(0.05)
        gather(output, contribution(rank, 9), groups.partition)
        assert torch.equal(output, expected)
        dist.barrier()
        if rank % p == late:
            time.sleep(0.05)
        reduce(sums, contribution(rank, p * 9, integers_times=1), groups.partition, ReduceOp.SUM)
        assert torch.equal(sums, my_slices(layout, 9, integers_times=1).sum(0))


@on_ranks(Layout(4, 2, 4), Layout(4, 2, 2))
def test_every_collective_is_timed_as_its_hop_and_a_deferred_one_while_it_is_awaited_too(layout: Layout):
    spans: list[str] = []

    @contextmanager
    def span(hop: str, device: torch.device) -> Iterator[None]:
        assert device.type == "cpu"
        spans.append(hop)
        yield

    for hierarchical in (True, False):
        groups, meter = groups_of(layout, hierarchical=hierarchical), TrafficMeter()
        meter.clock = SimpleNamespace(span=span)
        output = torch.zeros(5 * layout.partition)
        MiCSAllGather(groups, meter)(output, torch.zeros(5), groups.partition)
        MiCSReduceScatter(groups, meter, torch.float32)(torch.empty(5), output, groups.partition, ReduceOp.SUM)
        assert spans == ["hop1", "hop1"]
        spans.clear()
    if layout.world > layout.partition:
        group = ReplicationGroup(layout.mesh.get_group(0), torch.bfloat16, meter)
        for group.defers, expected in ((False, ["hop2"]), (True, ["hop2", "hop2"])):
            dist.all_reduce(torch.zeros(3), group=group)
            group.finish()
            assert spans == expected
            spans.clear()


@on_ranks(*SPANNING)
def test_staged_collectives_use_the_groups_between_and_inside_nodes(layout: Layout):
    """The counts above are the caller's; this looks at the groups that torch itself was asked for."""
    groups = groups_of(layout)
    inter, intra = groups.inter_node, groups.intra_node
    assert inter is not None
    assert intra is not None
    t, rank = groups.topology, dist.get_rank()
    assert tuple(dist.get_process_group_ranks(inter)) == next(g for g in t.inter_node_groups if rank in g)
    assert tuple(dist.get_process_group_ranks(intra)) == next(g for g in t.intra_node_groups if rank in g)


# -- reduce-scatter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
@on_ranks(*SPANNING)
def test_staged_and_flat_reduce_scatter_agree_to_the_last_bit_in_fp32(layout: Layout, name: str):
    """Both add node by node and, inside a node, rank by rank: the same sums in the same order."""
    for shard in SHARDS:
        data = contribution(dist.get_rank(), layout.partition * shard)
        staged, flat = (
            scatter(groups_of(layout, hierarchical=h), layout, data, operation(name), torch.float32)
            for h in (True, False)
        )
        assert torch.equal(staged, flat), (shard, (staged - flat).abs().max())


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
@on_ranks(*SPANNING, *FLAT)
def test_reduce_scatter_of_integers_is_exact(layout: Layout, name: str, async_op: bool):
    """Averages too where p divides every addend. At most 8 x 4 x 8 = 256: bf16's 8 bits hold every sum on its way."""
    p = layout.partition
    for hierarchical in (True, False):
        for wire in (torch.float32, torch.bfloat16):
            for shard in SHARDS:
                data = contribution(dist.get_rank(), p * shard, integers_times=p)
                total = my_slices(layout, shard, integers_times=p).sum(0)
                expected = {"sum": total, "avg": total / p, "premul_sum": total * 0.25}[name]
                groups = groups_of(layout, hierarchical=hierarchical)
                got = scatter(groups, layout, data, operation(name), wire, async_op=async_op)
                assert torch.equal(got, expected), (hierarchical, wire, shard)


@on_ranks(*SPANNING, *FLAT)
def test_fp32_on_the_wire_rounds_like_any_fp32_sum(layout: Layout):
    """Adding p numbers in fp32 in any order errs by at most (p-1) u sum|x|, and one division by u more."""
    slices = my_slices(layout, 129).double()
    data = contribution(dist.get_rank(), layout.partition * 129)
    got = scatter(groups_of(layout), layout, data, ReduceOp.AVG, torch.float32).double()
    # Two divisions in the staged form, hence p + 1.
    bound = (layout.partition + 1) * FP32_UNIT_ROUNDOFF * slices.abs().mean(0)
    assert ((got - slices.mean(0)).abs() <= bound).all()


@pytest.mark.parametrize("hierarchical", [True, False])
@on_ranks(*SPANNING, *FLAT)
def test_bf16_on_the_wire_rounds_once_per_hop_and_adds_up_in_fp32(layout: Layout, hierarchical: bool):
    """bf16 keeps 8 bits, so rounding errs by at most u = 2^-8 of a number.

    Flat, each addend is rounded once and the sum is fp32: |error| <= u mean|x|. Staged, the node's sum is rounded
    again before it goes to the other nodes: 2u + u^2. fp32 additions change this by less than 1 %.
    """
    slices = my_slices(layout, 129).double()
    data = contribution(dist.get_rank(), layout.partition * 129)
    got = scatter(groups_of(layout, hierarchical=hierarchical), layout, data, ReduceOp.AVG, torch.bfloat16)
    staged = hierarchical and layout in SPANNING
    u = BF16_UNIT_ROUNDOFF
    bound = 1.01 * (2 * u + u * u if staged else u) * slices.abs().mean(0)
    error = (got.double() - slices.mean(0)).abs()
    assert (error <= bound).all(), (error / bound).max()
    assert error.max() > 16 * FP32_UNIT_ROUNDOFF, "bf16 was asked to travel"
    assert got.dtype == torch.float32
    assert (got != got.bfloat16()).any(), "the sum must keep more bits than travelled"


@on_ranks(Layout(4, 2, 4), Layout(4, 2, 2))
def test_many_tiny_addends_survive_because_partial_sums_are_fp32(layout: Layout):
    """1 + (p-1)/512 is not a bf16 number: a sum held in bf16 would stay at 1."""
    p = layout.partition
    value = 1.0 if dist.get_rank() % p == 0 else 1.0 / 512
    got = scatter(groups_of(layout, hierarchical=False), layout, torch.full((p,), value), ReduceOp.SUM, torch.bfloat16)
    assert got.item() == 1.0 + (p - 1) / 512


@on_ranks(Layout(4, 2, 4), Layout(4, 2, 2))
def test_fp64_on_the_wire_is_added_up_in_fp64(layout: Layout):
    """1 + (p-1)/2^40 is not an fp32 number."""
    p = layout.partition
    value = 1.0 if dist.get_rank() % p == 0 else 2.0**-40
    for hierarchical in (True, False):
        groups, total = groups_of(layout, hierarchical=hierarchical), torch.zeros(1, dtype=torch.float64)
        comm = MiCSReduceScatter(groups, TrafficMeter(), torch.float64)
        comm(total, torch.full((p,), value, dtype=torch.float64), groups.partition, ReduceOp.SUM)
        assert total.item() == 1.0 + (p - 1) * 2.0**-40


@on_ranks(Layout(4, 2, 4), Layout(4, 2, 2))
def test_the_input_of_a_reduction_is_allocated_in_the_wire_dtype_and_its_output_in_the_dtype_asked(layout: Layout):
    """Every time, also after a unit of another size: FSDP2 asks for both through one method."""
    comm = MiCSReduceScatter(groups_of(layout), TrafficMeter(), torch.bfloat16)
    p, device = layout.partition, torch.device("cpu")
    for shard in (7 * p, 7, 7, 3, 1, 0):
        first = comm.allocate((p * shard,), dtype=torch.float32, device=device)
        second = comm.allocate((shard,), dtype=torch.float32, device=device)
        assert (first.numel(), second.numel()) == (p * shard, shard)
        assert second.dtype == torch.float32
        assert first.dtype == torch.bfloat16 or shard == 0


@on_ranks(Layout(4, 2, 1))
def test_gradients_of_a_group_of_one_rank_do_not_travel_and_keep_their_dtype(layout: Layout):
    """FSDP2 asks for one buffer only, and adds up in it."""
    comm = MiCSReduceScatter(groups_of(layout), TrafficMeter(), torch.bfloat16)
    for numel in (7, 7, 3):
        assert comm.allocate((numel,), dtype=torch.float32, device=torch.device("cpu")).dtype == torch.float32


@on_ranks(*SPANNING[:1], *FLAT)
def test_an_unknown_reduction_is_refused_before_anything_is_sent(layout: Layout):
    groups, meter = groups_of(layout), TrafficMeter()
    comm = MiCSReduceScatter(groups, meter, torch.float32)
    for op in (ReduceOp.MAX, ReduceOp.PRODUCT):
        with pytest.raises(MiCSError, match="SUM, AVG and PREMUL_SUM, got .*(MAX|PRODUCT)"):
            comm(torch.empty(3), torch.zeros(3 * layout.partition), groups.partition, op)
    assert meter.read() == {}


@on_ranks(*SPANNING, *FLAT)
def test_works_that_are_waited_for_later_keep_their_results_apart(layout: Layout):
    groups = groups_of(layout)
    gather, reduce = MiCSAllGather(groups, TrafficMeter()), MiCSReduceScatter(groups, TrafficMeter(), torch.float32)
    p, rank = layout.partition, dist.get_rank()
    outputs = [torch.empty(p * 9) for _ in range(2)]
    shards = [contribution(rank + 100 * i, 9) for i in range(2)]
    sums, data = torch.empty(9), contribution(rank, p * 9, integers_times=1)
    works = [gather(outputs[0], shards[0], groups.partition, async_op=True)]
    works.append(reduce(sums, data, groups.partition, ReduceOp.SUM, async_op=True))
    works.append(gather(outputs[1], shards[1], groups.partition, async_op=True))
    added_before = works[1].is_completed()
    for work in works:
        work.wait()
    assert not added_before
    assert all(work.is_completed() for work in works)
    for i, output in enumerate(outputs):
        assert torch.equal(output, torch.cat([contribution(peer + 100 * i, 9) for peer in peers(layout)]))
    assert torch.equal(sums, my_slices(layout, 9, integers_times=1).sum(0))


# -- process groups ----------------------------------------------------------------------------------------------------


@on_ranks(Layout(4, 2, 4))
def test_a_second_model_on_the_same_mesh_finds_the_first_ones_groups(layout: Layout):
    assert groups_of(layout) is groups_of(layout)
    flat = groups_of(layout, hierarchical=False)
    assert flat.inter_node is None
    assert flat.intra_node is None


@on_ranks(Layout(4, 2, 2))
def test_every_rank_raises_what_the_first_that_cannot_say_raised(layout: Layout):
    assert say_to_all(dist.get_rank) == [0, 1, 2, 3]

    def say() -> int:
        if dist.get_rank() in (1, 2):
            raise ConfigError(f"rank {dist.get_rank()} cannot say")
        return dist.get_rank()

    with pytest.raises(ConfigError, match="rank 1 cannot say"):
        say_to_all(say)


# -- hop 2 -------------------------------------------------------------------------------------------------------------

REPLICATED = [Layout(4, 2, 2), Layout(6, 2, 2), Layout(8, 2, 4)]


@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.AVG])
@on_ranks(*REPLICATED)
def test_hop_2_in_bf16_equals_casting_around_the_all_reduce(layout: Layout, op: Any):
    inner = layout.mesh.get_group(0)
    mine = contribution(dist.get_rank(), 131)
    got, expected = mine.clone(), mine.bfloat16()
    dist.all_reduce(got, group=ReplicationGroup(inner, torch.bfloat16, TrafficMeter()), op=op)
    dist.all_reduce(expected, group=inner, op=op)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected.float())


@on_ranks(*REPLICATED)
def test_hop_2_in_fp32_equals_the_all_reduce_itself(layout: Layout):
    inner = layout.mesh.get_group(0)
    got = contribution(dist.get_rank(), 131)
    expected = got.clone()
    work = dist.all_reduce(got, group=ReplicationGroup(inner, torch.float32, TrafficMeter()), async_op=True)
    work.wait()
    dist.all_reduce(expected, group=inner)
    assert torch.equal(got, expected)


@on_ranks(*REPLICATED)
def test_hop_2_counts_twice_all_but_one_nth_of_what_travels(layout: Layout):
    replicas = layout.world // layout.partition
    place = dist.get_rank() // layout.partition
    for wire in (torch.float32, torch.bfloat16):
        meter = TrafficMeter()
        group = ReplicationGroup(layout.mesh.get_group(0), wire, meter)
        for _ in range(3):
            dist.all_reduce(torch.zeros(replicas * 10), group=group)
        expected = Tally(3, 3 * 2 * (replicas - 1) * 10 * wire.itemsize)
        assert meter.read() == {("all_reduce", "replication"): expected}
    assert (group.rank(), group.size()) == (place, replicas)


class Deaf(dist.ProcessGroup):
    """A group whose all-reduce raises."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        raise TimeoutError("cable pulled between replicas")


@on_ranks(Layout(4, 2, 2))
def test_hop_2_of_a_single_replica_does_not_communicate(layout: Layout):
    meter, tensor = TrafficMeter(), contribution(0, 9)
    before = tensor.clone()
    for op in (ReduceOp.SUM, ReduceOp.AVG):
        dist.all_reduce(tensor, group=ReplicationGroup(Deaf(1), torch.bfloat16, meter), op=op)
    assert torch.equal(tensor, before), "not even rounded to what would travel"
    assert meter.read() == {}


@on_ranks(Layout(4, 2, 2))
def test_an_error_of_the_network_reaches_the_user_unmasked(layout: Layout):
    for wire in ("float32", "bfloat16"):
        pair = Pair(layout, wire=wire)
        for unit in pair.engine.units:
            unit.replication_group.inner = Deaf(2)
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="cable pulled between replicas") as caught:
            pair.window(0)
        assert time.monotonic() - start < 5
        assert caught.value.__suppress_context__, "torch's error about the group it does not know"


@on_ranks(Layout(4, 2, 2))
def test_an_error_that_is_not_the_networks_passes_even_after_one_that_was(layout: Layout):
    group = ReplicationGroup(Deaf(2), torch.float32, TrafficMeter())
    for _ in range(2):
        with pytest.raises(ValueError, match="of the user's own"), group.unmasked_errors():
            raise ValueError("of the user's own")
        with pytest.raises(TimeoutError), group.unmasked_errors():
            dist.all_reduce(torch.zeros(3), group=group)
