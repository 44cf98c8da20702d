"""Do records hold what the ranks saw, and does the check of losses tell wrong gradients from rounding?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_mics.bench import peers, reference
from hf_mics.bench.configuration import Configuration
from hf_mics.bench.measure import Part
from hf_mics.bench.records import Record, merge, read_records
from hf_mics.bench.runner import Plan, run
from hf_mics.bench.workload import build_model, build_optimizer, micro_batch
from hf_mics.errors import ConfigError

FOUR = Configuration(system="mics", partition_size=2, nodes=2, model="gpt2-short", micro_steps=2, steps=2, rows=1)


def part(rank: int, **values: Any) -> Part:
    node = rank // 2
    seen: dict[str, Any] = {
        "losses": [1.0 + rank, 2.0 + rank, 3.0],
        "step_s": [9.0, 1.0 + rank / 10, 2.0],
        "waits_s": [{}, {"all_gather": 0.1 * rank}, {"all_gather": 0.2, "all_reduce": 0.4 * (rank == 0)}],
        "nic_sent_bytes": [10, 100 + 20 * node, 200],
        "micro_nic_sent_bytes": [4, 6],
        "gradient_bytes": 50 + rank,
        "rss_before_bytes": 1000,
        "peak_rss_bytes": 1500 + rank,
    }
    return Part(rank=rank, **{**seen, **values})


def merged(**changes: Any) -> Record:
    return merge(FOUR, 0, [part(rank, **changes) for rank in range(4)], {"cpus": 2})


def test_a_record_takes_the_slowest_rank_the_mean_loss_and_each_node_once():
    record = merged()
    assert record.losses == [2.5, 3.5, 3.0]
    assert record.step_s == [9.0, 1.3, 2.0]
    assert record.timed_s == [1.3, 2.0], "the first step is warm-up"
    assert record.nic_sent_bytes == [10, 110, 200], "two nodes: (100 + 120) / 2, not four ranks"
    assert record.nic_spread_bytes == [0, 20, 0]
    assert record.gradient_bytes == 53
    assert record.training_rss_bytes == 503
    assert record.timed_waits_s == pytest.approx({"all_gather": (0.15 + 0.2) / 2, "all_reduce": 0.05})


def test_records_survive_the_disk_and_a_damaged_one_is_named(tmp_path: Path):
    record = merged()
    record.expected_losses, record.loss_tolerance = [2.5, 3.5, 3.0 + 1e-7], 1e-6
    path = record.save(tmp_path)
    (read,) = read_records(tmp_path)
    assert read.losses_are_equal is True
    assert (read.configuration, read.step_s, read.timed_waits_s) == (
        FOUR,
        record.step_s,
        pytest.approx(record.timed_waits_s),
    )
    path.write_text("{")
    with pytest.raises(ConfigError, match=f"{path.name} is not a record"):
        read_records(tmp_path)


def test_one_loss_beyond_the_tolerance_is_a_difference():
    record = merged()
    record.expected_losses, record.loss_tolerance = [2.5, 3.5, 3.1], 0.05
    assert record.losses_are_equal is False
    assert record.loss_error == pytest.approx(0.1)
    assert merged().losses_are_equal is None


def train(
    configuration: Configuration, *, order: int = 1, factor: float = 1.0, wire: bool = False, reduced: int = 4
) -> list[float]:
    """Mean losses of the global batch in float32: in another order, gradients times `factor`, or of a few ranks."""
    c, model = configuration, build_model(configuration.model)
    optimizer, losses = build_optimizer(model), []
    for step in range(c.warm_up_steps + c.steps):
        seen = []
        for rank in list(range(c.world_size))[::order]:
            for i in list(range(c.micro_steps))[::order]:
                loss = model(**micro_batch(c, step, i, rank)).loss
                if rank < reduced:
                    (factor ** (step + 1) * loss / (c.micro_steps * reduced)).backward()
                seen.append(loss.item())
        if wire:
            for param in model.parameters():
                param.grad = param.grad.bfloat16().float()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(seen) / len(seen))
    return losses


def test_the_tolerance_holds_for_another_order_and_catches_gradients_of_another_scale():
    """Factor 2 for each step, as a sync that runs once too often would make: AdamW hides a constant factor."""
    expected = reference.expect(FOUR)
    error = {
        name: max(abs(a - b) for a, b in zip(losses, expected.losses, strict=True))
        for name, losses in {
            "reversed": train(FOUR, order=-1),
            "scaled": train(FOUR, factor=2.0),
            "bf16": train(FOUR, wire=True),
            "unreduced": train(FOUR, reduced=2),
        }.items()
    }
    assert error["reversed"] <= expected.tolerance / 4
    assert error["scaled"] > 20 * expected.tolerance
    wider = reference.expect(replace(FOUR, wire="bfloat16"))
    assert error["bf16"] <= wider.tolerance < error["unreduced"] / 4


def test_every_rank_and_micro_step_has_a_batch_of_its_own_that_one_process_also_sees():
    alone = replace(FOUR, system="reference", partition_size=None, nodes=1, node_size=1, micro_steps=8)
    spread = [micro_batch(FOUR, 1, i, rank)["input_ids"] for i in range(2) for rank in range(4)]
    together = [micro_batch(alone, 1, i, 0)["input_ids"] for i in range(8)]
    assert torch.equal(torch.cat(spread), torch.cat(together))
    assert len({tuple(ids.flatten().tolist()) for ids in spread}) == 8
    masked = micro_batch(replace(FOUR, model="bert", rows=3), 0, 0, 0)["labels"]
    assert (masked != -100).sum(dim=1).tolist() == [8, 8, 8], "equal counts, so that means of means are means"


def test_a_peer_that_is_not_installed_is_named_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "FOLDER", tmp_path / "venvs")
    zero3 = Configuration(system="deepspeed-zero3")
    with pytest.raises(ConfigError, match=r"deepspeed==\S+ is not installed: expected it in .*`scripts/bench setup`"):
        run(Plan(configurations=[zero3], results=tmp_path), print)


def test_no_space_for_results_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = type("Usage", (), {"free": 5 << 20})
    monkeypatch.setattr("hf_mics.bench.runner.shutil.disk_usage", lambda _: full)
    with pytest.raises(ConfigError, match="no space for results: .* has 5 MiB free, expected at least 200 MiB"):
        run(Plan(configurations=[FOUR], results=tmp_path / "results"), print)


def test_a_results_folder_that_cannot_be_made_is_said_before_anything_starts():
    with pytest.raises(ConfigError, match="cannot write into /proc/1/nowhere"):
        run(Plan(configurations=[FOUR], results=Path("/proc/1/nowhere")), print)
    with pytest.raises(ConfigError, match="repeats must be at least 1, got 0"):
        Plan(configurations=[FOUR], results=Path("results"), repeats=0)


def test_runs_with_a_record_are_not_repeated_and_repeats_are_interleaved(tmp_path: Path):
    other = replace(FOUR, partition_size=4)
    merged().save(tmp_path)
    plan = Plan(configurations=[FOUR, other], results=tmp_path, repeats=2)
    assert plan.missing() == [(0, other), (1, FOUR), (1, other)]
    assert len(replace(plan, again=True).missing()) == 4
    failed = Record(configuration=FOUR, repeat=0, failure="rank 3 did not finish within 10 s")
    failed.save(tmp_path)
    assert plan.missing()[0] == (0, FOUR), "what failed is tried again"
