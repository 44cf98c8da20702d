"""Does `apply_mics` take every model that plain PyTorch or transformers sharded, and refuse what it cannot train?"""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_mics
from hf_mics import Topology, apply_mics, mics_engine, remove_mics
from hf_mics.engine import node_size_from_launcher
from hf_mics.errors import ConfigError, MiCSError, TopologyError
from hf_mics.summary import _size, start_up_summary
from hf_mics.testing import run_ranks
from tests import tiny
from tests.on_ranks import Layout, on_ranks
from tests.toy import (
    Net,
    Pair,
    assert_close,
    assert_same_on_all_ranks,
    batch,
    gradients,
    loss_of,
    my_part,
    shard,
    weights,
)

TWO_REPLICAS = Layout(4, 2, 2)
SPANNING = Layout(4, 2, 4)


def all_used() -> nn.Module:
    return Net(unused=False)


def refusal(function: Any, *args: Any, **kwargs: Any) -> MiCSError:
    """The error that `function` raises, checked to be the same on every rank and to come before any hang."""
    try:
        function(*args, **kwargs)
        outcome: Any = None
    except MiCSError as error:
        outcome = error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (type(outcome).__name__, str(outcome)))
    assert len(set(outcomes)) == 1, f"ranks do not fail alike: {outcomes}"
    assert outcome is not None, "nothing was raised"
    return outcome


# -- what it takes -----------------------------------------------------------------------------------------------------


@on_ranks(TWO_REPLICAS, SPANNING, Layout(4, 2, 1), Layout(4, 1, 2), Layout(4, 4, 2))
def test_it_returns_the_same_model_and_derives_the_topology_from_the_mesh(layout: Layout):
    model = shard(Net(), layout)
    assert apply_mics(model, node_size=layout.node) is model
    engine = mics_engine(model)
    assert engine.topology == Topology(world_size=4, node_size=layout.node, partition_size=layout.partition)
    assert [unit.name for unit in engine.units] == ["", "layers.0", "layers.1", "layers.2"]
    assert hf_mics.mics_engine(model) is engine


@on_ranks(TWO_REPLICAS)
def test_the_node_size_comes_from_the_launcher(layout: Layout):
    """These ranks were told that they stand on one node of 4."""
    assert node_size_from_launcher() == 4
    assert mics_engine(apply_mics(shard(Net(), layout))).topology.node_size == 4


@pytest.mark.parametrize(
    ("text", "expected"), [("2", 2), ("8", 8), ("0", None), ("two", None), ("-1", None), ("", None)]
)
def test_a_launcher_variable_that_is_no_number_of_ranks_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: int | None
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    if expected is not None:
        assert node_size_from_launcher() == expected
        return
    with pytest.raises(ConfigError, match=f"LOCAL_WORLD_SIZE must be the number of ranks on this node, got '{text}'"):
        node_size_from_launcher()


@on_ranks(SPANNING)
def test_collectives_are_staged_unless_flat_ones_are_asked_for(layout: Layout):
    scopes = {}
    for hierarchical in (True, False):
        pair = Pair(layout, hierarchical=hierarchical)
        pair.window(0, 1)
        scopes[hierarchical] = {scope for _, scope in pair.engine.meter.read()}
    assert scopes == {True: {"inter_node", "intra_node"}, False: {"partition"}}


@on_ranks(TWO_REPLICAS, SPANNING)
def test_a_model_that_already_trained_under_plain_fsdp2_goes_on_under_mics(layout: Layout):
    """FSDP2 settles dtypes at its first forward; joining later must reread them."""
    net = Net()
    model = shard(copy.deepcopy(net), layout)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, net)]
    for step in range(4):
        if step == 2:
            apply_mics(model, node_size=layout.node)
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1)
            rows = batch(step, micro, layout.world)
            loss_of(model, my_part(rows)).backward()
            loss_of(net, rows).backward()
        assert_close(gradients(model), {n: p.grad for n, p in net.named_parameters()})
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_close(weights(model), weights(net))


