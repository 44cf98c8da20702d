"""Do save_state and load_state resume bit-equal, move between layouts and formats, and write each byte once?"""

from __future__ import annotations

import contextlib
import errno
import itertools
import pickle
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import ProjectConfiguration
from torch import nn
from torch.distributed.checkpoint.planner import LoadItemType

from hf_mics import MiCSPlugin
from hf_mics.checkpoint import storage
from hf_mics.checkpoint.accelerate_state import convert_schedules
from hf_mics.checkpoint.mark import read_mark
from hf_mics.checkpoint.resuming import continue_random_state
from hf_mics.checkpoint.storage import EXCHANGED_BYTES, READ_BYTES, NodeReader, Share
from hf_mics.errors import CheckpointError, MiCSError
from hf_mics.testing import run_ranks
from tests import tiny
from tests.checkpoint.loop import SAVED_AT, start, train
from tests.checkpoint.test_folder import make_mark
from tests.test_accelerator import fresh_accelerator, full_weights

# Adam's step is lr * m / (sqrt(v) + eps): with lr 1e-2 and eps 1e-3 it magnifies a difference between gradients at most
# tenfold. Sums over ranks in another order differ by fp32 rounding, about 1e-7 of gradients of order 1, so by 1e-6 a
# step in the weights, over the 8 steps after the checkpoint.
TOLERANCE = 1e-5


def run_whole(folder: str, state_format: str, dropout: float) -> dict[str, Any]:
    parts = start(2, state_format, dropout)
    losses = train(*parts, folder=folder)
    return {"losses": losses, "weights": full_weights(parts[1]), "draw": torch.rand(1).item()}


def resume(folder: str, partition: int, state_format: str, dropout: float) -> dict[str, Any]:
    parts = start(partition, state_format, dropout)
    torch.manual_seed(999)
    random.seed(999)
    np.random.seed(999)
    parts[0].load_state(folder)
    first_draws = random.random(), np.random.rand(), torch.rand(1).item()
    parts[0].load_state(folder)
    losses = train(*parts, first=SAVED_AT)
    return {
        "losses": losses,
        "weights": full_weights(parts[1]),
        "draw": torch.rand(1).item(),
        "first_draws": first_draws,
    }


def save_all(folder: str) -> dict[tuple[str, float], dict[str, Any]]:
    cases = [("sharded", 0.1), ("full", 0.1), ("sharded", 0.0), ("full", 0.0)]
    return {(form, dropout): run_whole(f"{folder}/{form}_{dropout}", form, dropout) for form, dropout in cases}


def resume_all(folder: str, cases: list[tuple[str, float, int, str]]) -> list[dict[str, Any]]:
    return [resume(f"{folder}/{form}_{dropout}", p, own, dropout) for form, dropout, p, own in cases]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[tuple[str, float], dict[str, Any]]]]:
    """A folder with checkpoints saved on 2x2, and what the runs that saved them came to, by rank."""
    folder = str(tmp_path_factory.mktemp("saved"))
    return folder, run_ranks(save_all, 4, folder)


@pytest.fixture(scope="module")
def resumed_on_4(saved: tuple[str, Any]) -> dict[tuple[str, float, int, str], list[dict[str, Any]]]:
    """What resumed runs on 4 ranks came to: by format and dropout of the checkpoint, partition size, format set."""
    cases = [("sharded", 0.1, 2, "sharded"), ("full", 0.1, 2, "full"), ("sharded", 0.0, 4, "full")]
    cases.append(("full", 0.0, 1, "sharded"))
    return dict(zip(cases, zip(*run_ranks(resume_all, 4, saved[0], cases), strict=True), strict=True))


@pytest.mark.parametrize("form", ["sharded", "full"])
def test_resumed_run_on_the_same_layout_is_bit_equal_with_dropout_in_mid_epoch(
    saved: Any, resumed_on_4: Any, form: str
) -> None:
    for rank, resumed in enumerate(resumed_on_4[form, 0.1, 2, form]):
        whole = saved[1][rank][form, 0.1]
        assert resumed["losses"] == whole["losses"][SAVED_AT:]
        assert resumed["draw"] == whole["draw"]
        assert all(torch.equal(whole["weights"][name], resumed["weights"][name]) for name in whole["weights"])


