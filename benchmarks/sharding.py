"""What tables of several processes cost: time of a training step, and bytes from process to process.

All processes are on this machine and share its cores and its loopback: times say what the exchange adds, not what more
machines bring. Bytes are counted twice: what the package sends, and what the kernel counts on the loopback, TCP and
all, which must be nobody else's.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import Script, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparseadam import SparseAdam
from sparseadam.bench.cases import row_source
from sparseadam.bench.errors import BenchError
from sparseadam.bench.machine import facts
from sparseadam.bench.measure import spread_of
from sparseadam.bench.report import Column, Record, figure, spread_figures
from sparseadam.distributed import ShardedEmbedding, replicate

NUM_BATCHES = 8
WARM_UP_STEPS = 2 * NUM_BATCHES
ID_BYTES, ELEMENT_BYTES = 4, 4


@dataclass(frozen=True)
class Way:
    """How a table is trained.

    Attributes:
        name: for the table of results.
        kind: ``"plain"``, ``"sharded"``, ``"gathered"`` or ``"built-in"``.
        world_size: processes.
        threads: of torch in each.
    """

    name: str
    kind: str
    world_size: int
    threads: int = 1


WAYS = (
    Way("one process", "plain", 1),
    Way("one process, 2 threads", "plain", 1, 2),
    Way("sharded over 1", "sharded", 1),
    Way("sharded over 2", "sharded", 2),
    Way("sharded over 4", "sharded", 4),
    Way("replicated 2 times, gather_rows_hook", "gathered", 2),
    Way("replicated 2 times, PyTorch's exchange", "built-in", 2),
)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the table")
    parser.add_argument("--dim", type=int, default=64, help="elements of a row")
    parser.add_argument("--lookups", type=int, default=16_384, help="lookups of a step of all processes together")
    parser.add_argument("--distribution", choices=("zipf", "uniform"), help="otherwise both")
    parser.add_argument("--phases", type=int, default=8, help="turns that each way takes")
    parser.add_argument("--steps", type=int, default=NUM_BATCHES, help="steps of a turn")


# A process of a way -------------------------------------------------------------------------------


def batches(options: argparse.Namespace, distribution: str) -> list[Tensor]:
    """Return the ids of some steps, the same in every process."""
    draw = row_source(distribution, options.rows, seed=0)
    return [draw(options.lookups) for _ in range(NUM_BATCHES)]


def work(
    rank: int, way: Way, port: int, options: argparse.Namespace, distribution: str, orders: list[Connection]
) -> None:
    """Take as many steps as told, turn by turn, and say how long each took; until told none."""
    torch.set_num_threads(way.threads)
    store = dist.TCPStore("127.0.0.1", port, way.world_size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=way.world_size)
    torch.manual_seed(0)
    table: Any
    if way.kind == "sharded":
        table = model = ShardedEmbedding(options.rows, options.dim)
    else:
        table = model = nn.Embedding(options.rows, options.dim, sparse=True)
        wrap = {"plain": lambda whole: whole, "gathered": replicate, "built-in": DistributedDataParallel}[way.kind]
        model = wrap(table)
    optimizer = SparseAdam(table.parameters())
    parts = [ids.tensor_split(way.world_size)[rank] for ids in batches(options, distribution)]
    while num_steps := orders[rank].recv():
        before = table.traffic.total if way.kind == "sharded" else 0
        times = []
        for step in range(num_steps):
            begin = perf_counter()
            optimizer.zero_grad()
            model(parts[step % NUM_BATCHES]).square().sum().backward()
            optimizer.step()
            times.append(perf_counter() - begin)
        sent = table.traffic.total - before if way.kind == "sharded" else None
        orders[rank].send((times, sent))
    dist.destroy_process_group()


class Group:
    """The processes of a way, which wait for their turn."""

    def __init__(self, way: Way, options: argparse.Namespace, distribution: str) -> None:
        """Start them."""
        self.way = way
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pipes = [mp.Pipe() for _ in range(way.world_size)]
        self._orders = [ours for ours, _ in pipes]
        arguments = (way, self._store.port, options, distribution, [theirs for _, theirs in pipes])
        self._context = mp.start_processes(work, arguments, nprocs=way.world_size, join=False, start_method="spawn")

    def take_turn(self, num_steps: int) -> tuple[list[float], int | None, int]:
        """Return seconds of each step in the slowest process, bytes of a step by our count, and by the kernel's."""
        before = loopback_bytes()
        for order in self._orders:
            order.send(num_steps)
        answers = [order.recv() for order in self._orders]
        times = [max(each) for each in zip(*(times for times, _ in answers), strict=True)]
        sent = [count for _, count in answers if count is not None]
        return times, sum(sent) // num_steps if sent else None, (loopback_bytes() - before) // num_steps

    def close(self) -> None:
        """Let them end."""
        for order in self._orders:
            order.send(0)
        while not self._context.join():
            pass


