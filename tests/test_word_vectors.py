"""The word-vector recipe: its arithmetic by hand, a short run end to end, and its complaints."""

import gzip
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

for package in ("numpy", "scipy", "sklearn", "matplotlib", "adjustText", "rich"):
    pytest.importorskip(package, reason="needs the recipes extra: pip install '.[recipes]'")

import numpy as np  # noqa: E402  (after the skip)
import torch  # noqa: E402

from recipes.command_line import RecipeError  # noqa: E402
from recipes.word_vectors import cli, corpus, training, vectors  # noqa: E402
from recipes.word_vectors.comparison import compare_optimizers  # noqa: E402
from recipes.word_vectors.corpus import Batch, BatchStream, Corpus  # noqa: E402
from recipes.word_vectors.model import SkipGram  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LINES_OF_SLICE = 3000
SMALL = ["--dim", "16", "--batch", "512", "--rounds", "2", "--words", "animal,person"]


@pytest.fixture(scope="module")
def text_slice(tmp_path_factory):
    """Cut a small real text from the one the recipe ships."""
    path = tmp_path_factory.mktemp("text") / "slice.txt"
    with gzip.open(cli.WORDNET, "rt", encoding="utf-8") as lines:
        path.write_text("".join(itertools.islice(lines, LINES_OF_SLICE)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small_corpus(text_slice):
    return corpus.read_corpus(text_slice, min_count=2)


def make_stream(text, seed=0, **changes):
    settings = dict(batch=512, group=32, negatives=4, window=5, subsample=1e-3) | changes
    return BatchStream(text, seed=seed, **settings)


def train_small(text, optimizer_name, seed=0, total_steps=300):
    torch.manual_seed(seed)
    model = SkipGram(len(text.vocabulary), dim=16)
    optimizer = training.build_optimizer(optimizer_name, model.parameters(), lr=0.05)
    history = training.train(model, optimizer, make_stream(text, seed), total_steps=total_steps, words_per_step=1)
    return model, history


# --- Corpus: by hand ----------------------------------------------------------------------------


@pytest.fixture
def allow_tiny(monkeypatch):
    monkeypatch.setattr(corpus, "FEWEST_ROWS", 1)


def test_vocabulary_goes_by_frequency_and_drops_rare_words(tmp_path, allow_tiny):
    path = tmp_path / "tiny.txt"
    path.write_text("b a A!\na c-b a\n\n  Don\u2019t  c, x_1", encoding="utf-8")
    text = corpus.read_corpus(path, min_count=2)
    assert text.vocabulary == ["a", "b", "c"]  # b and c occur equally often; b came first
    assert text.counts.tolist() == [4, 2, 2]
    assert text.rows.tolist() == [1, 0, 0, 0, 2, 1, 0, 2]
    assert text.lines.tolist() == [0, 0, 0, 1, 1, 1, 1, 3]
    assert corpus.read_corpus(path, min_count=1).vocabulary == ["a", "b", "c", "don\u2019t", "x", "1"]


def test_compression_and_byte_order_mark_change_nothing(tmp_path, text_slice, small_corpus):
    path = tmp_path / "named_as_if_plain.txt"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + text_slice.read_bytes()))
    again = corpus.read_corpus(path, min_count=2)
    assert again.vocabulary == small_corpus.vocabulary
    assert np.array_equal(again.rows, small_corpus.rows)


def test_keep_probability_by_hand():
    keep = corpus.keep_probability(np.array([90, 10]), threshold=0.1)
    assert keep == pytest.approx([1 / 3, 1.0])


def pairs_of(rows, lines, keep, window, seed=0):
    drawn = corpus.draw_pairs(
        np.array(rows, dtype=np.int32),
        np.array(lines, dtype=np.int32),
        np.array(keep),
        window,
        np.random.default_rng(seed),
    )
    return sorted(zip(*(side.tolist() for side in drawn), strict=True))


def test_pairs_stay_on_their_line():
    pairs = pairs_of([0, 1, 2, 3], [0, 0, 0, 1], keep=[1.0] * 4, window=1)
    assert pairs == [(0, 1), (1, 0), (1, 2), (2, 1)]


def test_windows_reach_over_dropped_words():
    pairs = pairs_of([0, 1, 2], [0, 0, 0], keep=[1.0, 0.0, 1.0], window=1)
    assert pairs == [(0, 2), (2, 0)]