def check_moved(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert len(resumed["losses"]) == 12 - SAVED_AT
    assert resumed["losses"] == pytest.approx(whole["losses"][SAVED_AT:], abs=TOLERANCE)
    for name, weight in whole["weights"].items():
        assert (weight - resumed["weights"][name]).abs().max() < TOLERANCE, name


@pytest.mark.parametrize("case", [("sharded", 0.0, 4, "full"), ("full", 0.0, 1, "sharded")])
def test_checkpoint_moves_to_other_groups_and_is_read_in_either_format(
    saved: Any, resumed_on_4: Any, case: Any
) -> None:
    check_moved(saved[1][0][case[:2]], resumed_on_4[case][0])


@pytest.mark.parametrize("world", [1, 2])
def test_checkpoint_moves_to_fewer_ranks(saved: Any, world: int) -> None:
    cases = [("sharded", 0.0, world, "sharded"), ("full", 0.0, world, "full")]
    for results in run_ranks(resume_all, world, saved[0], cases):
        for (form, dropout, *_), resumed in zip(cases, results, strict=True):
            check_moved(saved[1][0][form, dropout], resumed)


class Sizes(nn.Module):
    """Three layers that share a weight, odd widths, biases, and a parameter without dimensions; 1.1 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(257, 257), nn.Linear(257, 257), nn.Linear(257, 301)
        self.d = nn.Linear(257, 257)
        self.b.weight = self.d.weight = self.a.weight
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.c(self.d(self.b(self.a(rows)))) * self.scale


def measure_storage(folder: str, layout: str) -> dict[str, Any]:
    accelerator = fresh_accelerator(mics_plugin=MiCSPlugin(partition_size=2))
    torch.manual_seed(0)
    model = Sizes()
    state_bytes = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.randn(2, 257)).square().mean())
    optimizer.step()
    if layout == "one node":
        accelerator.save_state(folder)
    before = full_weights(model)
    for param in model.parameters():
        param.data.zero_()
    read: list[tuple[str, tuple[str, int], int]] = []
    original = NodeReader.read_piece

    def counting(self: NodeReader, piece: tuple[str, int], content: torch.Tensor) -> None:
        read.append((str(self.path), piece, len(content)))
        original(self, piece, content)

    NodeReader.read_piece = counting  # type: ignore[method-assign]
    try:
        accelerator.load_state(folder)
    finally:
        NodeReader.read_piece = original  # type: ignore[method-assign]
    equal = all(torch.equal(before[name], weight) for name, weight in full_weights(model).items())
    return {"state_bytes": state_bytes, "read": read, "equal": layout != "one node" or equal}


def test_each_byte_is_written_once_spread_over_replicas_and_read_once_per_node(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    on_one_node = run_ranks(measure_storage, 4, str(folder), "one node")
    assert all(result["equal"] for result in on_one_node)

    files = {path: path.stat().st_size for path in folder.glob("*/*.distcp")}
    state_bytes = on_one_node[0]["state_bytes"]
    # What torch.save adds to each of the stored tensors, at most 2 kB; a second copy of anything big would not fit.
    pieces = {piece for result in on_one_node for piece in result["read"]}
    assert state_bytes < sum(files.values()) < state_bytes + 2_000 * len(pieces)
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        sizes = [files[folder / part / f"__{rank}_0.distcp"] for rank in range(4)]
        # Both replicas write: each has two ranks' files, and the largest piece is a third of a replica's half.
        assert max(sizes) < 0.45 * sum(sizes), sizes

    assert sum(length for result in on_one_node for *_, length in result["read"]) == sum(n for *_, n in pieces)
    on_two_nodes = run_ranks(measure_storage, 4, str(folder), "two nodes", node_size=2)
    for node in (on_two_nodes[:2], on_two_nodes[2:]):
        reads = [piece for result in node for piece in result["read"]]
        assert len(reads) == len(set(reads)) == len(pieces)
        assert set(reads) == pieces


def who_reads_what(lengths: list[int], needs: dict[int, list[int]]) -> list[list[list[tuple[int, Share]]]]:
    """Per round and exchange: pieces, by their number, and who shares them."""
    pieces = [("file", number) for number in range(len(lengths))]
    reader = NodeReader.__new__(NodeReader)
    reader.__dict__["_lengths"] = dict(zip(pieces, lengths, strict=True))
    rounds = reader._rounds({rank: [pieces[number] for number in numbers] for rank, numbers in needs.items()})
    return [[[(share.piece[1], share) for share in exchange] for exchange in exchanges] for exchanges in rounds]


def test_the_ranks_of_a_node_read_different_pieces_at_the_same_time() -> None:
    # Too large for two to be read by a rank at a time.
    lengths = [READ_BYTES - number for number in range(9)]
    shared, own = list(range(8)), 8
    rounds = who_reads_what(lengths, {4: shared, 5: [*shared, own], 6: shared, 7: shared})
    at_once = [[read for exchange in exchanges for read in exchange] for exchanges in rounds]
    assert sorted(piece for reads in at_once for piece, _ in reads) == list(range(9))
    assert [sorted(share.reader for _, share in reads) for reads in at_once[:2]] == [[4, 5, 6, 7]] * 2
    for reads in at_once:
        for piece, share in reads:
            assert {share.reader, *share.others} == ({5} if piece == own else {4, 5, 6, 7})
    load = {
        rank: sum(lengths[piece] for reads in at_once for piece, s in reads if s.reader == rank) for rank in range(4, 8)
    }
    # Nine pieces of about one size for four ranks.
    assert max(load.values()) <= READ_BYTES + min(load.values())


def test_small_pieces_change_hands_together_and_large_ones_alone() -> None:
    both = {0: list(range(12)), 1: list(range(12))}
    small = who_reads_what([READ_BYTES // 4] * 12, both)
    assert [[len(exchange) for exchange in exchanges] for exchanges in small] == [[8], [4]]
    large = who_reads_what([EXCHANGED_BYTES - 1] * 12, both)
    assert [[len(exchange) for exchange in exchanges] for exchanges in large] == [[1, 1]] * 6
    many = who_reads_what([1] * 300, {0: list(range(300)), 1: list(range(300))})
    assert [[len(exchange) for exchange in exchanges] for exchanges in many] == [[64, 64], [64, 64], [44]]


def test_the_rank_that_reads_most_reads_no_more_than_the_largest_piece_where_that_can_be() -> None:
    """What one rank needs alone is four pieces of 20 bytes; all need one of 90 and five of 30."""
    own, shared = list(range(4)), list(range(4, 10))
    lengths = [20] * 4 + [30] * 5 + [90]
    load = dict.fromkeys(range(4), 0)
    for exchanges in who_reads_what(lengths, {0: shared, 1: [*shared, *own], 2: shared, 3: shared}):
        for piece, share in itertools.chain(*exchanges):
            load[share.reader] += lengths[piece]
    assert max(load.values()) == 90, load


def test_a_file_that_ends_before_a_piece_does_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abcde")
    reader, content = NodeReader(str(tmp_path), 1, torch.device("cpu")), torch.zeros(3, dtype=torch.uint8)
    reader.read_piece(("file", 2), content)
    assert bytes(content.tolist()) == b"cde"
    with pytest.raises(OSError, match="file ends before the piece at 3, of 3 bytes"):
        reader.read_piece(("file", 3), content)


class Touch:
    """Makes a file wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_what_is_stored_as_a_tensor_runs_no_code(tmp_path: Path) -> None:
    torch.save(Touch(tmp_path / "touched"), tmp_path / "piece")
    content = torch.frombuffer(bytearray((tmp_path / "piece").read_bytes()), dtype=torch.uint8)
    request: Any = SimpleNamespace(type=LoadItemType.TENSOR)
    with pytest.raises(pickle.UnpicklingError):
        storage._fill(request, content, None)  # type: ignore[arg-type]
    assert not (tmp_path / "touched").exists()


def load_from_a_bad_disk(folder: str) -> list[str]:
    """What this rank says when rank 3 cannot read one of the pieces that it reads for others too, or use one."""
    accelerator = fresh_accelerator(mics_plugin=MiCSPlugin(partition_size=2))
    model = Sizes()
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.save_state(folder)
    said = []
    for owner, name in ((NodeReader, "read_piece"), (storage, "_fill")):
        original, calls = getattr(owner, name), itertools.count()

        def failing(*args: Any) -> None:
            if next(calls) == 0 and dist.get_rank() == 3:
                raise OSError(errno.EIO, "Input/output error")
            original(*args)

        with mock.patch.object(owner, name, failing), pytest.raises(CheckpointError) as caught:
            accelerator.load_state(folder)
        said.append(str(caught.value))
    return said


def test_a_disk_that_fails_under_one_rank_is_named_by_every_rank(tmp_path: Path) -> None:
    for said in zip(*run_ranks(load_from_a_bad_disk, 4, str(tmp_path / "state")), strict=True):
        assert len(set(said)) == 1
        assert "could not load model state: rank 3 (" in said[0]
        assert "Input/output error" in said[0]


class Companion:
    def save_pretrained(self, folder: Path) -> None:
        Path(folder, "companion.json").write_text("{}")


def save_under_automatic_names(project: Path) -> dict[str, str]:
    """What save_state refuses there; all else is asserted here."""
    said = {}

    def prepare(iteration: int = 0) -> Any:
        config = ProjectConfiguration(
            project_dir=str(project), automatic_checkpoint_naming=True, total_limit=2, iteration=iteration
        )
        accelerator = fresh_accelerator(
            mics_plugin=MiCSPlugin(partition_size=2), project_config=config, gradient_accumulation_steps=2
        )
        model = nn.Sequential(nn.Linear(3, 5))
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        accelerator.save_with_checkpoints(Companion())
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 3)).sum())
        assert accelerator.step == 1
        return accelerator

    accelerator = prepare()
    assert [accelerator.save_state().name for _ in range(3)] == [f"checkpoint_{number}" for number in range(3)]
    dist.barrier()
    kept = sorted((project / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["checkpoint_1", "checkpoint_2"]
    assert all((path / "companion.json").is_file() for path in kept)
    with pytest.raises(MiCSError) as caught:
        prepare(iteration=2).save_state()
    said["taken"] = str(caught.value)
    accelerator = prepare()
    with mock.patch("hf_mics.checkpoint.accelerate_state.convert_schedules") as convert:
        accelerator.load_state()
    assert convert.call_args.args[1] == read_mark(project / "checkpoints" / "checkpoint_2")
    assert accelerator.step == 0, "the next window is a whole one"
    # As on nodes that do not share the folder.
    own = project / f"of rank {dist.get_rank()}" / "checkpoint_3"
    somewhere = (
        mock.patch("hf_mics.checkpoint.saving.staging_folder", return_value=own) if dist.get_rank() == 3 else None
    )
    with pytest.raises(MiCSError) as caught, somewhere or contextlib.nullcontext():
        accelerator.save_state()
    said["not shared"] = str(caught.value)
    accelerator = prepare()
    accelerator.load_state()
    assert accelerator.save_state().name == "checkpoint_3"
    return said


def resume_wrongly(folder: str) -> dict[str, str]:
    """What each attempt to resume says, on this rank."""
    root = Path(folder)

    def prepare(name: str, make: Any) -> Any:
        accelerator = fresh_accelerator(mics_plugin=MiCSPlugin(partition_size=2))
        model = tiny.build(name)
        accelerator.prepare(model, make(model.parameters()))
        return accelerator

    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params)

    prepare("gpt2", adam).save_state(str(root / "step_1"))
    damaged = root / "step_2"
    prepare("gpt2", adam).save_state(str(damaged))
    if dist.get_rank() == 0:
        (root / "empty").mkdir()
        (root / "other").mkdir()
        (root / "other" / "notes.txt").write_text("mine")
        (damaged / "optimizer_0" / "__1_0.distcp").unlink()
        with (damaged / "pytorch_model_fsdp_0" / "__0_0.distcp").open("r+b") as file:
            file.truncate(100)
    dist.barrier()
    said = {}
    attempts = {
        "model": ("bert", adam, "step_1"),
        "optimizer": ("gpt2", lambda params: torch.optim.SGD(params, lr=0.1), "step_1"),
        "damaged": ("gpt2", adam, "step_2"),
        "empty": ("gpt2", adam, "empty"),
        "other": ("gpt2", adam, "other"),
        "nowhere": ("gpt2", adam, "nowhere"),
    }
    for case, (name, make, path) in attempts.items():
        accelerator = prepare(name, make)
        before = full_weights(accelerator._models[0])
        with pytest.raises(CheckpointError) as caught:
            accelerator.load_state(str(root / path))
        after = full_weights(accelerator._models[0])
        assert all(torch.equal(before[key], after[key]) for key in before)
        said[case] = str(caught.value)
    # Also one that was never finished under its own name, as plain accelerate leaves them.
    if dist.get_rank() == 0:
        (damaged / "mics_checkpoint.json").unlink()
    dist.barrier()
    with pytest.raises(CheckpointError) as caught:
        prepare("gpt2", adam).load_state(str(damaged))
    said["unmarked"] = str(caught.value)
    if dist.get_rank() == 0:
        with (damaged / "pytorch_model_fsdp_0" / ".metadata").open("r+b") as file:
            file.truncate(100)
    dist.barrier()
    with pytest.raises(CheckpointError) as caught:
        prepare("gpt2", adam).load_state(str(damaged))
    said["description"] = str(caught.value)
    return said | save_under_automatic_names(root / "project")


def test_a_checkpoint_that_cannot_be_resumed_is_the_same_clear_error_on_every_rank(tmp_path: Path) -> None:
    everyone = run_ranks(resume_wrongly, 4, str(tmp_path))
    assert all(said == everyone[0] for said in everyone)
    said = everyone[0]
    assert "is of another model: a GPT2LMHeadModel was saved, this run has a BertForMaskedLM" in said["model"]
    assert "bert.embeddings" in said["model"]
    assert "transformer.h.0" in said["model"]
    assert "is of another optimizer: expected SGD, as this run uses, got AdamW" in said["optimizer"]
    assert "optimizer_0/__1_0.distcp is missing" in said["damaged"]
    assert "pytorch_model_fsdp_0/__0_0.distcp has 100 of" in said["damaged"]
    assert f"{tmp_path}/step_1 is complete" in said["damaged"]
    assert "is empty: expected a checkpoint" in said["empty"]
    assert "got notes.txt" in said["other"]
    assert "no checkpoint at" in said["nowhere"]
    assert "optimizer_0/__1_0.distcp is missing" in said["unmarked"]
    assert f"{tmp_path}/step_2/pytorch_model_fsdp_0/.metadata is damaged: " in said["description"]
    assert "checkpoint_2 exists already. load_state() goes on counting" in said["taken"]
    assert "rank 0 does not see what other ranks wrote (" in said["not shared"]
    assert "checkpoint_2, the newest of 2 complete" in said["not shared"]


def test_ranks_without_a_random_state_of_their_own_get_one_each_and_the_same_again(tmp_path: Path) -> None:
    first, own = tmp_path / "random_states_0.pkl", tmp_path / "random_states_1.pkl"
    first.write_bytes(b"state of rank 0")
    draws = []
    for rank in (4, 5, 4):
        assert continue_random_state(tmp_path / "none", first, rank)
        draws.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert draws[0] == draws[2]
    assert all(a != b for a, b in zip(*draws[:2], strict=True))
    own.touch()
    assert not continue_random_state(own, first, 1)
    assert not continue_random_state(tmp_path / "none", tmp_path / "none", 1)


@pytest.mark.parametrize(("world", "batch", "expected"), [(2, 4, 6), (1, 8, 3), (2, 2, 12), (4, 4, 12)])
def test_prepared_schedule_keeps_its_place_in_the_data(world: int, batch: int, expected: int) -> None:
    """Accelerate stepped it 4 times in each of 3 optimizer steps, once for every batch of 2."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    scheduler.last_epoch = 12
    accelerator = SimpleNamespace(
        num_processes=world,
        _models=[],
        _optimizers=[optimizer],
        _dataloaders=[SimpleNamespace(batch_sampler=SimpleNamespace(batch_size=batch))],
        _schedulers=[SimpleNamespace(scheduler=scheduler, step_with_optimizer=True, split_batches=False)],
    )
    convert_schedules(accelerator, replace(make_mark({}), batch_sizes=[2]))
    assert scheduler.last_epoch == expected