def loopback_bytes() -> int:
    """Return what the kernel has sent over the loopback so far."""
    with open("/proc/net/dev", encoding="utf-8") as lines:
        for line in lines:
            name, _, counts = line.partition(":")
            if name.strip() == "lo":
                return int(counts.split()[8])
    raise BenchError("there is no loopback interface in /proc/net/dev to count bytes on.")


# Measuring ----------------------------------------------------------------------------------------


def least_bytes(way: Way, options: argparse.Namespace, ids: Tensor) -> int:
    """Return what must travel in a step: for each distinct row that is elsewhere its id, its weights, its gradient."""
    rows_per_rank = -(-options.rows // way.world_size)
    distinct = [part.unique() for part in ids.tensor_split(way.world_size)]
    elsewhere = sum(int((rows // rows_per_rank != rank).sum()) for rank, rows in enumerate(distinct))
    return elsewhere * (ID_BYTES + 2 * options.dim * ELEMENT_BYTES)


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    if not sys.platform.startswith("linux"):
        raise BenchError("bytes are counted by Linux's /proc/net/dev.")
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    for distribution in [options.distribution] if options.distribution else ["zipf", "uniform"]:
        yield from _measure_distribution(options, distribution)


def _measure_distribution(options: argparse.Namespace, distribution: str) -> Iterator[Record]:
    with ExitStack() as stack:
        groups = [Group(way, options, distribution) for way in WAYS]
        for group in groups:
            stack.callback(group.close)
        for group in groups:
            group.take_turn(WARM_UP_STEPS)
        turns = [[group.take_turn(options.steps) for group in groups] for _ in range(options.phases)]
    drawn = batches(options, distribution)
    of_one = [statistics.median(turn[0][0]) for turn in turns]
    for index, way in enumerate(WAYS):
        mine = [turn[index] for turn in turns]
        ratios = [statistics.median(times) / base for (times, _, _), base in zip(mine, of_one, strict=True)]
        least = [least_bytes(way, options, drawn[step % NUM_BATCHES]) for step in range(options.steps)]
        yield {
            **facts(),
            "rows": options.rows,
            "dim": options.dim,
            "lookups": options.lookups,
            "distribution": distribution,
            "distinct": statistics.mean(len(ids.unique()) for ids in drawn),
            "way": way.name,
            "world_size": way.world_size,
            "threads": way.threads,
            "ms": spread_of([1e3 * seconds for times, _, _ in mine for seconds in times])._asdict(),
            "times_one_process": spread_of(ratios)._asdict(),
            "sent_bytes": mine[0][1],
            "wire_bytes": round(statistics.median(wire for _, _, wire in mine)),
            "least_bytes": round(statistics.mean(least)) if way.kind == "sharded" else None,
        }


def _kilobytes(record: Record, key: str) -> str:
    return "-" if record[key] is None else f"{record[key] / 1e3:,.0f}"


def _of_least(record: Record) -> str:
    least = record["least_bytes"]
    return f"{record['sent_bytes'] / least:.4f}, {record['wire_bytes'] / least:.3f}" if least else "-"


COLUMNS = (
    Column("ids", "how the lookups fall on rows", lambda record: record["distribution"]),
    Column("way", "processes of one thread each where nothing else is said", lambda record: record["way"]),
    Column(
        "step, ms",
        "forward, backward and optimizer: median (20th to 80th percentile)",
        lambda record: spread_figures(record["ms"]),
    ),
    Column(
        "times one process",
        "median over turns of the ratio of their medians",
        lambda record: f"{figure(record['times_one_process']['median'])}x",
    ),
    Column(
        "sent, kB", "in a step, all processes together, by our count", lambda record: _kilobytes(record, "sent_bytes")
    ),
    Column("on the wire, kB", "the same by the kernel's count, TCP and all", lambda r: _kilobytes(r, "wire_bytes")),
    Column("of the least", "sent, and on the wire, by what must travel", _of_least),
)

SCRIPT = Script("sharding", "What tables of several processes cost", _measure, COLUMNS, _add_flags)

if __name__ == "__main__":
    sys.exit(run(SCRIPT))