@on_ranks(TWO_REPLICAS)
def test_two_models_on_one_mesh_count_apart(layout: Layout):
    first, second = (Pair(layout, build=all_used) for _ in range(2))
    first.window(0, 1)
    assert second.engine.meter.read() == {}
    second.window(0, 1)
    assert second.engine.meter.read() == first.engine.meter.read() == first.engine.predict_step(1).per_rank


@on_ranks(TWO_REPLICAS, SPANNING)
def test_what_is_predicted_before_the_first_forward_is_what_a_step_sends(layout: Layout):
    """The start-up summary says it then; FSDP2 settles that the root keeps its parameters in the first forward only."""
    pair = Pair(layout, build=all_used)
    predicted = pair.engine.predict_step(3).per_rank
    pair.window(0)
    assert pair.engine.meter.read() == predicted


@on_ranks(TWO_REPLICAS, SPANNING)
def test_the_start_up_summary_says_what_is_predicted(layout: Layout):
    for hierarchical in (True, False):
        engine = Pair(layout, hierarchical=hierarchical).engine
        summary = start_up_summary(engine, ["3 Layer", "a (X) shares", "b (Y) shares"], micro_steps=3)
        step, nic = engine.predict_step(3), engine.predict_step(3).nic_bytes
        sent = f"sends {_size(step.hop1_bytes)} in hop 1 and {_size(step.hop2_bytes)} in hop 2"
        assert f"per optimizer step of 3 micro-steps each rank {sent}" in summary
        hop1 = nic["hop1_all_gather"] + nic["hop1_reduce_scatter"]
        assert f"carries {_size(hop1)} of hop 1 and {_size(nic['hop2_all_reduce'])} of hop 2" in summary
        spanning = f"hop 1 spans 2 nodes, {'hierarchical' if hierarchical else 'flat'}"
        assert (spanning if layout == SPANNING else "hop 1 inside each node") in summary
        assert summary.count("left in the root: ") == 2
    assert [_size(n) for n in (0, 999, 1234, 56_700, 8.9e9)] == ["0 B", "999 B", "1.23 kB", "56.7 kB", "8.9 GB"]


@on_ranks(TWO_REPLICAS)
def test_synchronization_switched_off_before_is_no_reason_to_train_nothing(layout: Layout):
    """FSDP2's own switch turns off both hops: before apply_mics on the whole model, and later on a part of it."""
    pair = Pair(layout, build=all_used)
    remove_mics(pair.mics)
    pair.mics.set_requires_gradient_sync(False)
    apply_mics(pair.mics, node_size=layout.node)
    pair.window(0)
    pair.assert_same_gradients()
    pair.step()
    pair.mics.layers[1].set_requires_gradient_sync(False)
    pair.window(1)
    pair.assert_same_gradients()
    pair.step()
    pair.assert_same_weights()


# -- a model that transformers sharded ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models by name."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gpt2", "gpt2-even"):
        model = tiny.build(name.removesuffix("-even"))
        if name.endswith("-even"):
            model.resize_token_embeddings(tiny.VOCABULARY + 1)
        model.save_pretrained(folder / name)
    return {path.name: str(path) for path in folder.iterdir()}


