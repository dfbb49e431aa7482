"""The command line: join the other processes, train, and let the first one show what came of it."""

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sparseadam.bench.arguments import HelpWithDefaults, whole_number

from ..command_line import check_writable, exit_code
from ..word_vectors.training import OPTIMIZERS, build_optimizer, moment_bytes
from .model import Factors
from .purchases import Batches, Purchases, read_purchases
from .training import TOP, Outcome, measure_popular_recall, measure_recall, train

# Beside the checkout.
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "rec" / "online_retail"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one process of the recipe; return the exit code."""

    def run_recipe() -> None:
        options = parse_arguments(arguments)
        with process_group():
            run(options)

    return exit_code("recommender", run_recipe)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check every flag; argparse ends the program where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.recommender",
        description="Train a recommender whose tables are shared out over the processes that torchrun starts, "
        "`torchrun --nproc-per-node 2 -m recipes.recommender`; without torchrun, in one.",
        formatter_class=HelpWithDefaults,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", type=Path, default=DATA, help="folder of interactions.txt.gz: a customer a line, then its items")
    add("--optimizer", choices=OPTIMIZERS, default=OPTIMIZERS[0], help="what updates the tables")
    add("--dim", type=whole_number(1, 4096), default=64, help="length of a vector")
    add("--epochs", type=whole_number(1, 10_000), default=12, help="times every purchase is taken")
    add("--steps", type=whole_number(1, 10**9), help="stop after this many steps")
    add("--lr", type=float, default=0.01, help="learning rate at the start")
    add("--batch", type=whole_number(1, 2**20), default=2048, help="pairs in a step of all processes together")
    add("--negatives", type=whole_number(1, 2**20), default=512, help="items that a step's pairs are told apart from")
    add("--seed", type=whole_number(0, 2**31), default=0, help="fixes all chance")
    add("--threads", type=whole_number(1, 1024), default=1, help="threads of torch in each process")
    add("--checkpoints", type=Path, help="folder to save to, and to go on from; with torchrun --max-restarts")
    add("--save-every", type=whole_number(1, 10**9), default=100, help="steps between checkpoints")
    options = parser.parse_args(arguments)
    if not 0 < options.lr < math.inf:
        parser.error(f"argument --lr: {options.lr} does not lie in (0, inf)")
    if options.checkpoints and options.optimizer == "torch":
        parser.error("argument --checkpoints: only with --optimizer sparseadam, whose state can be sharded anew")
    return options


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, or be alone."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run(options: argparse.Namespace) -> None:
    """Train and report."""
    is_first = dist.get_rank() == 0
    if options.checkpoints and is_first:
        check_writable(options.checkpoints)
    console = Console(quiet=not is_first, width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    purchases = read_purchases(options.data)
    console.print(
        f"{len(purchases.items):,} purchases to train on of {purchases.num_customers:,} customers and "
        f"{purchases.num_items:,} items, {sum(map(len, purchases.held_out)):,} held out; vectors of {options.dim}, "
        f"optimizer {options.optimizer}, {dist.get_world_size()} processes of {options.threads} threads"
    )
    batches = Batches(purchases, options.batch, options.negatives, options.seed)
    model = Factors(purchases, options.dim)
    optimizer = build_optimizer(options.optimizer, model.parameters(), options.lr)
    total_steps = min(options.epochs * batches.steps_per_epoch, options.steps or sys.maxsize)
    untrained = measure_recall(model, purchases)
    with Progress(console=console, disable=not is_first) if is_first else nullcontext() as progress:
        task = progress.add_task("training", total=total_steps) if is_first else None

        def show(step: int, loss: float) -> None:
            if is_first:
                progress.update(task, completed=step, description=f"loss {loss:.3f}")

        outcome = train(
            model,
            optimizer,
            batches,
            total_steps=total_steps,
            checkpoints=options.checkpoints,
            save_every=options.save_every,
            on_step=show,
        )
    print_outcome(console, outcome, optimizer)
    recalls = [untrained, measure_popular_recall(purchases), measure_recall(model, purchases)]
    print_recall(console, purchases, recalls)


def print_outcome(console: Console, outcome: Outcome, optimizer: torch.optim.Optimizer) -> None:
    """Say how long it took, what was learned, and what was sent in a step."""
    num_steps = len(outcome.losses)
    if num_steps == 0:
        console.print(f"The checkpoint is of step {outcome.first_step}: nothing is left to train.")
        return
    last = outcome.losses[-100:]
    console.print(
        f"{num_steps:,} steps from step {outcome.first_step:,} in {outcome.seconds:.1f} s, "
        f"{1000 * outcome.seconds / num_steps:.1f} ms a step; loss of a pair {outcome.losses[0]:.3f} at first, "
        f"{sum(last) / len(last):.3f} over the last {len(last)}; moments of {moment_bytes(optimizer) / 1e6:.1f} MB in "
        "the first process"
    )
    table = Table(title="Bytes from process to process, all together", title_justify="left")
    table.add_column("what", style="bold")
    table.add_column("a step", justify="right")
    table.add_column("share", justify="right")
    total = sum(outcome.sent.values())
    for what, num_bytes in {**outcome.sent, "in all": total}.items():
        table.add_row(what, f"{num_bytes / num_steps:,.0f}", f"{num_bytes / max(total, 1):.1%}")
    console.print(table)


def print_recall(console: Console, purchases: Purchases, recalls: Sequence[float]) -> None:
    """Say how well items that customers bought later are found."""
    untrained, popular, trained = recalls
    console.print(
        f"recall@{TOP} on {sum(map(bool, purchases.held_out)):,} customers: [bold]{trained:.3f}[/]; the most popular "
        f"items {popular:.3f}, untrained {untrained:.3f}"
    )
