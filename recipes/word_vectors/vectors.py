"""What the trained vectors are good for: neighbours, agreement with people, a file for others."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from ..command_line import RecipeError

FREQUENT_ROWS = 15_000
FEWEST_JUDGED_PAIRS = 3


class WordVectors:
    """Words and their vectors, compared by cosine."""

    def __init__(self, vocabulary: list[str], vectors: NDArray[np.float32]) -> None:
        """Scale the vectors once for all comparisons.

        Args:
            vocabulary: the word of each row, most frequent first.
            vectors: ``[num_rows, dim]`` float32.
        """
        self.vocabulary = vocabulary
        self.vectors = vectors
        self._row_of = {word: row for row, word in enumerate(vocabulary)}
        self._directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def __contains__(self, word: str) -> bool:
        """Tell whether the word has a vector."""
        return word in self._row_of

    def direction(self, word: str) -> NDArray[np.float32]:
        """Return the vector of the word, scaled to length 1."""
        return self._directions[self._row_of[word]]

    def similarity(self, first: str, second: str) -> float:
        """Return the cosine of the angle between two words."""
        return float(self.direction(first) @ self.direction(second))

    def neighbours(self, word: str, count: int) -> list[str]:
        """Return the words nearest to a word, nearest first.

        Only frequent words are offered: the vector of a word seen twice says more about the two
        sentences it stood in than about the word.
        """
        similarities = self._directions[:FREQUENT_ROWS] @ self.direction(word)
        nearest = np.argsort(-similarities, kind="stable")[: count + 1]
        return [self.vocabulary[row] for row in nearest if self.vocabulary[row] != word][:count]

    def save(self, path: Path) -> None:
        """Write word2vec's text format: a line of sizes, then a word and its numbers a line."""
        num_rows, dim = self.vectors.shape
        numbers = " ".join(["%.5g"] * dim)
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(f"{num_rows} {dim}\n")
            for word, vector in zip(self.vocabulary, self.vectors.tolist(), strict=True):
                file.write(f"{word} {numbers % tuple(vector)}\n")


@dataclass(frozen=True)
class Agreement:
    """How the order of similarities agrees with people's.

    Attributes:
        correlation: Spearman's rank correlation, in [-1, 1].
        num_pairs: pairs whose words both have vectors, which alone are judged.
        num_all_pairs: pairs in the file.
    """

    correlation: float
    num_pairs: int
    num_all_pairs: int


def find_wordsim() -> Path | None:
    """Find the copy of WordSim-353 that gensim installs among its test data, if gensim is there."""
    gensim = importlib.util.find_spec("gensim")
    if gensim is None or gensim.origin is None:
        return None
    path = Path(gensim.origin).parent / "test" / "test_data" / "wordsim353.tsv"
    return path if path.is_file() else None


def read_judged_pairs(path: Path) -> list[tuple[str, str, float]]:
    """Read pairs of words with a human score, separated by tabs or commas, in lower case.

    Comments (``#``) and a heading on the first line are passed over.

    Raises:
        RecipeError: the file cannot be read, or a line is not such a pair.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason}.") from error
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror or error}.") from error
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if lines and _judged_pair(lines[0]) is None:
        del lines[0]
    pairs = []
    for line in lines:
        pair = _judged_pair(line)
        if pair is None:
            raise RecipeError(
                f"{path} is no list of judged pairs: {line[:40]!r} does not read word, word, "
                "score, separated by tabs or commas."
            )
        pairs.append(pair)
    if not pairs:
        raise RecipeError(f"{path} holds no judged pairs.")
    return pairs


def _judged_pair(line: str) -> tuple[str, str, float] | None:
    fields = [field.strip().lower() for field in line.split("\t" if "\t" in line else ",")]
    try:
        first, second, score = fields[0], fields[1], float(fields[2])
    except (IndexError, ValueError):
        return None
    return (first, second, score) if len(fields) == 3 and math.isfinite(score) else None


def measure_agreement(vectors: WordVectors, judged_pairs: list[tuple[str, str, float]]) -> Agreement | None:
    """Correlate the ranks of our similarities with those of people; ``None`` if too few are known.

    References:
        Finkelstein et al., *Placing Search in Context: The Concept Revisited*, 2002 (WordSim-353).
    """
    known = [pair for pair in judged_pairs if pair[0] in vectors and pair[1] in vectors]
    if len(known) < FEWEST_JUDGED_PAIRS:
        return None
    ours = [vectors.similarity(first, second) for first, second, _ in known]
    correlation = spearmanr(ours, [score for _, _, score in known]).statistic
    return Agreement(float(correlation), len(known), len(judged_pairs))
