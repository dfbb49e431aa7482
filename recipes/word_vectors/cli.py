"""The command line: check what was asked, train, and show what came of it."""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.table import Table

from sparseadam.bench.arguments import HelpWithDefaults, whole_number

from ..command_line import RecipeError, check_writable, exit_code
from .comparison import WARM_UP_ROUNDS, Comparison, compare_optimizers
from .corpus import BatchStream, Corpus, read_corpus
from .model import SkipGram
from .pictures import draw_neighbourhoods, draw_training
from .training import OPTIMIZERS, History, build_optimizer, moment_bytes, train
from .vectors import WordVectors, find_wordsim, measure_agreement, read_judged_pairs

WORDNET = Path(__file__).resolve().parent.parent / "data" / "wordnet_glosses.txt.gz"
WORDS_SHOWN = ["king", "dog", "car", "river", "music", "physician", "happy", "bread", "ship", "red"]
NEIGHBOURS_SHOWN = 7
GROUP = 32
COMPARISON_SEED_OFFSET = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; return the exit code."""

    def run_recipe() -> None:
        try:
            run(parse_arguments(arguments))
        except MemoryError as error:
            raise RecipeError("not enough memory; pass a smaller --dim or --batch.") from error

    return exit_code("word_vectors", run_recipe)


def run(options: argparse.Namespace) -> None:
    """Train, then report on the terminal and in the files of the output directory."""
    console = Console()
    check_writable(options.out)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    corpus = read_corpus(options.corpus, options.min_count)
    words = choose_words(corpus.vocabulary, options.words)
    wordsim = options.wordsim or find_wordsim()
    judged_pairs = read_judged_pairs(wordsim) if wordsim else None
    print_corpus(console, corpus, options)

    batches = build_batches(corpus, options, options.seed)
    steps_per_epoch = batches.steps_per_epoch()
    model = build_model(corpus, options.dim)
    optimizer = build_optimizer(options.optimizer, model.parameters(), options.lr)
    history = train(
        model,
        optimizer,
        batches,
        total_steps=min(math.ceil(options.epochs * steps_per_epoch), options.steps or sys.maxsize),
        words_per_step=len(corpus.rows) / steps_per_epoch,
    )
    print_training(console, history, model, optimizer)

    vectors = WordVectors(corpus.vocabulary, model.centers.weight.detach().numpy())
    print_neighbours(console, vectors, words)
    print_agreement(console, vectors, judged_pairs)
    compare(console, model, corpus, options)
    write_files(console, vectors, words, history, options)


# --- What was asked -----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints in the recipe's one-sentence form."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}.")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check every flag.

    Raises:
        RecipeError: a flag is unknown or its value is outside its range.
    """
    parser = _Parser(
        prog="python -m recipes.word_vectors",
        description="Train skip-gram word vectors on a text and show what they and the optimizer are worth.",
        formatter_class=HelpWithDefaults,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--corpus", type=Path, default=WORDNET, help="UTF-8 text, plain or .gz, a sentence a line")
    add("--out", type=Path, default=Path("demo_output"), help="directory for the files written")
    add("--optimizer", choices=OPTIMIZERS, default=OPTIMIZERS[0], help="what updates the tables")
    add("--dim", type=whole_number(2, 4096), default=128, help="length of a vector")
    add("--epochs", type=whole_number(1, 10_000), default=6, help="times the text is read")
    add("--steps", type=whole_number(1, 10**9), help="stop after this many steps")
    add("--lr", type=_real(0, 1000), default=0.015, help="learning rate at the start")
    add("--batch", type=_batch, default=8192, help=f"pairs in a step, a multiple of {GROUP}")
    add("--window", type=whole_number(1, 100), default=10, help="farthest context of a word")
    add("--negatives", type=whole_number(1, 1000), default=16, help="negative samples of a pair")
    add("--subsample", type=_real(0, 1), default=3e-5, help="share above which words are thinned")
    add("--min-count", type=whole_number(1, 10**9), default=2, help="drop words rarer than this")
    add("--words", type=_words, help="comma-separated words whose neighbours are shown")
    add("--wordsim", type=Path, help="WordSim-353, where gensim is not installed to provide it")
    add("--rounds", type=whole_number(0, 10_000), default=40, help="rounds of the comparison; 0: none")
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, help="fixes all chance")
    add("--threads", type=whole_number(1, 1024), help="threads of torch (default: as many as it takes itself)")
    return parser.parse_args(arguments)


