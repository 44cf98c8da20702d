"""How do shards get to disk once, and back with one read per node?

torch.distributed.checkpoint writes each shard from one of the ranks that hold it, the least loaded so far, so writing
is spread over the replicas. Two things are added: tied weights, which are in a state dict under every name, share their
bytes on disk; and of the ranks on a node that need the same stored piece, one reads it and hands it on.
"""

from __future__ import annotations

import io
from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

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
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from hf_mics._hf_compat import replaced_storage

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
        """This rank's plan without the tied names."""
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[item for item in plan.items if item.index.fqn not in self._tied])
        return self.plan

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
        """Chooses, on the coordinator, who reads each piece that several ranks of a node need: the least loaded."""
        for first in range(0, len(plans), self._node_size):
            self._share_reads(plans, range(first, min(first + self._node_size, len(plans))))
        return plans

    def _share_reads(self, plans: list[LoadPlan], ranks: range) -> None:
        needed_by: dict[Piece, list[int]] = defaultdict(list)
        for rank in ranks:
            for piece in {self._piece(item.storage_index): None for item in plans[rank].items}:
                needed_by[piece].append(rank)
        piece_bytes = {self._piece(index): info.length for index, info in self.storage_data.items()}
        load_bytes = dict.fromkeys(ranks, 0)
        shared: dict[int, dict[Piece, list[int]]] = {rank: {} for rank in ranks}
        # What one rank needs is that rank's anyway; of the others the largest first, so that they even out.
        for piece in sorted(needed_by, key=lambda piece: (len(needed_by[piece]) > 1, -piece_bytes[piece], piece)):
            needing = needed_by[piece]
            reader = min(needing, key=lambda rank: load_bytes[rank])
            load_bytes[reader] += piece_bytes[piece]
            if len(needing) > 1:
                for rank in needing:
                    shared[rank][piece] = [reader, *(other for other in needing if other != reader)]
        for rank in ranks:
            plans[rank] = replace(plans[rank], storage_data=shared[rank])

    def _piece(self, index: MetadataIndex) -> Piece:
        info = self.storage_data[index]
        return info.relative_path, info.offset

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills this rank's tensors.

        Every rank goes through its pieces in one order for all, so that no two wait for each other; and to the end,
        even if one could not be read, so that none waits for a message in vain.
        """
        sharing: dict[Piece, list[int]] = plan.storage_data or {}
        requests: dict[Piece, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            requests[self._piece(item.storage_index)].append(item)
        failure: Exception | None = None
        for piece in sorted(requests):
            length = self.storage_data[requests[piece][0].storage_index].length
            try:
                data = self._fetch(piece, length, sharing.get(piece, []))
                for request in requests[piece]:
                    _fill(request, data, planner)
            except Exception as error:  # raised below, once this rank owes no other anything
                failure = failure or error
        if failure:
            raise failure
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fetch(self, piece: Piece, length: int, sharing: list[int]) -> bytes:
        """The bytes of a stored piece: read here, or received from the first of `sharing`, who reads for the others."""
        if not sharing:
            return self.read_piece(piece, length)
        reader, *others = sharing
        message = torch.zeros(length, dtype=torch.uint8, device=self._device)
        if dist.get_rank() != reader:
            dist.recv(message, src=reader)
            return message.cpu().numpy().tobytes()
        try:
            data = self.read_piece(piece, length)
            message.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        finally:
            for rank in others:
                dist.send(message, dst=rank)
        return data

    def read_piece(self, piece: Piece, length: int) -> bytes:
        """The `length` bytes of a stored piece, from disk."""
        name, offset = piece
        with (Path(self.path) / name).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) < length:
            raise OSError(f"{name} ends before the piece at {offset}, of {length} bytes")
        return data


def _fill(request: ReadItem, data: bytes, planner: LoadPlanner) -> None:
    if request.type == LoadItemType.BYTE_IO:
        planner.load_bytes(request, io.BytesIO(data))
        return
    tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
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
    """The `Metadata` of a folder written by torch.distributed.checkpoint, without its tensors."""
    return FileSystemReader(folder).read_metadata()
