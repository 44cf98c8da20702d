"""How do shards get to disk once, and back with one read per node?

torch.distributed.checkpoint writes each shard from one of the ranks that hold it, the least loaded so far, so writing
is spread over the replicas. Two things are added: tied weights, which are in a state dict under every name, share their
bytes on disk; and of the ranks on a node that need the same stored piece, one reads it and hands it on.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from hf_mics._hf_compat import replaced_storage
from hf_mics.errors import CheckpointError

READ_BYTES, EXCHANGED_BYTES, MOST_PIECES = 4 << 20, 32 << 20, 64
"""What a rank reads, and the ranks of a node exchange, at a time: small pieces together, because each exchange waits
for the slower of its ranks; a larger piece alone, because each rank has memory for those of an exchange. Each piece is
a message to every other rank of the node that needs it, and NCCL takes 2048 operations in a group."""

Piece = tuple[str, int]
"""Where a stored tensor (or a rank's part of one) is: file and offset. Tied names share one."""


class TiedSavePlanner(DefaultSavePlanner):
    """Writes tied weights once; `TiedWriter` gives their other names the same bytes.

    Args:
        tied: names in the state dict to the names under which their data is written.
    """

    def __init__(self, tied: dict[str, str]) -> None:
        super().__init__()
        self._tied = tied

    def create_local_plan(self) -> SavePlan:
        """This rank's plan without the tied names; what is not sharded is in that of rank 0 alone.

        BatchNorm's statistics differ between ranks. torch would take each buffer from some rank or other, the mean of
        one and the variance of another; a full state has rank 0's.
        """
        plan = super().create_local_plan()
        items = [item for item in plan.items if item.index.fqn not in self._tied]
        if dist.get_rank():
            items = [item for item in items if item.type != WriteItemType.TENSOR]
        return replace(plan, items=items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Every rank's plan without duplicates, and metadata that describes the tied names too."""
        plans, metadata = super().create_global_plan(all_plans)
        described = metadata.state_dict_metadata
        described.update({name: described[kept] for name, kept in self._tied.items() if kept in described})
        return plans, metadata


class TiedWriter(FileSystemWriter):
    """Writes the files of a state dict; see `TiedSavePlanner`."""

    def __init__(self, path: str, tied: dict[str, str]) -> None:
        super().__init__(path)
        self._names = defaultdict(list)
        for name, kept in tied.items():
            self._names[kept].append(name)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the metadata, where a tied name points to the bytes of the name that was written."""
        shared = [
            replace(result, index=MetadataIndex(name, result.index.offset, result.index.index))
            for written in results
            for result in written
            for name in self._names[result.index.fqn]
        ]
        super().finish(metadata, [*results, shared])


class Share(NamedTuple):
    """A stored piece that one rank reads, for itself and for others of its node."""

    piece: Piece
    reader: int
    others: tuple[int, ...]


class NodeReader(FileSystemReader):
    """Reads what the ranks of a node need, each stored piece once, by one of them.

    Args:
        path: the folder with `.metadata`.
        node_size: ranks per node; nodes hold consecutive ranks.
        device: where the process group's messages live.
    """

    def __init__(self, path: str, node_size: int, device: torch.device) -> None:
        super().__init__(path)
        self._node_size = node_size
        self._device = device

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Chooses, on the coordinator, who reads each piece that several ranks of a node need, and when."""
        for first in range(0, len(plans), self._node_size):
            ranks = range(first, first + self._node_size)
            rounds = self._rounds(
                {rank: [self._piece(item.storage_index) for item in plans[rank].items] for rank in ranks}
            )
            for rank in ranks:
                mine = [
                    [[share for share in exchange if rank in (share.reader, *share.others)] for exchange in exchanges]
                    for exchanges in rounds
                ]
                plans[rank] = replace(plans[rank], storage_data=mine)
        return plans

    def _rounds(self, needs: dict[int, list[Piece]]) -> list[list[list[Share]]]:
        """What the ranks of a node read at the same time, round by round, and in which exchanges it changes hands.

        Args:
            needs: the pieces that each rank needs.
        """
        needed_by: dict[Piece, list[int]] = defaultdict(list)
        for rank, pieces in needs.items():
            for piece in dict.fromkeys(pieces):
                needed_by[piece].append(rank)
        load_bytes = dict.fromkeys(needs, 0)
        shares: dict[int, list[Share]] = {rank: [] for rank in needs}
        # What one rank needs is that rank's anyway. Of the others the largest first and to the rank with the least to
        # read, so that loads even out, and pieces of one round are about as large as each other.
        for piece in sorted(needed_by, key=lambda piece: (len(needed_by[piece]) > 1, -self._lengths[piece], piece)):
            reader = min(needed_by[piece], key=lambda rank: load_bytes[rank])
            load_bytes[reader] += self._lengths[piece]
            others = tuple(rank for rank in needed_by[piece] if rank != reader)
            shares[reader].append(Share(piece, reader, others))
        bundles = [self._bundles(read, READ_BYTES) for read in shares.values()]
        rounds = [chain.from_iterable(at_once) for at_once in zip_longest(*bundles, fillvalue=[])]
        return [list(self._bundles(at_once, EXCHANGED_BYTES)) for at_once in rounds]

    def _bundles(self, shares: Iterable[Share], most_bytes: int) -> Iterator[list[Share]]:
        """`shares` in order, as many at a time as hold `most_bytes`, one at least and `MOST_PIECES` at most."""
        bundle: list[Share] = []
        bundle_bytes = 0
        for share in shares:
            length = self._lengths[share.piece]
            if bundle and (bundle_bytes + length > most_bytes or len(bundle) == MOST_PIECES):
                yield bundle
                bundle, bundle_bytes = [], 0
            bundle.append(share)
            bundle_bytes += length
        if bundle:
            yield bundle

    def _piece(self, index: MetadataIndex) -> Piece:
        info = self.storage_data[index]
        return info.relative_path, info.offset

    @cached_property
    def _lengths(self) -> dict[Piece, int]:
        return {self._piece(index): info.length for index, info in self.storage_data.items()}

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills this rank's tensors.

        In every round all ranks of a node read at the same time; then what they have read changes hands, exchange by
        exchange, so that a rank holds what it has read in the round and what it receives in the exchange. A rank that
        could not read goes on to the end, so that none waits for its messages in vain.
        """
        requests: dict[Piece, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            requests[self._piece(item.storage_index)].append(item)
        failures: list[Exception] = []
        for exchanges in plan.storage_data:
            mine = {
                share.piece: self._read(share.piece, failures)
                for share in chain.from_iterable(exchanges)
                if share.reader == dist.get_rank()
            }
            for exchange in exchanges:
                for piece, content in self._exchange(exchange, mine).items():
                    try:
                        for request in requests[piece] if content[-1] else ():
                            _fill(request, content[:-1], planner)
                    except Exception as error:  # damaged bytes raise anything; the others' messages go on
                        failures.append(error)
        if failures:
            raise failures[0]
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, piece: Piece, failures: list[Exception]) -> torch.Tensor:
        """The bytes of `piece`, and one more that says whether they were read: who only receives cannot tell."""
        content = torch.empty(self._lengths[piece] + 1, dtype=torch.uint8)
        content[-1] = 0
        try:
            self.read_piece(piece, content[:-1])
            content[-1] = 1
        except Exception as error:  # raised once this rank owes no other anything
            failures.append(error)
        return content

    def _exchange(self, shares: list[Share], mine: dict[Piece, torch.Tensor]) -> dict[Piece, torch.Tensor]:
        """Sends what this rank has read of `shares` to the others that need it and receives what they have read.

        Args:
            shares: in the same order on every rank.
            mine: what this rank has read.

        Returns:
            The content of each piece of `shares`, as `_read` gives it.
        """
        contents, transfers = {}, []
        for share in shares:
            if share.reader != dist.get_rank():
                message = torch.empty(self._lengths[share.piece] + 1, dtype=torch.uint8, device=self._device)
                transfers.append(dist.P2POp(dist.irecv, message, share.reader))
            else:
                message = mine[share.piece].to(self._device) if share.others else mine[share.piece]
                transfers += [dist.P2POp(dist.isend, message, other) for other in share.others]
            contents[share.piece] = message
        # In a batch, which NCCL sends over the group's own connections instead of making some for every pair of ranks.
        # Between two ranks messages arrive in the order in which they were sent, over gloo and NCCL alike.
        for work in dist.batch_isend_irecv(transfers) if transfers else ():
            work.wait()
        return {piece: mine[piece] if piece in mine else message.cpu() for piece, message in contents.items()}

    def read_piece(self, piece: Piece, content: torch.Tensor) -> None:
        """Reads a stored piece from disk into `content`, its bytes."""
        name, offset = piece
        with (Path(self.path) / name).open("rb") as file:
            file.seek(offset)
            if file.readinto(content.numpy().data) < len(content):
                raise OSError(f"{name} ends before the piece at {offset}, of {len(content)} bytes")


def _fill(request: ReadItem, content: torch.Tensor, planner: LoadPlanner) -> None:
    data = io.BytesIO(content.numpy().data)
    if request.type == LoadItemType.BYTE_IO:
        planner.load_bytes(request, data)
        return
    tensor = torch.load(data, map_location="cpu", weights_only=True)
    for axis, (start, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    target = planner.resolve_tensor(request).detach()
    target.copy_(tensor)
    planner.commit_tensor(request, target)


def our_storage(tied: dict[str, str], node_size: int, device: torch.device) -> AbstractContextManager[None]:
    """Inside, accelerate's FSDP checkpoint functions write and read with the classes of this file.

    Args:
        tied: names in the model's state dict to the names under which their data is written.
    """
    keys = {f"model.{name}": f"model.{kept}" for name, kept in tied.items()}
    return replaced_storage(
        writer=partial(TiedWriter, tied=keys),
        planner=partial(TiedSavePlanner, keys),
        reader=partial(NodeReader, node_size=node_size, device=device),
    )


def read_description(folder: Path) -> Any:
    """The `Metadata` of a folder written by torch.distributed.checkpoint, without its tensors.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # it is a pickle, which raises anything once it is cut short
        raise CheckpointError(
            f"{folder}/.metadata is damaged: {type(error).__name__}: {error}. Resume from another checkpoint."
        ) from error