def train(model: nn.Module, part: Any, begin: Any) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for step in range(3):
        for micro in range(3):
            begin(micro == 2)
            rows = part(tiny.token_rows(8, seed=10 * step + micro))
            (model(input_ids=rows, labels=rows).loss / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def train_load_time_sharded(folder: str, partition: int) -> dict[str, Any]:
    config = DistributedConfig(fsdp_size=partition, dp_replicate_size=4 // partition)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    apply_mics(model, node_size=2)
    engine = mics_engine(model)
    rank = dist.get_rank()
    trained = train(model, lambda rows: rows.chunk(4)[rank], model.set_requires_gradient_sync)
    assert_same_on_all_ranks(trained)
    engine.meter.reset()
    for micro in range(2):
        model.set_requires_gradient_sync(micro == 1)
        rows = tiny.token_rows(8).chunk(4)[rank]
        model(input_ids=rows, labels=rows).loss.backward()
    return {
        "weights": trained,
        "counted": engine.meter.read(),
        "predicted": engine.predict_step(2).per_rank,
        "units": len(engine.units),
        "partition": engine.topology.partition_size,
    }


@pytest.mark.parametrize("name", ["llama", "gpt2-even"])
def test_a_model_that_transformers_sharded_at_load_time_trains_as_one_process(saved: dict[str, str], name: str):
    """Both start from the same files; SGD keeps rounding differences of 1e-7 from growing in 3 steps of rate 0.3."""
    partition = 2
    outcome = run_ranks(train_load_time_sharded, 4, saved[name], partition, node_size=2)
    twin = train(AutoModelForCausalLM.from_pretrained(saved[name]), lambda rows: rows, lambda closes: None)
    for record in outcome:
        assert record["partition"] == partition
        assert record["counted"] == record["predicted"]
        assert record["counted"]["all_reduce", "replication"].calls == record["units"]
        assert_close(record["weights"], twin, tolerance=2e-6)


def refuse_late_ties(folder: str) -> str:
    config = DistributedConfig(fsdp_size=2, dp_replicate_size=2)
    error = refusal(apply_mics, AutoModelForCausalLM.from_pretrained(folder, distributed_config=config), node_size=2)
    assert isinstance(error, ConfigError)
    return str(error)


def test_weights_tied_after_sharding_that_fsdp2_would_train_stale_are_refused(saved: dict[str, str]):
    """Transformers 5.23 ties GPT-2's head after sharding. With 61 rows on 2 ranks stock FSDP2 gathers a stale copy."""
    messages = run_ranks(refuse_late_ties, 4, saved["gpt2"], node_size=2)
    assert len(set(messages)) == 1
    assert "tied to one another after they had been sharded" in messages[0]


# -- what it refuses ---------------------------------------------------------------------------------------------------


@on_ranks(TWO_REPLICAS)
def test_a_model_that_is_not_sharded_is_refused(layout: Layout):
    error = refusal(apply_mics, Net(), node_size=2)
    assert isinstance(error, ConfigError)
    assert "Net is not sharded" in str(error)
    assert "fully_shard(layer, mesh=mesh)" in str(error)


@on_ranks(TWO_REPLICAS)
def test_a_model_of_which_only_parts_are_sharded_is_refused(layout: Layout):
    model = Net()
    fully_shard(model.layers[0], mesh=layout.mesh)
    error = refusal(apply_mics, model, node_size=2)
    assert isinstance(error, ConfigError)
    assert "only parts of this Net are sharded (1, the first 'layers.0'), not the model itself" in str(error)


@on_ranks(TWO_REPLICAS)
def test_ranks_of_several_hosts_that_nobody_counts_are_refused(layout: Layout):
    """As under srun, which exports no LOCAL_WORLD_SIZE: all hosts would be taken for one node."""
    model = shard(Net(), layout)
    with mock.patch("socket.gethostname", return_value=f"host{dist.get_rank() // 2}"):
        counted = mics_engine(apply_mics(model)).topology
        assert counted.node_size == 4, "the launcher's"
        remove_mics(model)
        with mock.patch.dict(os.environ):
            del os.environ["LOCAL_WORLD_SIZE"]
            error = refusal(apply_mics, model)
            assert isinstance(error, ConfigError)
            assert "runs on 2 hosts (host0, host1), but how many ranks each runs is not known" in str(error)
            assert mics_engine(apply_mics(model, node_size=2)).topology.node_size == 2


@on_ranks(TWO_REPLICAS)
def test_ranks_that_share_a_gpu_are_told_how_to_launch(layout: Layout):
    """NCCL finds it at the first collective, in words of its own; torch 2.13 raises them as below."""
    said = dist.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:95, invalid usage\nDuplicate GPU detected : rank 0 and 1"
    )
    model = shard(Net(), layout)
    with mock.patch("hf_mics.process_groups.dist.all_gather_object", side_effect=said), pytest.raises(ConfigError) as e:
        apply_mics(model, node_size=2)
    assert "several of the 4 ranks were given the same GPU" in str(e.value)
    assert "CUDA_VISIBLE_DEVICES=" in str(e.value)
    model, said = shard(Net(), layout), "NCCL error in: NCCLUtils.cpp:95, invalid usage\n"
    for words, error, told in (
        ("Duplicate GPU detected : rank 0 and rank 1", ConfigError, "several of the 4 ranks were given the same GPU"),
        ("Connection refused", dist.DistBackendError, "Connection refused"),
    ):
        failing = mock.Mock(side_effect=dist.DistBackendError(said + words))
        with mock.patch("hf_mics.process_groups.dist.all_gather_object", failing), pytest.raises(error, match=told):
            apply_mics(model, node_size=2)


@on_ranks(TWO_REPLICAS)
def test_a_model_on_a_1d_mesh_is_refused(layout: Layout):
    model = fully_shard(Net(), mesh=init_device_mesh("cpu", (4,)))
    error = refusal(apply_mics, model, node_size=2)
    assert isinstance(error, ConfigError)
    assert "1-D mesh without replicas" in str(error)
    assert "(replicas, partition_size)" in str(error)


@on_ranks(TWO_REPLICAS)
def test_units_on_different_meshes_are_refused(layout: Layout):
    model = Net()
    fully_shard(model.layers[0], mesh=SPANNING.mesh)
    fully_shard(model, mesh=layout.mesh)
    error = refusal(apply_mics, model, node_size=2)
    assert isinstance(error, ConfigError)
    assert "all units must be sharded on one mesh, got 2" in str(error)


@on_ranks(TWO_REPLICAS)
def test_a_second_apply_mics_is_refused_and_leaves_the_first_in_force(layout: Layout):
    pair = Pair(layout, build=all_used)
    error = refusal(apply_mics, pair.mics, node_size=2)
    assert isinstance(error, ConfigError)
    assert "already under MiCS" in str(error)
    pair.window(0)
    pair.assert_same_gradients()
    assert pair.engine.meter.read() == pair.engine.predict_step(3).per_rank


@on_ranks(TWO_REPLICAS)
def test_an_inner_module_of_a_model_under_mics_is_refused(layout: Layout):
    """Else its collectives would be installed, and counted, twice."""
    pair = Pair(layout)
    error = refusal(apply_mics, pair.mics.layers[0], node_size=2)
    assert "already under MiCS" in str(error)


@on_ranks(TWO_REPLICAS)
def test_a_mesh_in_unnatural_rank_order_is_refused(layout: Layout):
    mesh = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("dp_replicate", "dp_shard"))
    error = refusal(apply_mics, shard_on(mesh), node_size=2)
    assert isinstance(error, TopologyError)
    assert "expected partition groups [[0, 1], [2, 3]], got [[0, 2], [1, 3]]" in str(error)


