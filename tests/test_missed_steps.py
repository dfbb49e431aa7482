"""The missed-steps recipe: what it compares is equal but for the optimizer, its figures by brute force, short runs."""

import gzip
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

for package in ("numpy", "matplotlib", "rich", "scipy", "sklearn", "adjustText"):
    pytest.importorskip(package, reason="needs the recipes extra: pip install '.[recipes]'")

import numpy as np  # noqa: E402  (after the skip)
import torch  # noqa: E402

from recipes.command_line import RecipeError  # noqa: E402
from recipes.missed_steps import cli, gaps, measure, report, results, runs  # noqa: E402
from recipes.missed_steps.data import read_interactions, read_triples  # noqa: E402
from recipes.missed_steps.knowledge_graph import KnowledgeGraph  # noqa: E402
from recipes.missed_steps.methods import DENSE, FOREACH, METHODS, REPLAY, ROW, SKIP  # noqa: E402
from recipes.missed_steps.recommender import Recommender  # noqa: E402
from recipes.missed_steps.results import Results, ResultsFile  # noqa: E402
from recipes.missed_steps.runs import Run  # noqa: E402
from recipes.missed_steps.tasks import INTERACTIONS, build_task  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = ROOT.parent / "shared" / "data"
PAGE = ROOT / "docs" / "missed_steps.md"
MEASURED = ROOT / "recipes" / "missed_steps" / "measured.jsonl"
AIM = 0.005  # how far an epoch's loss may be from dense Adam's

needs_data = pytest.mark.skipif(
    not DATA.exists(), reason="needs the real data in ../shared/data, which is not part of this repository"
)


def lines_of_interactions(num_customers=120, num_items=150, seed=0):
    """Write customers who buy around a favourite item: each line a number, then from 2 to 40 items."""
    chance = random.Random(seed)
    for customer in range(num_customers):
        favourite = chance.randrange(num_items)
        items = {(favourite + round(chance.gauss(0, 15))) % num_items for _ in range(chance.randint(2, 40))}
        yield " ".join(map(str, (customer, *items)))