def test_far_contexts_are_drawn_less_often():
    near, far = [(0, 1), (1, 0), (1, 2), (2, 1)], {(0, 2), (2, 0)}
    drawn = [pairs_of([0, 1, 2], [0, 0, 0], [1.0] * 3, 2, seed) for seed in range(400)]
    assert all(sorted(set(pairs) - far) == near for pairs in drawn)
    # Each end looks 1 or 2 words far with equal chance: one far pair in a draw, on average.
    assert np.mean([len(pairs) - len(near) for pairs in drawn]) == pytest.approx(1.0, abs=0.1)


def test_pairs_are_shuffled():
    rows = np.arange(1000, dtype=np.int32)
    lines = np.zeros(1000, dtype=np.int32)
    rng = np.random.default_rng(0)
    centers, _ = corpus.draw_pairs(rows, lines, np.ones(1000), 1, rng)
    assert abs(np.corrcoef(centers, np.arange(len(centers)))[0, 1]) < 0.1


def test_negatives_follow_counts_to_the_three_quarters():
    counts = np.array([16, 1])
    rows = np.zeros(40, dtype=np.int32)
    text = Corpus(["often", "seldom"], counts, rows, lines=rows)
    stream = make_stream(text, batch=64, group=2, negatives=50, subsample=1.0)
    negatives = np.concatenate([b.negatives for b in itertools.islice(stream, 20)])
    assert negatives.shape == (20 * 32, 50)
    assert (negatives == 0).mean() == pytest.approx(8 / 9, abs=0.01)


def test_batches_go_on_past_the_end_of_the_text():
    rows = np.array([0, 1], dtype=np.int32)
    text = Corpus(["one", "two"], np.array([1, 1]), rows, lines=np.zeros(2, dtype=np.int32))
    stream = make_stream(text, batch=32, group=32, subsample=1.0)
    assert stream.steps_per_epoch() == 2 / 32
    for batch in itertools.islice(stream, 3):
        assert sorted(zip(batch.centers, batch.contexts, strict=True)) == [(0, 1)] * 16 + [(1, 0)] * 16