def shard_on(mesh: DeviceMesh) -> nn.Module:
    return fully_shard(Net(), mesh=mesh)


@pytest.mark.parametrize(
    ("node_size", "message"),
    [
        (3, "world_size 4 = 1 x 3 + 1"),
        (0, "node_size must be a positive integer, got 0"),
        ("2", "node_size must be a positive integer, got '2'"),
        (8, "node_size must divide world_size"),
    ],
)
@on_ranks(TWO_REPLICAS)
def test_a_node_size_that_cannot_be_is_refused(layout: Layout, node_size: Any, message: str):
    error = refusal(apply_mics, shard(Net(), layout), node_size=node_size)
    assert isinstance(error, TopologyError)
    assert message in str(error)


@on_ranks(Layout(6, 3, 2))
def test_a_partition_group_that_straddles_nodes_is_refused_with_the_sizes_that_would_do(layout: Layout):
    error = refusal(apply_mics, shard(Net(), layout), node_size=3)
    assert isinstance(error, TopologyError)
    assert "partition_size 2 on nodes of 3" in str(error)
    assert "Valid partition sizes for 6 ranks on nodes of 3: 1, 3, 6." in str(error)


@pytest.mark.parametrize("wire", ["bf16", "float16", None, torch.bfloat16])
@on_ranks(TWO_REPLICAS)
def test_an_unknown_wire_dtype_is_refused(layout: Layout, wire: Any):
    error = refusal(apply_mics, shard(Net(), layout), node_size=2, gradient_wire_dtype=wire)
    assert isinstance(error, ConfigError)
    assert "must be one of auto, float32, bfloat16" in str(error)
    assert repr(wire) in str(error)