def lines_of_triples(num_triples, seed, num_entities=200):
    """Write triples of two relations: one adds 1 to its head, the other 7, except for some."""
    chance = random.Random(seed)
    for _ in range(num_triples):
        head, relation = chance.randrange(num_entities), chance.choice((1, 7))
        tail = (head + relation) % num_entities if chance.random() < 0.9 else chance.randrange(num_entities)
        yield f"e{head}\tplus{relation}\te{tail}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Made-up data where the tasks look for it: the interactions, and codex-s, one of whose files is compressed."""
    directory = tmp_path_factory.mktemp("data")
    interactions = directory / INTERACTIONS
    interactions.parent.mkdir(parents=True)
    with gzip.open(interactions, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines_of_interactions()))
    graph = directory / "kg" / "codex-s"
    graph.mkdir(parents=True)
    with gzip.open(graph / "train.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines_of_triples(700, seed=0)))
    for seed, name in enumerate(("valid", "test"), start=1):
        (graph / f"{name}.txt").write_text("\n".join(lines_of_triples(60, seed)), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def interactions(directory):
    return read_interactions(directory / INTERACTIONS)


@pytest.fixture(scope="module")
def triples(directory):
    return read_triples(directory / "kg" / "codex-s")


@pytest.fixture(scope="module")
def recommender(interactions):
    """Batches that leave most rows out: a row misses some forty steps between two touches."""
    return Recommender("retail", interactions, dim=8, batch=8, epochs=2)


@pytest.fixture(scope="module")
def graph(triples):
    return KnowledgeGraph("graph", triples, dim=8, batch=16, epochs=2, negatives=8)


@pytest.fixture(params=["recommender", "graph"])
def task(request):
    return request.getfixturevalue(request.param)


# --- Data ---------------------------------------------------------------------------------------


def test_each_interaction_is_in_one_part_and_held_out_in_tenths(interactions):
    written = {
        (int(customer), int(item))
        for line in lines_of_interactions()
        for customer, *items in [line.split()]
        for item in items
    }
    parts = [set(map(tuple, part.tolist())) for part in (interactions.train, interactions.valid, interactions.test)]
    assert sum(map(len, parts)) == len(interactions.train) + len(interactions.valid) + len(interactions.test)
    assert sum(map(len, parts)) == len(written)
    assert set.union(*parts) == written
    for customer in range(interactions.num_customers):
        in_train, in_valid, in_test = (sum(pair[0] == customer for pair in part) for part in parts)
        assert in_valid == in_test == (in_train + in_valid + in_test) // 10
    assert len(parts[1]) > 50


def test_what_is_held_out_is_drawn_by_chance_and_always_the_same(tmp_path):
    path = tmp_path / "interactions.txt"
    path.write_text("\n".join(f"{customer} " + " ".join(map(str, range(20))) for customer in range(50)) + "\n50 20")
    first, again = read_interactions(path), read_interactions(path)
    for part in ("train", "valid", "test"):
        assert np.array_equal(getattr(first, part), getattr(again, part))
    # 100 draws of 20 items: fewer than 15 different ones would be no chance.
    assert len(set(first.valid[:, 1].tolist())) >= 15


def test_triples_are_numbered_alike_in_all_parts(triples):
    entities, relations = {}, {}
    for part, written in (
        (triples.train, lines_of_triples(700, 0)),
        (triples.valid, lines_of_triples(60, 1)),
        (triples.test, lines_of_triples(60, 2)),
    ):
        for (head, relation, tail), line in zip(part.tolist(), written, strict=True):
            head_name, relation_name, tail_name = line.split()
            assert entities.setdefault(head_name, head) == head
            assert relations.setdefault(relation_name, relation) == relation
            assert entities.setdefault(tail_name, tail) == tail
    assert sorted(entities.values()) == list(range(triples.num_entities))
    assert sorted(relations.values()) == list(range(triples.num_relations)) == [0, 1]


BAD_INTERACTIONS = {
    "a word": ("0 1 2\n1 two 3", "line 2 of .* is not a customer and items, all whole numbers"),
    "a negative number": ("0 1 -2", r"line 1 of .* has a number outside \[0, 2147483647\]"),
    "a number without a row": (f"0 1\n{2**63} 1", "line 2 of .* has a number outside"),
    "no pairs": ("0\n\n1\n", "holds no interactions"),
    "a customer with all": ("0 1\n1 0 1 2", "customer 1 of .* has all 3 items"),
    "no customer with ten": ("0 1 2 3\n1 4", "has ten items, so none can be held out"),
}


@pytest.mark.parametrize("text, message", BAD_INTERACTIONS.values(), ids=BAD_INTERACTIONS)
def test_bad_interactions_are_refused(text, message, tmp_path):
    path = tmp_path / "interactions.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        read_interactions(path)


@pytest.mark.parametrize(
    "text, message", [("a b c\na b", "line 2 of .*valid.txt has 2 words"), ("\n", "valid.txt holds no triples")]
)
def test_bad_triples_are_refused(text, message, tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("a b c\n", encoding="utf-8")
    (tmp_path / "valid.txt").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        read_triples(tmp_path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"there is no .*train.txt.gz; pass --data"):
        read_triples(tmp_path)
    path = tmp_path / "interactions.txt.gz"
    path.write_bytes(gzip.compress(b"0 1 2 3\n" * 1000)[:-20])
    with pytest.raises(RecipeError, match=r"cannot read .*interactions\.txt\.gz: "):
        read_interactions(path)
    whole = gzip.compress(b"0 1 2 3\n" * 1000)
    for content in (b"0 1 2 3\n", whole[:15] + b"\xff" * 10 + whole[25:]):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=r"cannot read .*interactions\.txt\.gz: "):
            read_interactions(path)


# --- Batches ------------------------------------------------------------------------------------


def read_epoch(task, seed, epoch):
    return [tuple(part.tolist() for part in batch) for batch in task.batches(seed, epoch)]


def test_batches_are_a_function_of_seed_and_epoch(task):
    first = read_epoch(task, seed=1, epoch=2)
    torch.manual_seed(99)
    assert read_epoch(task, seed=1, epoch=2) == first
    assert read_epoch(task, seed=2, epoch=2) != first
    assert read_epoch(task, seed=2, epoch=1) != first
    assert read_epoch(task, seed=1, epoch=0) != first


def test_an_epoch_reads_the_training_part_once(task):
    batches = read_epoch(task, seed=0, epoch=0)
    rows = [row for *columns, _ in batches for row in zip(*columns, strict=True)]
    assert sorted(rows) == sorted(map(tuple, task.data.train.tolist()))
    assert {len(batch[0]) for batch in batches[:-1]} == {task.batch}


def test_negatives_are_items_that_the_customer_was_not_seen_to_buy(recommender):
    trained_on = set(map(tuple, recommender.data.train.tolist()))
    drawn = set()
    for customers, liked, negatives in read_epoch(recommender, seed=0, epoch=0):
        assert len(liked) == len(negatives)
        pairs = set(zip(customers, negatives, strict=True))
        assert not pairs & trained_on
        drawn |= pairs
    # What is held out is not known, so it is drawn as well.
    assert drawn & set(map(tuple, recommender.data.valid.tolist()))
    assert {item for _, item in drawn} == set(range(recommender.data.num_items))


def test_negatives_of_a_graph_are_any_entities(graph):
    batches = read_epoch(graph, seed=0, epoch=0)
    assert {len(negatives) for *_, negatives in batches} == {8}
    drawn = {entity for *_, negatives in batches for entity in negatives}
    assert min(drawn) >= 0
    assert max(drawn) < graph.data.num_entities
    assert len(drawn) > graph.data.num_entities * 0.7


# --- Judgements, by brute force -----------------------------------------------------------------


def pairs_of(data, *parts):
    return {tuple(pair) for part in parts for pair in getattr(data, part).tolist()}


@pytest.mark.parametrize("part, known_parts", [("valid", ["train"]), ("test", ["train", "valid"])])
def test_recall_is_the_share_of_what_is_held_out_among_the_first_twenty(recommender, part, known_parts):
    torch.manual_seed(1)
    model = recommender.build_model(sparse=False)
    known, held_out = pairs_of(recommender.data, *known_parts), pairs_of(recommender.data, part)
    recalls = []
    for customer, vector in enumerate(model.customers.weight.tolist()):
        scores = {
            item: math.fsum(map(math.prod, zip(vector, item_vector, strict=True)))
            for item, item_vector in enumerate(model.items.weight.tolist())
            if (customer, item) not in known
        }
        listed = sorted(scores, key=scores.__getitem__, reverse=True)[:20]
        wanted = {item for owner, item in held_out if owner == customer}
        if wanted:
            recalls.append(len(wanted.intersection(listed)) / len(wanted))
    assert 0 < len(recalls) < recommender.data.num_customers
    assert recommender.judge(model, part) == {"Recall@20": pytest.approx(sum(recalls) / len(recalls))}


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_are_filtered_and_equal_scores_share_them(graph, part, ties):
    torch.manual_seed(5)
    model = graph.build_model(sparse=False)
    if ties:
        for table in model.parameters():
            table.data.round_()
    entities, relations = model.entities.weight.double(), model.relations.weight.double()
    known = pairs_of(graph.data, "train", "valid", "test")
    ranks = []
    for head, relation, tail in getattr(graph.data, part).tolist():
        tail_scores = (entities[head] * relations[relation] * entities).sum(1)
        head_scores = (entities[tail] * relations[relation + 2] * entities).sum(1)
        for scores, answer, is_right in (
            (tail_scores, tail, lambda other, h=head, r=relation: (h, r, other) in known),
            (head_scores, head, lambda other, t=tail, r=relation: (other, r, t) in known),
        ):
            others = [other for other in range(len(entities)) if not is_right(other)]
            above = sum(bool(scores[other] > scores[answer]) for other in others)
            equal = sum(bool(scores[other] == scores[answer]) for other in others)
            ranks.append(1 + above + equal / 2)
    assert any(rank % 1 for rank in ranks) == ties
    assert ties or 10 in ranks  # the last that counts for Hits@10
    assert graph.judge(model, part) == {
        "MRR": pytest.approx(sum(1 / rank for rank in ranks) / len(ranks), rel=1e-6),
        "Hits@10": pytest.approx(sum(rank <= 10 for rank in ranks) / len(ranks)),
    }


def test_more_questions_than_are_asked_at_once_give_the_same(graph, monkeypatch):
    model = graph.build_model(sparse=False)
    whole = graph.judge(model, "test")
    monkeypatch.setattr("recipes.missed_steps.knowledge_graph.QUERIES_AT_ONCE", 7)
    assert graph.judge(model, "test") == pytest.approx(whole)


def test_the_loss_of_a_graph_is_the_mean_over_both_questions(graph):
    torch.manual_seed(3)
    model = graph.build_model(sparse=False)
    heads, relations, tails, negatives = batch = next(graph.batches(0, 0))
    entities, rows = model.entities.weight, model.relations.weight
    losses = []
    for head, relation, tail in zip(heads, relations, tails, strict=True):
        for subject, row, answer in ((head, relation, tail), (tail, relation + 2, head)):
            question = entities[subject] * rows[row]
            scores = torch.stack([question @ entities[other] for other in (answer, *negatives)])
            losses.append(-torch.log_softmax(scores, 0)[0])
    assert model(*batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_the_loss_of_a_recommender_is_of_the_difference_of_scores(recommender):
    model = recommender.build_model(sparse=False)
    torch.nn.init.normal_(model.items.weight)
    batch = next(recommender.batches(0, 0))
    customers, items = model.customers.weight, model.items.weight
    losses = [
        torch.log1p(torch.exp(customers[customer] @ items[negative] - customers[customer] @ items[item]))
        for customer, item, negative in zip(*batch, strict=True)
    ]
    assert model(*batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


# --- Runs ---------------------------------------------------------------------------------------


class Watched:
    """A task that notes what its models are given, and what they hold when they are judged."""

    def __init__(self, task, monkeypatch):
        """Watch all tasks of this one's class."""
        self.batches, self.judged, self.first_tables = [], {}, None
        build, judge = type(task).build_model, type(task).judge

        def build_model(task, *, sparse):
            model = build(task, sparse=sparse)
            self.first_tables = [table.detach().clone() for table in model.parameters()]
            model.register_forward_pre_hook(
                lambda _model, batch: self.batches.append([part.tolist() for part in batch])
            )
            return model

        def judge_model(task, model, part):
            self.judged[part] = [table.detach().clone() for table in model.parameters()]
            return judge(task, model, part)

        monkeypatch.setattr(type(task), "build_model", build_model)
        monkeypatch.setattr(type(task), "judge", judge_model)


def test_methods_differ_in_nothing_but_the_optimizer(task, monkeypatch):
    seen = []
    for method in METHODS:
        with monkeypatch.context() as patch:
            watched = Watched(task, patch)
            outcome = runs.train(task, method, lr=0.03, seed=4)
        seen.append((watched, outcome))
    first, dense = seen[0]
    assert len(first.batches) == 2 * math.ceil(len(task.data.train) / task.batch)
    for watched, _ in seen[1:]:
        assert watched.batches == first.batches
        assert all(map(torch.equal, watched.first_tables, first.first_tables))
    # And each of them is what it says: replay is dense Adam up to rounding, those that skip are not.
    by_name = {outcome.method: outcome for _, outcome in seen}
    distances = {name: max(map(abs, results.relative_differences(outcome, dense))) for name, outcome in by_name.items()}
    assert max(distances[REPLAY.name], distances[FOREACH.name]) < 1e-4
    assert min(distances[SKIP.name], distances[ROW.name]) > AIM
    assert len({tuple(outcome.losses) for outcome in by_name.values()}) == len(METHODS)
    assert dense.losses[1] < dense.losses[0]


def test_replayed_tables_are_up_to_date_when_they_are_judged(task, monkeypatch):
    """Rows that the last batches left out as well: their momentum has moved them on since."""
    judged = {}
    for method in (DENSE, REPLAY, SKIP):
        with monkeypatch.context() as patch:
            watched = Watched(task, patch)
            runs.train(task, method, lr=0.01, seed=0)
        judged[method.name] = watched.judged
    for part in ("valid", "test"):
        dense, replayed, skipped = (judged[method.name][part] for method in (DENSE, REPLAY, SKIP))
        for own, theirs, behind in zip(replayed, dense, skipped, strict=True):
            assert torch.allclose(own, theirs, atol=2e-4)
            if len(own) > 4:  # relations are in every batch
                assert not torch.allclose(behind, theirs, atol=2e-3)


def test_another_seed_is_another_run_and_the_same_seed_the_same(recommender):
    first, again, other = (runs.train(recommender, SKIP, 0.01, seed) for seed in (0, 0, 1))
    assert replace(again, seconds=first.seconds) == first
    assert other.losses != first.losses


def test_the_loss_of_an_epoch_is_the_mean_over_its_rows(recommender):
    """With a rate of next to nothing the tables stay, so that the loss can be taken again afterwards."""
    torch.manual_seed(5)
    model = recommender.build_model(sparse=False)
    run = runs.train(recommender, DENSE, lr=1e-12, seed=5)
    for epoch, loss in enumerate(run.losses):
        sums = [model(*batch).item() * len(batch[0]) for batch in recommender.batches(5, epoch)]
        assert loss == pytest.approx(sum(sums) / len(recommender.data.train), rel=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run(graph):
    with pytest.raises(RecipeError, match=r"graph: the loss of skip became (nan|inf) with a rate of 1e\+30"):
        runs.train(graph, SKIP, lr=1e30, seed=0)


@needs_data
def test_on_real_data_replay_has_dense_adams_losses_and_ranks():
    real = build_task("codex-s", DATA, epochs=3)
    dense, replayed, skipped = (runs.train(real, method, 0.01, seed=0) for method in (DENSE, REPLAY, SKIP))
    assert max(map(abs, results.relative_differences(replayed, dense))) < AIM
    assert max(map(abs, results.relative_differences(skipped, dense))) > AIM
    for metric, value in dense.test.items():
        assert replayed.test[metric] == pytest.approx(value, abs=0.005)
    assert dense.losses[-1] < dense.losses[0]


# --- Gaps ---------------------------------------------------------------------------------------


def test_gaps_are_counted_as_by_hand(task):
    measured = {table.table: table for table in gaps.measure_gaps(task, seed=3)}
    last, found, touched, num_steps = {}, [], 0, 0
    for epoch in range(task.epochs):
        for batch in read_epoch(task, 3, epoch):
            if isinstance(task, Recommender):
                rows = {*batch[1], *batch[2]}
            else:
                rows = {*batch[0], *batch[2], *batch[3]}
            found += [num_steps - last[row] - 1 for row in rows if row in last]
            last |= dict.fromkeys(rows, num_steps)
            touched += len(rows)
            num_steps += 1
    name = "items" if isinstance(task, Recommender) else "entities"
    num_rows = task.data.num_items if isinstance(task, Recommender) else task.data.num_entities
    assert measured[name] == gaps.Gaps(
        name,
        num_rows,
        pytest.approx(touched / num_steps / num_rows),
        pytest.approx(sum(found) / len(found)),
        np.median(found),
        pytest.approx(np.quantile(found, 0.9)),
        max(found),
    )
    assert max(found) > 10
    assert len(measured) == 2


def test_a_single_step_has_no_gaps(recommender):
    assert gaps.measure_gaps(replace(recommender, batch=10_000, epochs=1), seed=0) == []


# --- Results ------------------------------------------------------------------------------------


def made_up_run(method, lr=0.01, seed=0, valid=0.5, test=0.5, losses=(2.0, 1.0), seconds=1.0):
    return Run(method.name, lr, seed, list(losses), {"MRR": valid}, {"MRR": test}, seconds)


def made_up_results(*made_up_runs):
    table = gaps.Gaps("entities", 1000, 0.05, 20.0, 12.0, 50.0, 900)
    return Results({"name": "made up"}, list(made_up_runs), [table])


def test_the_learning_rate_is_chosen_on_the_validation_part_by_the_first_seed():
    results_ = made_up_results(
        made_up_run(SKIP, 0.1, valid=0.3, test=0.9),
        made_up_run(SKIP, 0.2, valid=0.4, test=0.1),
        made_up_run(SKIP, 0.3, seed=1, valid=0.9, test=0.9),
        made_up_run(DENSE, 0.4, valid=0.9, test=0.9),
    )
    assert results_.best_rate(SKIP.name) == 0.2
    assert results_.at_best_rate(SKIP.name) == [results_.runs[1]]
    assert results_.methods() == [DENSE.name, SKIP.name]
    assert results_.rates() == [0.1, 0.2, 0.3, 0.4]


def test_losses_are_compared_at_the_same_rate_and_seed():
    results_ = made_up_results(
        made_up_run(DENSE, 0.1, 0, losses=(4.0, 2.0)),
        made_up_run(DENSE, 0.1, 1, losses=(8.0, 2.0)),
        made_up_run(DENSE, 0.2, 0, losses=(1.0, 1.0)),
        made_up_run(SKIP, 0.1, 0, losses=(4.4, 2.0)),
        made_up_run(SKIP, 0.1, 1, losses=(8.0, 1.5)),
        made_up_run(SKIP, 0.2, 1, losses=(9.0, 9.0)),
    )
    assert results.worst_difference(results_, SKIP.name, DENSE.name, 0.1) == pytest.approx(0.25)
    assert results.worst_difference(results_, SKIP.name, DENSE.name, 0.2) is None
    assert results.relative_differences(results_.runs[3], results_.runs[0]) == pytest.approx([0.1, 0.0])


def test_the_tables_say_what_the_runs_say():
    results_ = made_up_results(
        made_up_run(DENSE, 0.1, 0, test=0.50, seconds=2.0),
        made_up_run(DENSE, 0.1, 1, test=0.60),
        made_up_run(SKIP, 0.2, 0, test=0.40, losses=(2.5, 1.0)),
        made_up_run(SKIP, 0.2, 1, test=0.56),
        made_up_run(SKIP, 0.1, 0, valid=0.1, losses=(2.0, 1.5)),
        made_up_run(REPLAY, 0.1, 0, test=0.50, losses=(2.0, 1.00001)),
    )
    gap_sheet, ranking, losses = report.build_sheets([results_])
    assert gap_sheet.rows == [
        {
            "task, table": "made up, entities",
            "rows": "1,000",
            "touched in a step": "5.0%",
            "median gap": "12",
            "mean": "20.0",
            "nine tenths, at most": "50",
            "largest": "900",
        }
    ]
    columns = ("made up", "best rate", "valid MRR", "test MRR", "MRR above dense's", "epoch, s")
    assert [tuple(row) for row in ranking.rows] == [columns] * 3
    assert [tuple(row.values()) for row in ranking.rows] == [
        (DENSE.name, "0.1", "0.5000 ± 0.0000", "0.5500 ± 0.0500", "", "1.00"),
        (REPLAY.name, "0.1", "0.5000", "0.5000", "+0.0000", "1.00"),
        (SKIP.name, "0.2", "0.5000 ± 0.0000", "0.4800 ± 0.0800", "-0.0700 ± 0.0300", "1.00"),
    ]
    assert losses.rows == [
        {"task, method": "made up, replay", "0.1": "1e-03 %", "0.2": report.NOT_MEASURED},
        {"task, method": "made up, skip", "0.1": "50.0%", "0.2": report.NOT_MEASURED},
    ]
    assert losses.to_markdown().splitlines()[-1] == "| made up, skip | 50.0% | none |"


def test_what_is_in_the_file_is_not_trained_again(graph, tmp_path, monkeypatch):
    trained = []

    def train(task, method, lr, seed):
        trained.append((method.name, lr, seed))
        return made_up_run(method, lr, seed, valid=lr if method is DENSE else -lr)

    monkeypatch.setattr(measure, "train", train)
    monkeypatch.setattr(measure, "measure_gaps", lambda *_: trained.append("gaps") or made_up_results().gaps)
    path = tmp_path / "results.jsonl"
    told = []
    first = measure.measure(graph, ResultsFile(path), [0.1, 0.2], 3, told.append)
    assert trained == [
        "gaps",
        *((method.name, lr, 0) for lr in (0.1, 0.2) for method in METHODS),
        *((method.name, 0.2 if method is DENSE else 0.1, seed) for seed in (1, 2) for method in METHODS),
    ]
    assert len(told) == len(trained)

    kept = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*kept[:3], *kept[4:]]) + "\n", encoding="utf-8")
    del trained[:]
    again = measure.measure(graph, ResultsFile(path), [0.1, 0.2], 3, told.append)
    assert trained == [(METHODS[2].name, 0.1, 0)]
    assert sorted(map(repr, again.runs)) == sorted(map(repr, first.runs))

    for other in (replace(graph, dim=4), replace(graph, data=replace(graph.data, test=graph.data.valid))):
        del trained[:]
        measure.measure(other, ResultsFile(path), [0.1], 1, told.append)
        assert trained == ["gaps", *((method.name, 0.1, 0) for method in METHODS)]
    assert [len(found.runs) for found in ResultsFile(path)] == [len(first.runs), len(METHODS), len(METHODS)]


# --- The whole recipe ---------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, directory):
    """Make a quick run quicker still, on made-up data."""
    monkeypatch.setattr("recipes.missed_steps.tasks.DIM", 4)
    monkeypatch.setattr("recipes.missed_steps.tasks.RETAIL_BATCHES", {"retail-2048": 256})
    monkeypatch.setattr(cli, "QUICK_RATES", (0.01, 0.03))
    monkeypatch.setenv("COLUMNS", "200")
    return ["--quick", "--data", str(directory)]


def test_a_quick_run_reports_and_writes_what_it_measured(quick, tmp_path, capsys, monkeypatch):
    out = tmp_path / "made" / "for_it"
    assert cli.main([*quick, "--seeds", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for part in (*(method.name for method in METHODS), "retail-2048, customers", "codex-s, relations", "Hits@10"):
        assert part in said
    assert (out / "missed_steps.png").read_bytes().startswith(b"\x89PNG\r\n")
    written = (out / "missed_steps.md").read_text(encoding="utf-8")
    lines = (out / "missed_steps.jsonl").read_text(encoding="utf-8").splitlines()
    assert str(tmp_path) not in written + "".join(lines)
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    trained = [record for record in records if "run" in record]
    assert len(trained) == 2 * len(METHODS) * (2 + 1)
    assert {record["origin"]["torch"] for record in records} == {torch.__version__}
    assert {record["task"]["name"] for record in records} == {"retail-2048", "codex-s"}
    assert {record["task"]["epochs"] for record in records} == {1}
    for sheet in report.build_sheets(list(ResultsFile(out / "missed_steps.jsonl"))):
        assert sheet.to_markdown() in written

    # The same from the file alone, where training would fail.
    monkeypatch.setattr(measure, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(cli, "build_task", lambda *_: pytest.fail("read the data"))
    assert cli.main(["--report", str(out / "missed_steps.jsonl"), "--out", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "missed_steps.md").read_text(encoding="utf-8") == written
    assert (tmp_path / "other" / "missed_steps.png").exists()
    assert not (tmp_path / "other" / "missed_steps.jsonl").exists()


def test_a_run_that_was_stopped_goes_on(quick, tmp_path, capsys, monkeypatch):
    train = measure.train
    flags = [*quick, "--tasks", "codex-s", "--out", str(tmp_path)]
    trained = []

    def stop_at_the_third(task, method, lr, seed):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(method.name)
        return train(task, method, lr, seed)

    monkeypatch.setattr(measure, "train", stop_at_the_third)
    assert cli.main(flags) == 130
    assert capsys.readouterr().err == "missed_steps: stopped; run it again to go on.\n"
    monkeypatch.setattr(measure, "train", lambda *arguments: trained.append(arguments[1].name) or train(*arguments))
    assert cli.main(flags) == 0
    assert trained == [method.name for method in METHODS] * 2


def test_the_page_shows_the_tables_of_the_results_kept():
    """What the documentation says was measured is what the file beside the recipe says."""
    page = PAGE.read_text(encoding="utf-8")
    kept = list(ResultsFile(MEASURED))
    assert [found.name for found in kept] == list(cli.DEFAULT_TASKS)
    for sheet in report.build_sheets(kept):
        assert sheet.to_markdown() in page
    for found in kept:
        for method in found.methods():
            assert len(found.at_best_rate(method)) == cli.NUM_SEEDS
            assert {run.lr for run in found.runs if run.method == method and run.seed == 0} == set(cli.RATES)
        assert {DENSE.name, REPLAY.name, SKIP.name, ROW.name} <= set(found.methods())
        # What the page says of the learning rates at which training is stable.
        worst = [results.worst_difference(found, REPLAY.name, DENSE.name, lr) for lr in cli.RATES if lr <= 0.01]
        assert max(worst) <= 1e-5


# --- Complaints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [["--seeds", "0"], ["--epochs", "-1"], ["--threads", "many"], ["--tasks", "chess"], ["--colour", "red"]]
)
def test_bad_flags_are_refused_by_name(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*flags, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--quick"], ["--tasks", "wn18rr"], ["--seeds", "2"], ["--epochs", "2"], ["--threads", "1"]]
)
def test_flags_of_training_are_refused_where_nothing_is_trained(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--report", str(MEASURED), *flags, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert f"argument {flags[0]}: not allowed with --report" in capsys.readouterr().err


def test_missing_data_is_said_before_any_work(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "measure", lambda *_: pytest.fail("began to work"))
    flags = ["--tasks", "retail-2048", "wn18rr", "--data", str(directory), "--out", str(tmp_path)]
    assert cli.main(flags) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"missed_steps: there is no {directory / 'kg' / 'wn18rr' / 'train.txt.gz'}; pass --data")
    assert said.count("\n") == 1


def test_unwritable_output_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "build_task", lambda *_: pytest.fail("began to work"))
    file = tmp_path / "file"
    file.touch()
    assert cli.main(["--quick", "--out", str(file)]) == 1
    assert capsys.readouterr().err.startswith(f"missed_steps: cannot write to {file}: ")


@pytest.mark.parametrize("content", ["{", "[]", '{"task": {"name": "x"}, "run": {"lr": 1}, "origin": {}}'])
def test_another_file_in_the_place_of_results_is_refused(content, directory, tmp_path, capsys):
    path = tmp_path / "missed_steps.jsonl"
    path.write_text(content + "\n", encoding="utf-8")
    for flags in (["--quick", "--data", str(directory)], ["--report", str(path)]):
        assert cli.main([*flags, "--out", str(tmp_path)]) == 1
        assert capsys.readouterr().err == (
            f"missed_steps: {path} holds something else than this recipe's results; move it away.\n"
        )
    assert path.read_text(encoding="utf-8") == content + "\n"


def test_reports_of_nothing_are_refused(tmp_path, capsys, graph):
    path = tmp_path / "results.jsonl"
    assert cli.main(["--report", str(path), "--out", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err
        == f"missed_steps: there is no file {path}; pass --report with the results of an earlier run.\n"
    )
    path.touch()
    assert cli.main(["--report", str(path), "--out", str(tmp_path)]) == 1
    assert f"missed_steps: {path} holds no results; pass --report" in capsys.readouterr().err
    ResultsFile(path).add_run(graph.settings(), made_up_run(SKIP))
    assert cli.main(["--report", str(path), "--out", str(tmp_path)]) == 1
    assert f"has no run of {DENSE.name} on graph" in capsys.readouterr().err