def test_the_seed_fixes_the_batches(small_corpus):
    first, again, other = (
        np.concatenate([b.centers for b in itertools.islice(make_stream(small_corpus, seed), 3)]) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# --- Model and training -------------------------------------------------------------------------


def test_loss_is_that_of_the_formula():
    torch.manual_seed(0)
    model = SkipGram(num_rows=7, dim=3)
    torch.nn.init.normal_(model.contexts.weight)
    batch = Batch(np.array([0, 1, 2, 0]), np.array([3, 3, 4, 5]), np.array([[6, 0, 1], [2, 2, 5]]))
    u, v = model.centers.weight.double(), model.contexts.weight.double()
    want = torch.tensor(0.0, dtype=torch.float64)
    for pair, (center, context) in enumerate(zip(batch.centers, batch.contexts, strict=True)):
        want -= torch.sigmoid(u[center] @ v[context]).log()
        for negative in batch.negatives[pair // 2]:
            want -= torch.sigmoid(-u[center] @ v[negative]).log()
    torch.testing.assert_close(model(batch).double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", training.OPTIMIZERS)
def test_loss_falls(name, small_corpus):
    _, history = train_small(small_corpus, name)
    assert len(history.losses) == len(history.step_ms) == 300
    assert np.mean(history.losses[-10:]) < 0.9 * np.mean(history.losses[:10])


@pytest.mark.parametrize("name", training.OPTIMIZERS)
def test_the_seed_fixes_the_vectors(name, small_corpus):
    first, again, other = (
        train_small(small_corpus, name, seed, total_steps=10)[0].centers.weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_stops_when_the_loss_is_not_finite(small_corpus):
    model = SkipGram(len(small_corpus.vocabulary), dim=4)
    torch.nn.init.constant_(model.centers.weight, torch.nan)
    optimizer = training.build_optimizer("torch", model.parameters(), lr=0.1)
    with pytest.raises(RecipeError, match=r"loss became nan at step 1; pass a smaller --lr"):
        training.train(model, optimizer, make_stream(small_corpus), total_steps=2, words_per_step=1)


def test_both_optimizers_are_compared_on_the_same_steps(small_corpus):
    torch.manual_seed(0)
    model = SkipGram(len(small_corpus.vocabulary), dim=16)
    torch.nn.init.normal_(model.contexts.weight)
    before = [table.detach().clone() for table in model.parameters()]
    comparison = compare_optimizers(model, make_stream(small_corpus), rounds=4, lr=0.01)
    assert {name: len(times) for name, times in comparison.step_ms.items()} == {
        "sparseadam": 4,
        "torch": 4,
    }
    assert 0 <= comparison.relative_difference < 1e-3
    assert comparison.num_lookups == 2 * 512 + 512 // 32 * 4
    assert 0 < comparison.num_touched < comparison.num_lookups
    table_bytes = sum(table.nbytes for table in before)
    assert comparison.first_moment_bytes["torch"] == 2 * table_bytes
    assert comparison.first_moment_bytes["sparseadam"] < 2 * table_bytes
    for table, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(table, kept)


# --- Vectors ------------------------------------------------------------------------------------


@pytest.fixture
def compass():
    points = np.array([[1, 0], [1, 0.1], [0, 2], [-3, 0]], dtype=np.float32)
    return vectors.WordVectors(["east", "eastish", "north", "west"], points)


def test_neighbours_go_by_angle(compass):
    assert compass.neighbours("east", 3) == ["eastish", "north", "west"]
    assert compass.similarity("east", "west") == pytest.approx(-1.0)


def test_saved_text_holds_words_and_numbers(compass, tmp_path):
    compass.save(tmp_path / "vectors.txt")
    want = "4 2\neast 1 0\neastish 1 0.1\nnorth 0 2\nwest -3 0\n"
    assert (tmp_path / "vectors.txt").read_bytes().decode() == want


def test_agreement_counts_known_pairs_only(compass, tmp_path):
    path = tmp_path / "judged.csv"
    path.write_text("Word 1,Word 2,Human (mean)\nEast,eastish,9\neast,north,5\neast,west,1\neast,moon,2\n")
    agreement = vectors.measure_agreement(compass, vectors.read_judged_pairs(path))
    assert agreement == vectors.Agreement(pytest.approx(1.0), num_pairs=3, num_all_pairs=4)


def test_agreement_needs_known_pairs(compass):
    assert vectors.measure_agreement(compass, [("east", "moon", 1.0)] * 9) is None


def test_wordsim_is_found_in_gensim():
    pytest.importorskip("gensim", reason="gensim brings WordSim-353")
    pairs = vectors.read_judged_pairs(vectors.find_wordsim())
    assert len(pairs) == 353
    assert ("tiger", "cat", 7.35) in pairs


# --- The whole recipe ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_run(text_slice, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "made" / "for_it"
    code = cli.main(["--corpus", str(text_slice), "--out", str(out), "--steps", "40", *SMALL])
    return code, out


def test_a_short_run_writes_its_files(finished_run, small_corpus):
    code, out = finished_run
    assert code == 0
    for picture in ("training.png", "neighbourhoods.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG\r\n")
    heading, *lines = (out / "vectors.txt").read_text(encoding="utf-8").splitlines()
    assert heading == f"{len(small_corpus.vocabulary)} 16"
    assert [line.split(" ")[0] for line in lines] == small_corpus.vocabulary
    assert all(len(line.split(" ")) == 17 for line in lines)


@pytest.mark.filterwarnings("ignore")  # what gensim warns of is not ours to mend
def test_gensim_loads_the_vectors(finished_run, small_corpus):
    models = pytest.importorskip("gensim.models", reason="gensim reads word2vec's format")
    path = finished_run[1] / "vectors.txt"
    loaded = models.KeyedVectors.load_word2vec_format(str(path))
    assert loaded.index_to_key == small_corpus.vocabulary
    numbers = np.loadtxt(path, skiprows=1, usecols=range(1, 17), comments=None, dtype=np.float32)
    np.testing.assert_array_equal(loaded.vectors, numbers)


def test_the_report_names_what_was_measured(text_slice, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    wordsim = tmp_path / "judged.tsv"
    wordsim.write_text("animal\tplant\t5\nperson\tanimal\t4\nperson\twater\t1\n")
    options = ["--steps", "5", *SMALL, "--optimizer", "torch", "--wordsim", str(wordsim)]
    assert cli.main(["--corpus", str(text_slice), "--out", str(tmp_path / "out"), *options]) == 0
    report = capsys.readouterr().out
    for part in (
        "slice.txt",
        "words/s",
        "Nearest neighbours",
        "over the 3 of 3 pairs",
        "median ms",
        "sparseadam",
        "neighbourhoods.png",
    ):
        assert part in report


def test_torch_alone_will_do(text_slice, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sparseadam", None)
    monkeypatch.setattr(cli, "find_wordsim", lambda: None)
    options = ["--steps", "2", *SMALL, "--optimizer", "torch"]
    assert cli.main(["--corpus", str(text_slice), "--out", str(tmp_path), *options]) == 0
    report = " ".join(capsys.readouterr().out.split())
    assert "The optimizers are not compared: sparseadam cannot be imported" in report
    assert "pip install gensim" in report


def test_words_to_show_fall_back_on_frequent_ones():
    vocabulary = [f"mot{number}" for number in range(100)]
    assert cli.choose_words(vocabulary, None) == vocabulary[10:20]
    assert cli.choose_words([*vocabulary, "dog"], None) == ["dog"]


# --- Complaints ---------------------------------------------------------------------------------


def complaint(capsys, *arguments):
    """Run with arguments that cannot work; return the one sentence that says so."""
    assert cli.main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("word_vectors: ")
    assert lines[0].endswith(".")
    return lines[0]


BAD_TEXTS = {
    "empty": (b"", "holds no words"),
    "no_words": (b"... --- ...\n!?\n", "holds no words"),
    "tiny": (b"a few words, a few words\n", "too small: 3 words occur at least 2 times"),
    "binary": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not text"),
    "late_nul": (b"words and words\n" * 9000 + b"\0\n", "is not text"),
    "latin1": (("caf\u00e9 " * 900).encode("latin-1"), "is not UTF-8 text"),
    "utf16": (("plain words\n" * 900).encode("utf-16"), "is not text"),
    "gzip_cut_short": (gzip.compress(b"words " * 9000)[:-20], "damaged gzip file"),
    "gzip_garbled": (gzip.compress(b"")[:10] + b"\xff" * 50, "damaged gzip file"),
    "gzip_only_magic": (b"\x1f\x8b", "damaged gzip file"),
    "one_word_a_line": (
        "\n".join(f"w{number % 60}" for number in range(600)).encode(),
        "no line holds two words",
    ),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_unusable_text_is_refused_in_a_sentence(name, tmp_path, capsys):
    content, part = BAD_TEXTS[name]
    path = tmp_path / name
    path.write_bytes(content)
    said = complaint(capsys, "--corpus", str(path), "--out", str(tmp_path / "out"))
    assert part in said


@pytest.mark.parametrize(("path", "part"), [("absent.txt", "No such file"), (".", "Is a directory")])
def test_unreadable_text_is_refused_in_a_sentence(path, part, tmp_path, capsys):
    path = tmp_path / path
    said = complaint(capsys, "--corpus", str(path), "--out", str(tmp_path))
    assert f"cannot read {path}: {part}" in said


BAD_FLAGS = [
    (["--dim", "1"], "--dim: 1 does not lie in [2, 4096]"),
    (["--dim", "many"], "--dim: 'many' is not a whole number"),
    (["--lr", "0"], "--lr: 0 does not lie in (0, 1000]"),
    (["--lr", "nan"], "--lr: nan does not lie in"),
    (["--lr", "fast"], "--lr: 'fast' is not a number"),
    (["--batch", "100"], "--batch: 100 is not a multiple of 32"),
    (["--epochs", "0"], "--epochs: 0 does not lie in"),
    (["--steps", "-1"], "--steps: -1 does not lie in"),
    (["--seed", "-1"], "--seed: -1 does not lie in"),
    (["--threads", "0"], "--threads: 0 does not lie in"),
    (["--words", " , "], "--words: no word is given"),
    (["--words", "animal,zzyzx"], "--words names 'zzyzx'"),
    (["--optimizer", "sgd"], "--optimizer: invalid choice: 'sgd'"),
    (["--min-count", "1000000"], "is too small: 0 words occur at least 1000000 times"),
    (["--colour", "red"], "unrecognized arguments: --colour red"),
    (["--wordsim", "absent.tsv"], "cannot read absent.tsv: No such file"),
    (["--wordsim", __file__], "is no list of judged pairs"),
    (["--wordsim", os.devnull], "holds no judged pairs"),
]


@pytest.mark.parametrize(("flags", "part"), BAD_FLAGS, ids=[" ".join(f) for f, _ in BAD_FLAGS])
def test_bad_flags_are_refused_in_a_sentence(flags, part, text_slice, tmp_path, capsys):
    said = complaint(capsys, "--corpus", str(text_slice), "--out", str(tmp_path), *flags)
    assert part in said


def test_unwritable_output_is_refused_before_any_work(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        said = complaint(capsys, "--corpus", str(tmp_path / "absent"), "--out", str(out))
        assert f"cannot write to {out}: " in said


def test_missing_sparseadam_is_named_with_its_remedy(text_slice, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sparseadam", None)
    said = complaint(capsys, "--corpus", str(text_slice), "--out", str(tmp_path))
    assert "sparseadam cannot be imported" in said
    assert "--optimizer torch" in said


def test_the_command_ends_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "recipes.word_vectors", "--corpus", str(tmp_path / "absent")]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("word_vectors: cannot read ")
    assert done.stderr.count("\n") == 1