@on_ranks(TWO_REPLICAS)
def test_a_refused_model_can_still_be_put_under_mics(layout: Layout):
    pair_model = shard(Net(), layout)
    for wrong in ({"node_size": 3}, {"node_size": 2, "gradient_wire_dtype": "fp8"}):
        refusal(apply_mics, pair_model, **wrong)
    apply_mics(pair_model, node_size=2)
    remove_mics(pair_model)


@on_ranks(TWO_REPLICAS)
def test_the_engine_of_a_model_that_is_not_under_mics_is_refused(layout: Layout):
    model = shard(Net(), layout)
    for function in (mics_engine, remove_mics):
        assert "is not under MiCS" in str(refusal(function, model))


@pytest.mark.parametrize("name", ["node_size", "hierarchical", "gradient_wire_dtype"])
@on_ranks(TWO_REPLICAS)
def test_settings_that_differ_between_ranks_are_refused_on_all_of_them(layout: Layout, name: str):
    """Some ranks would create subgroups and others not, or send other sizes: a hang. Compared before that."""
    settings = {"node_size": (2, 1), "hierarchical": (True, False), "gradient_wire_dtype": ("auto", "bfloat16")}[name]
    mine = {"node_size": 2, name: settings[dist.get_rank() // 2]}
    error = refusal(apply_mics, shard(Net(), layout), **mine)
    assert isinstance(error, TopologyError)
    assert f"(node_size, hierarchical, gradient_wire_dtype) differ between ranks (rank 0: {(2, True, 'auto')};" in str(
        error
    )


@on_ranks(TWO_REPLICAS)
def test_a_mesh_beside_another_kind_of_parallelism_is_refused(layout: Layout):
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("tp", "dp_replicate", "dp_shard"))
    error = refusal(apply_mics, shard_on(mesh["dp_replicate", "dp_shard"]), node_size=2)
    assert isinstance(error, TopologyError)
    assert "must hold every rank of the job: expected 4, got 2" in str(error)


# -- timeouts ----------------------------------------------------------------------------------------------------------


@on_ranks(TWO_REPLICAS, SPANNING)
def test_every_group_has_the_timeout_that_the_user_gave_the_job(layout: Layout):
    def timeout_of(group: Any) -> timedelta:
        return group._get_backend(torch.device("cpu")).options._timeout

    usual = timeout_of(dist.group.WORLD)
    assert timeout_of(dist.new_group()) == usual
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=77))
    try:
        assert timeout_of(dist.new_group()) == timedelta(minutes=30), "torch's subgroups do not follow the job's"
        pair = Pair(layout)
        for unit in pair.engine.units:
            groups = unit._group._all_gather_comm._groups
            used = [unit.replication_group.inner, groups.partition, groups.inter_node, groups.intra_node]
            assert {timeout_of(group) for group in used if group is not None} == {timedelta(seconds=77)}
    finally:
        dist.distributed_c10d._set_pg_timeout(usual)
        Pair(layout)  # the groups are cached: gives them the usual timeout back