def _real(above: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not above < value <= high:
            raise argparse.ArgumentTypeError(f"{value:g} does not lie in ({above:g}, {high:g}]")
        return value

    return parse


def _batch(text: str) -> int:
    value = whole_number(GROUP, 2**20)(text)
    if value % GROUP:
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of {GROUP}")
    return value


def _words(text: str) -> list[str]:
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError("no word is given")
    return list(dict.fromkeys(words))


def choose_words(vocabulary: list[str], asked: list[str] | None) -> list[str]:
    """Choose the words to show: those asked for, else well-known ones, else frequent ones."""
    known = set(vocabulary)
    if asked is None:
        present = [word for word in WORDS_SHOWN if word in known]
        # The first tenth of the words is mostly grammar: the, of, and.
        start = len(vocabulary) // 10
        return present or vocabulary[start : start + len(WORDS_SHOWN)]
    for word in asked:
        if word not in known:
            raise RecipeError(
                f"--words names {word!r}, which is not in the vocabulary; name words that occur "
                "in the corpus, or lower --min-count."
            )
    return asked


def build_batches(corpus: Corpus, options: argparse.Namespace, seed: int) -> BatchStream:
    """Build the stream of batches that the flags describe."""
    return BatchStream(
        corpus,
        batch=options.batch,
        group=GROUP,
        negatives=options.negatives,
        window=options.window,
        subsample=options.subsample,
        seed=seed,
    )


def build_model(corpus: Corpus, dim: int) -> SkipGram:
    """Build the tables, or say that they do not fit."""
    num_rows = len(corpus.vocabulary)
    try:
        return SkipGram(num_rows, dim)
    except RuntimeError as error:  # what torch raises when an allocation fails
        raise RecipeError(
            f"two tables of {num_rows:,} x {dim} do not fit in memory; pass a smaller --dim or a larger --min-count."
        ) from error


# --- What came of it ----------------------------------------------------------------------------


def print_corpus(console: Console, corpus: Corpus, options: argparse.Namespace) -> None:
    """Say what is about to be trained on."""
    console.print(
        f"[bold]{options.corpus.name}[/]: {len(corpus.rows):,} words of text, "
        f"{len(corpus.vocabulary):,} words in the vocabulary, vectors of {options.dim}, "
        f"optimizer {options.optimizer}, {torch.get_num_threads()} threads"
    )


def print_training(console: Console, history: History, model: SkipGram, optimizer: torch.optim.Optimizer) -> None:
    """Say how long training took and what the moments weigh at its end."""
    share = sum(history.step_ms) / 1000 / history.seconds
    table_bytes = sum(table.nbytes for table in model.parameters())
    console.print(
        f"{len(history.losses):,} steps in {history.seconds:.1f} s, "
        f"{history.num_words / history.seconds:,.0f} words/s; {share:.0%} of the time in "
        f"optimizer.step(), median {statistics.median(history.step_ms):.2f} ms; moments of "
        f"{_megabytes(moment_bytes(optimizer))} for tables of {_megabytes(table_bytes)}"
    )


def print_neighbours(console: Console, vectors: WordVectors, words: list[str]) -> None:
    """Print the nearest neighbours of a few words."""
    table = Table(title="Nearest neighbours", title_justify="left")
    table.add_column("word", style="bold")
    table.add_column("neighbours, nearest first")
    for word in words:
        table.add_row(word, ", ".join(vectors.neighbours(word, NEIGHBOURS_SHOWN)))
    console.print(table)


def print_agreement(console: Console, vectors: WordVectors, judged_pairs: list[tuple[str, str, float]] | None) -> None:
    """Print the correlation with WordSim-353, or what is needed for it."""
    if judged_pairs is None:
        console.print(
            "WordSim-353 is not here, so the vectors go unjudged: it comes with gensim "
            "(pip install gensim), or pass --wordsim FILE."
        )
        return
    agreement = measure_agreement(vectors, judged_pairs)
    if agreement is None:
        console.print("WordSim-353: too few of its words occur in this corpus to judge by.")
        return
    console.print(
        f"WordSim-353: Spearman rank correlation [bold]{agreement.correlation:.3f}[/] over the "
        f"{agreement.num_pairs} of {agreement.num_all_pairs} pairs whose words are known"
    )


def compare(console: Console, model: SkipGram, corpus: Corpus, options: argparse.Namespace) -> None:
    """Step both optimizers through batches not seen in training, unless told or unable to."""
    if options.rounds == 0:
        return
    batches = build_batches(corpus, options, options.seed + COMPARISON_SEED_OFFSET)
    try:
        comparison = compare_optimizers(model, batches, rounds=options.rounds, lr=options.lr)
    except RecipeError as error:
        console.print(f"The optimizers are not compared: {error}")
        return
    print_comparison(console, comparison)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print time and memory of both optimizers, side by side."""
    table = Table(
        title=f"One step on the same gradients: {comparison.num_lookups:,.0f} lookups, "
        f"{comparison.num_touched:,.0f} distinct rows",
        title_justify="left",
    )
    num_rounds = WARM_UP_ROUNDS + len(comparison.step_ms["torch"])
    table.add_column("optimizer", style="bold")
    moments_headings = ("moments after 1 step", f"after {num_rounds} steps")
    for heading in ("median ms", "20 to 80 %", "speed", *moments_headings):
        table.add_column(heading, justify="right")
    torch_step_ms = comparison.step_ms["torch"]
    for name, step_ms in comparison.step_ms.items():
        median = statistics.median(step_ms)
        low, *_, high = statistics.quantiles(step_ms, n=5, method="inclusive") if len(step_ms) > 1 else step_ms * 2
        table.add_row(
            name,
            f"{median:.2f}",
            f"{low:.1f} to {high:.1f}",
            f"{statistics.median(torch_step_ms) / median:.2f} x",
            _megabytes(comparison.first_moment_bytes[name]),
            _megabytes(comparison.last_moment_bytes[name]),
        )
    console.print(table)
    console.print(
        f"{len(torch_step_ms)} interleaved rounds on clones of the trained tables; the clones "
        f"then differ by {comparison.relative_difference:.0e} of how far they moved"
    )


def write_files(
    console: Console,
    vectors: WordVectors,
    words: list[str],
    history: History,
    options: argparse.Namespace,
) -> None:
    """Write the vectors and both pictures."""
    vectors_path = options.out / "vectors.txt"
    training_path = options.out / "training.png"
    neighbourhoods_path = options.out / "neighbourhoods.png"
    try:
        vectors.save(vectors_path)
        draw_training(history, options.optimizer, training_path)
        draw_neighbourhoods(vectors, words, options.seed, neighbourhoods_path)
    except OSError as error:
        raise RecipeError(f"cannot write to {options.out}: {error.strerror or error}.") from error
    console.print(f"Wrote {vectors_path}, {training_path} and {neighbourhoods_path}")


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
