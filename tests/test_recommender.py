"""The recommender's recipe: it learns, two processes learn what one does, and go on from where one stopped."""

import gzip
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import torchrun

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

pytest.importorskip("rich", reason="needs the recipes extra: pip install '.[recipes]'")

from recipes.recommender.cli import main  # noqa: E402  (after the skip)

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TASTES, ITEMS_A_TASTE, NUM_CUSTOMERS, ITEMS_A_CUSTOMER = 4, 25, 80, 15
FLAGS = ("--dim", "8", "--batch", "128", "--negatives", "64", "--lr", "0.05")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Customers who buy items of one taste only, in some order."""
    folder = tmp_path_factory.mktemp("purchases")
    generator = torch.Generator().manual_seed(0)
    with gzip.open(folder / "interactions.txt.gz", "wt") as lines:
        for customer in range(NUM_CUSTOMERS):
            bought = torch.randperm(ITEMS_A_TASTE, generator=generator)[:ITEMS_A_CUSTOMER]
            items = bought + customer % NUM_TASTES * ITEMS_A_TASTE
            lines.write(" ".join(map(str, [customer, *items.tolist()])) + "\n")
    return folder


def by_two(tmp_path: Path, *flags: str) -> str:
    """Run two processes and return what they print."""
    arguments = ["--nproc-per-node", "2", "-m", "recipes.recommender", *flags]
    return torchrun(arguments, tmp_path, PYTHONPATH=str(ROOT))


def figures(printed: str) -> dict[str, float]:
    """Take the figures out of a report."""
    patterns = {
        "from_step": r"steps from step (\d+)",
        "first_loss": r"([\d.]+) at first",
        "last_loss": r"([\d.]+) over the last",
        "trained": r"recall@20 on [\d,]+ customers: ([\d.]+)",
        "popular": r"the most popular items ([\d.]+)",
        "untrained": r"untrained ([\d.]+)",
    }
    text = " ".join(printed.split())
    return {name: float(re.search(pattern, text)[1]) for name, pattern in patterns.items()}  # type: ignore[index]


def test_two_processes_learn_what_one_does(data, tmp_path, capsys):
    flags = ("--data", str(data), *FLAGS, "--epochs", "20")
    assert main(flags) == 0
    alone = figures(capsys.readouterr().out)
    assert alone["trained"] > 0.9 > 0.5 > max(alone["popular"], alone["untrained"])
    assert alone["last_loss"] < 0.8 * alone["first_loss"]
    assert figures(by_two(tmp_path, *flags)) == pytest.approx(alone, abs=0.01)


def test_two_processes_go_on_from_where_one_stopped(data, tmp_path, capsys):
    checkpoints = tmp_path / "checkpoints"
    saving = ("--checkpoints", str(checkpoints), "--save-every", "50")
    flags = ("--data", str(data), *FLAGS, "--steps", "100", *saving)
    assert main(flags) == 0
    alone = figures(capsys.readouterr().out)
    assert main(flags) == 0
    assert "is of step 100: nothing is left to train" in " ".join(capsys.readouterr().out.split())
    (last,) = checkpoints.glob("step-*100")
    shutil.rmtree(last)
    resumed = figures(by_two(tmp_path, *flags))
    assert resumed["from_step"] == 50
    assert resumed["trained"] == pytest.approx(alone["trained"], abs=0.01)


def test_what_it_cannot_read_is_said_without_a_traceback(tmp_path, capsys):
    assert main(["--data", str(tmp_path)]) == 1
    assert re.search(r"recommender: cannot read .*pass --data FOLDER", capsys.readouterr().err)
    for content, message in {
        "0 1 2\n2 1\n": "line 2 is not that of customer 1",
        "0 one\n": "line 1 is no list of whole numbers",
        "0 1 2\n": "no customer has 5 items",
        f"0 1 {2**63}\n": "line 1 is not that of customer 0",
    }.items():
        with gzip.open(tmp_path / "interactions.txt.gz", "wt") as lines:
            lines.write(content)
        assert main(["--data", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err
    whole = gzip.compress("".join(f"{number} 1 2 3 4 5\n" for number in range(1000)).encode())
    for content in (whole[:-20], whole[:15] + b"\xff" * 10 + whole[25:]):
        (tmp_path / "interactions.txt.gz").write_bytes(content)
        assert main(["--data", str(tmp_path)]) == 1
        assert re.search(r"recommender: cannot read .*pass --data FOLDER", capsys.readouterr().err)
    place = tmp_path / "interactions.txt.gz" / "checkpoints"
    assert main(["--data", str(tmp_path), "--checkpoints", str(place)]) == 1
    assert f"recommender: cannot write to {place}: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "0"], "does not lie in (0, inf)"),
        (["--optimizer", "torch", "--checkpoints", "there"], "only with --optimizer sparseadam"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(flags)
    assert message in capsys.readouterr().err
