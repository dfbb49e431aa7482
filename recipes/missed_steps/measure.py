"""All runs of a task: every learning rate with one seed, then the other seeds at each method's best."""

from collections.abc import Callable, Sequence

from .gaps import measure_gaps
from .methods import METHODS, Method
from .results import Results, ResultsFile
from .runs import train
from .task import Task

FIRST_SEED = 0  # the one that chooses the learning rate


def measure(
    task: Task, file: ResultsFile, rates: Sequence[float], num_seeds: int, tell: Callable[[str], None]
) -> Results:
    """Train what the file does not have yet, and keep each run as soon as it is done.

    Args:
        task: what to train.
        file: where results are kept.
        rates: learning rates to choose from.
        num_seeds: seeds at the best rate of each method, the one of the choice included.
        tell: called with a line before each run.
    """
    settings = task.settings()
    results = file.of(settings)
    if not results.gaps:
        tell(f"{task.name}: counting missed steps")
        file.add_gaps(settings, measure_gaps(task, FIRST_SEED))

    def train_once(method: Method, lr: float, seed: int) -> None:
        if results.find(method.name, lr, seed) is None:
            tell(f"{task.name}: {method.name}, learning rate {lr:g}, seed {seed}")
            file.add_run(settings, train(task, method, lr, seed))

    for lr in rates:
        for method in METHODS:
            train_once(method, lr, FIRST_SEED)
    for seed in range(FIRST_SEED + 1, num_seeds):
        for method in METHODS:
            train_once(method, results.best_rate(method.name), seed)
    return results
