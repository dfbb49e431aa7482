"""The library under real frameworks: the code of docs/works_with.md, against the same loops without a framework."""

from __future__ import annotations

import copy
import functools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from snapshot import bits, snapshot
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from sparseadam import SparseAdam, clip_grad_norm_

PAGE = Path(__file__).parents[1] / "docs" / "works_with.md"
CORA = Path(__file__).parents[2] / "shared" / "data" / "graph" / "cora"
NUM_BATCHES = 9

THIRD_PARTIES = (
    # torch: that there is one process is what these tests are about.
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning",
    # Lightning: a loader without workers is fast enough here, and a run may resume from the folder that it writes to.
    "ignore:.*does not have many workers:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    # Lightning and PyG use what torch has deprecated, and Planetoid's files are pickles of old numpy.
    "ignore:.isinstance.treespec, LeafSpec.:FutureWarning",
    "ignore:.torch.jit.* is deprecated:DeprecationWarning",
    "ignore:.*align should be passed as Python or NumPy boolean",
)
pytestmark = [pytest.mark.filterwarnings(ignored) for ignored in THIRD_PARTIES]


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """Keep to one thread: steps this small only wait for a second one, long on a busy machine."""
    torch.set_num_threads(1)


def documented(section: str) -> SimpleNamespace:
    """Run the code of the examples' model and of one section of the page, and return what it defines."""
    source, heading, is_code = [], "", False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            is_code = line == "```python"
        elif is_code and heading in ("The examples' model", section):
            source.append(line)
            continue
        elif line.startswith("## "):
            heading = line.removeprefix("## ")
        source.append("")  # so that a traceback gives the page's own line
    names: dict[str, Any] = {"__name__": "works_with"}
    exec(compile("\n".join(source), PAGE, "exec"), names)
    return SimpleNamespace(**names)


def make(build: Callable[[], nn.Module], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build()


def make_loader() -> DataLoader:
    """Batches of 32; each looks rows up more than once, and each brings rows that none before it had."""
    generator = torch.Generator().manual_seed(1)
    size = 32 * NUM_BATCHES
    batch = torch.arange(size) // 32
    user = (torch.rand(size, generator=generator) * (20 + 30 * batch)).long()
    item = (torch.rand(size, generator=generator) * (20 + 20 * batch)).long()
    bought = torch.rand(size, generator=generator).round()
    return DataLoader(TensorDataset(user, item, bought), batch_size=32)


def weights(module: nn.Module) -> dict[str, Any]:
    return {name: bits(param) for name, param in module.named_parameters()}


def assert_same_run(module: nn.Module, optimizer: Any, other: nn.Module, other_optimizer: Any) -> None:
    """Compare weights, moments, steps and options of two runs bit for bit."""
    assert weights(module) == weights(other)
    assert snapshot(optimizer) == snapshot(other_optimizer)


# Lightning ----------------------------------------------------------------------------------------


@pytest.fixture
def lit() -> SimpleNamespace:
    pytest.importorskip("lightning", reason="needs the works-with extra: pip install '.[works-with]'")
    return documented("Lightning")


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def by_hand_per_epoch(
    page: SimpleNamespace, epochs: int, before_step: Callable[[nn.Module], None] = lambda model: None
) -> tuple[nn.Module, SparseAdam]:
    """Train as the page's Lightning module says, without Lightning."""
    module = make(page.LitRecommender)
    optimizer = SparseAdam(module.parameters(), lr=0.05)
    scheduler = ExponentialLR(optimizer, gamma=0.9)
    for _ in range(epochs):
        for user, item, bought in make_loader():
            optimizer.zero_grad()
            page.loss_of(module.model(user, item), bought).backward()
            before_step(module)
            optimizer.step()
        scheduler.step()
    return module, optimizer


def test_lightning_trains_as_the_loop_by_hand_does(lit: SimpleNamespace, tmp_path: Path) -> None:
    module = make(lit.LitRecommender)
    trainer = lit.fit(module, make_loader(), 3, tmp_path, **QUIET)
    assert_same_run(module, trainer.optimizers[0], *by_hand_per_epoch(lit, 3))


@pytest.mark.parametrize("saved_by", ["ModelCheckpoint", "save_checkpoint"])
def test_lightning_resumes_as_if_never_stopped(lit: SimpleNamespace, tmp_path: Path, saved_by: str) -> None:
    stopped = lit.fit(make(lit.LitRecommender), make_loader(), 2, tmp_path, **QUIET)
    checkpoint = tmp_path / "last.ckpt"
    if saved_by == "save_checkpoint":
        checkpoint = tmp_path / "by_hand.ckpt"
        stopped.save_checkpoint(checkpoint)
    resumed = make(lit.LitRecommender, seed=7)
    trainer = lit.fit(resumed, make_loader(), 4, tmp_path, resume_from=checkpoint, **QUIET)
    unstopped = make(lit.LitRecommender)
    unstopped_trainer = lit.fit(unstopped, make_loader(), 4, tmp_path, **QUIET)
    assert trainer.global_step == 4 * NUM_BATCHES
    assert_same_run(resumed, trainer.optimizers[0], unstopped, unstopped_trainer.optimizers[0])


# PyTorch knows the norm of sparse gradients from 2.14 on.
KNOWS_NORMS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


needs_norms = pytest.mark.skipif(not KNOWS_NORMS, reason="this PyTorch takes no norm of a sparse gradient")
lacks_norms = pytest.mark.skipif(KNOWS_NORMS, reason="this PyTorch takes the norm of a sparse gradient")


@pytest.mark.parametrize(
    ("algorithm", "operation"),
    [pytest.param("norm", "linalg_vector_norm", marks=lacks_norms), ("value", "clamp_")],
)
@pytest.mark.parametrize("make_optimizer", [SparseAdam, torch.optim.SparseAdam], ids=["ours", "torch's"])
def test_lightnings_own_clipping_fails_before_a_row_has_changed(
    lit: SimpleNamespace, tmp_path: Path, make_optimizer: Any, algorithm: str, operation: str
) -> None:
    """As the page says. It would be good news if this failed: then the page's hook is no longer needed."""
    module = make(lit.LitRecommender)
    module.configure_optimizers = lambda: make_optimizer(list(module.parameters()))
    clipping = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    with pytest.raises(NotImplementedError, match=f"{operation}.*SparseCPU"):
        lit.fit(module, make_loader(), 1, tmp_path, **clipping, **QUIET)
    assert weights(module) == weights(make(lit.LitRecommender))
    assert all(param.grad is not None for param in module.parameters())


@needs_norms
def test_lightnings_own_clipping_clips_to_a_norm(lit: SimpleNamespace, tmp_path: Path) -> None:
    """What is left of the last batch's gradients has the norm that was asked for."""
    module = make(lit.LitRecommender)
    clipping = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "norm"}
    lit.fit(module, make_loader(), 1, tmp_path, **clipping, **QUIET)
    assert clip_grad_norm_(module.parameters(), 1.0) == pytest.approx(0.01, rel=1e-3)


def test_the_pages_hook_clips_to_the_norm_of_the_dense_gradients(lit: SimpleNamespace, tmp_path: Path) -> None:
    max_norm, norms = 0.5, []

    def clip(module: nn.Module) -> None:
        dense = [param.grad.to_dense() for param in module.parameters()]
        norms.append(math.sqrt(sum(float(grad.double().square().sum()) for grad in dense)))
        for param, grad in zip(module.parameters(), dense, strict=True):
            # Back on the rows that were looked up, whatever their sums are.
            rows = param.grad._indices()[0].unique()
            scaled = grad[rows] * min(1.0, max_norm / norms[-1])
            param.grad = torch.sparse_coo_tensor(rows[None], scaled, param.shape, check_invariants=True)

    module = make(lit.LitClipped)
    trainer = lit.fit(module, make_loader(), 2, tmp_path, gradient_clip_val=max_norm, **QUIET)
    wanted, wanted_optimizer = by_hand_per_epoch(lit, 2, clip)
    assert min(norms) < max_norm < max(norms)  # clipped at some steps, left alone at others
    for param, other in zip(module.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)
        state, other_state = trainer.optimizers[0].state[param], wanted_optimizer.state[other]
        # Adam takes nearly the same steps on gradients of any scale; its moments do not.
        for key in ("rows", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[key], other_state[key], rtol=1e-3, atol=1e-9)


def test_lightning_trains_a_dense_layer_beside_tables(lit: SimpleNamespace, tmp_path: Path) -> None:
    module = make(lit.LitWithDenseLayer)
    trainer = lit.fit(module, make_loader(), 2, tmp_path, **QUIET)

    wanted = make(lit.LitWithDenseLayer)
    optimizers = [
        SparseAdam(wanted.model.parameters(), lr=0.05),
        torch.optim.Adam(wanted.scale.parameters(), lr=0.01),
    ]
    for user, item, bought in [*make_loader(), *make_loader()]:
        for optimizer in optimizers:
            optimizer.zero_grad()
        lit.loss_of(wanted.scale(wanted.model(user, item)[:, None])[:, 0], bought).backward()
        for optimizer in optimizers:
            optimizer.step()
    for optimizer, by_hand in zip(trainer.optimizers, optimizers, strict=True):
        assert_same_run(module, optimizer, wanted, by_hand)


# Accelerate ---------------------------------------------------------------------------------------


@pytest.fixture
def hf() -> Iterator[SimpleNamespace]:
    pytest.importorskip("accelerate", reason="needs the works-with extra: pip install '.[works-with]'")
    from accelerate.state import AcceleratorState, GradientState

    yield documented("Accelerate")
    # Accelerate keeps one state for the whole process.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerate_accumulates_as_the_loop_by_hand_does(hf: SimpleNamespace, tmp_path: Path) -> None:
    model = make(hf.Recommender)
    optimizer = hf.train(model, make_loader(), 3, tmp_path)

    wanted = make(hf.Recommender)
    by_hand = SparseAdam(wanted.parameters(), lr=0.05)
    scheduler = StepLR(by_hand, step_size=5, gamma=0.5)
    for _ in range(3):
        for index, (user, item, bought) in enumerate(make_loader(), 1):
            (hf.loss_of(wanted(user, item), bought) / 2).backward()
            if index % 2 == 0 or index == NUM_BATCHES:  # an epoch's last batch is not carried over
                by_hand.step()
                scheduler.step()
                by_hand.zero_grad()
    assert by_hand.param_groups[0]["lr"] == 0.05 * 0.5**3
    assert_same_run(model, optimizer.optimizer, wanted, by_hand)


def test_accelerate_resumes_as_if_never_stopped(hf: SimpleNamespace, tmp_path: Path) -> None:
    hf.train(make(hf.Recommender), make_loader(), 2, tmp_path / "stopped")
    resumed = make(hf.Recommender, seed=7)
    optimizer = hf.train(resumed, make_loader(), 2, tmp_path / "stopped", resume=True)
    unstopped = make(hf.Recommender)
    unstopped_optimizer = hf.train(unstopped, make_loader(), 4, tmp_path / "unstopped")
    assert_same_run(resumed, optimizer.optimizer, unstopped, unstopped_optimizer.optimizer)


def test_accelerate_prepares_an_optimizer_that_has_taken_steps(hf: SimpleNamespace) -> None:
    model = make(hf.Recommender)
    optimizer = steps(model, SparseAdam(model.parameters(), lr=0.05), range(3))
    before = snapshot(optimizer)
    hf.Accelerator(cpu=True).prepare(model, optimizer)
    assert len(before["states"][0]) == 2
    assert snapshot(optimizer) == before


def accelerated(hf: SimpleNamespace) -> tuple[Any, Any]:
    """Return an accelerator and a model with gradients."""
    accelerator = hf.Accelerator(cpu=True)
    model = accelerator.prepare(make(hf.Recommender))
    user, item, bought = next(iter(make_loader()))
    accelerator.backward(hf.loss_of(model(user, item), bought))
    return accelerator, model


@needs_norms
def test_accelerates_own_clipping_clips_to_a_norm(hf: SimpleNamespace) -> None:
    accelerator, model = accelerated(hf)
    assert accelerator.clip_grad_norm_(model.parameters(), 0.01) > 0.01
    assert clip_grad_norm_(model.parameters(), 1.0) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("clip", [pytest.param("clip_grad_norm_", marks=lacks_norms), "clip_grad_value_"])
def test_accelerates_own_clipping_fails(hf: SimpleNamespace, clip: str) -> None:
    """As the page says. It would be good news if this failed."""
    accelerator, model = accelerated(hf)
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        getattr(accelerator, clip)(model.parameters(), 0.01)


# PyTorch Geometric --------------------------------------------------------------------------------


def random_walk(
    rowptr: torch.Tensor, col: torch.Tensor, start: torch.Tensor, walk_length: int, p: float, q: float
) -> torch.Tensor:
    """Uniform walks, ``[len(start), walk_length + 1]``: pyg-lib's operation of this name, for p = q = 1."""
    assert p == q == 1.0
    walk = [start]
    for _ in range(walk_length):
        at = walk[-1]
        num_neighbours = rowptr[at + 1] - rowptr[at]
        assert (num_neighbours > 0).all()
        walk.append(col[rowptr[at] + (torch.rand(len(at)) * num_neighbours).long()])
    return torch.stack(walk, dim=1)


@pytest.fixture
def pyg(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The page's code, with walks drawn without pyg-lib: PyPI does not have it, and Node2Vec asks for it."""
    pytest.importorskip("torch_geometric", reason="needs the works-with extra: pip install '.[works-with]'")
    from torch_geometric.nn.models import node2vec

    monkeypatch.setattr(node2vec, "WITH_PYG_LIB", True)
    monkeypatch.setattr(torch.ops.pyg, "random_walk", random_walk, raising=False)
    return documented("PyTorch Geometric")


@pytest.fixture
def cora(tmp_path: Path) -> Any:
    """Cora as PyG reads it from Planetoid's files, which are put where it would download them to."""
    if not CORA.is_dir():
        pytest.skip("needs Planetoid's Cora in ../shared/data/graph/cora, which is not part of this repository")
    datasets = pytest.importorskip(
        "torch_geometric.datasets", reason="needs the works-with extra: pip install '.[works-with]'"
    )
    shutil.copytree(CORA, tmp_path / "Cora" / "raw")
    graph = datasets.Planetoid(str(tmp_path), "Cora")[0]
    assert (graph.num_nodes, graph.num_edges) == (2708, 10556)
    assert [int(mask.sum()) for mask in (graph.train_mask, graph.test_mask)] == [140, 1000]
    return graph


def accuracy(model: Any, graph: Any) -> float:
    """How many of the test papers a logistic regression on the vectors of the training papers gets right."""
    vectors = model().detach()
    train, test = graph.train_mask, graph.test_mask
    return float(model.test(vectors[train], graph.y[train], vectors[test], graph.y[test], max_iter=150))


def test_node2vec_learns_the_classes_of_papers_from_coras_graph(pyg: SimpleNamespace, cora: Any) -> None:
    torch.manual_seed(0)
    untrained, _ = pyg.train_node2vec(cora.edge_index, cora.num_nodes, 0)
    torch.manual_seed(0)
    model, losses = pyg.train_node2vec(cora.edge_index, cora.num_nodes, 10)
    test_classes = cora.y[cora.test_mask]
    largest_class = float(test_classes.bincount().max() / len(test_classes))
    measured = f"losses {losses[0]:.3f} to {losses[-1]:.3f}, accuracy {accuracy(model, cora):.3f}"
    print(f"{measured}, untrained {accuracy(untrained, cora):.3f}, largest class {largest_class:.3f}")
    # The loss of vectors that say nothing, all zero: two logarithms of a half.
    assert losses[-1] < 2 * math.log(2) < losses[0], measured
    assert accuracy(untrained, cora) < largest_class
    assert accuracy(model, cora) > 0.55 > largest_class + 0.2, measured


def test_node2vec_ends_where_torchs_sparse_adam_ends(pyg: SimpleNamespace, cora: Any) -> None:
    ends = []
    for make_optimizer in (functools.partial(SparseAdam, torch_eps=True), torch.optim.SparseAdam):
        pyg.train_node2vec.__globals__["SparseAdam"] = make_optimizer
        torch.manual_seed(0)
        ends.append(pyg.train_node2vec(cora.edge_index, cora.num_nodes, 2))
    (ours, our_losses), (theirs, their_losses) = ends
    assert our_losses == pytest.approx(their_losses, rel=1e-5)
    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)


def test_the_walks_of_these_tests_follow_edges_and_take_all_of_them(cora: Any) -> None:
    from torch_geometric.index import index2ptr
    from torch_geometric.utils import sort_edge_index

    row, col = sort_edge_index(cora.edge_index, num_nodes=cora.num_nodes)
    torch.manual_seed(0)
    start = torch.arange(cora.num_nodes).repeat(10)
    walk = random_walk(index2ptr(row, cora.num_nodes), col, start, 10, 1.0, 1.0)
    assert torch.equal(walk[:, 0], start)
    steps_taken = torch.stack([walk[:, :-1].flatten(), walk[:, 1:].flatten()]).unique(dim=1)
    edges = torch.stack([row, col]).unique(dim=1)
    number = torch.tensor([[cora.num_nodes], [1]])
    is_edge = torch.isin((steps_taken * number).sum(0), (edges * number).sum(0))
    assert is_edge.all()
    assert steps_taken.shape[1] > 0.99 * edges.shape[1]


# torch.distributed.checkpoint ---------------------------------------------------------------------


def steps(model: nn.Module, optimizer: Any, which: range) -> Any:
    """Take the steps of some batches of the loader, and return the optimizer."""
    for index, (user, item, bought) in enumerate(make_loader()):
        if index in which:
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(user, item).float(), bought).backward()
            optimizer.step()
    return optimizer


@pytest.fixture
def page() -> SimpleNamespace:
    return documented("torch.distributed.checkpoint")


Run = tuple[Any, SparseAdam]


def start(page: SimpleNamespace, seed: int = 0) -> Run:
    """A half-precision table beside one in float32, and one that is never looked up; another lr than at the end."""
    model = make(page.Recommender, seed)
    model.items.to(torch.bfloat16)
    model.unused = nn.Embedding(3, 2, sparse=True)
    return model, SparseAdam(model.parameters(), lr=0.05 + seed)


def run(page: SimpleNamespace, which: range) -> Run:
    model, optimizer = start(page)
    return model, steps(model, optimizer, which)


def assert_goes_on(page: SimpleNamespace, model: Any, optimizer: SparseAdam) -> None:
    """The run of four steps has been loaded: it stands and goes on as one that never stopped."""
    assert_same_run(model, optimizer, *run(page, range(4)))
    assert_same_run(model, steps(model, optimizer, range(4, 9)), *run(page, range(9)))


def test_a_distributed_checkpoint_resumes_in_a_fresh_optimizer(page: SimpleNamespace, tmp_path: Path) -> None:
    page.save(*run(page, range(4)), tmp_path)
    model, optimizer = start(page, seed=7)
    page.load(model, optimizer, tmp_path)
    assert_goes_on(page, model, optimizer)


def test_a_distributed_checkpoint_takes_the_place_of_other_state(page: SimpleNamespace, tmp_path: Path) -> None:
    page.save(*run(page, range(4)), tmp_path)
    model, optimizer = run(page, range(3, 8))
    page.load(model, optimizer, tmp_path)
    assert_goes_on(page, model, optimizer)


def test_a_distributed_checkpoint_made_a_file_resumes(page: SimpleNamespace, tmp_path: Path) -> None:
    """Parameters' numbers are strings in it, and must be found all the same: no state was loaded once."""
    page.save(*run(page, range(4)), tmp_path / "folder")
    dcp_to_torch_save(tmp_path / "folder", tmp_path / "file")
    saved = torch.load(tmp_path / "file", weights_only=True)
    assert set(saved["optim"]["state"]) == {"0", "1"}
    model, optimizer = start(page, seed=7)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optim"])
    assert_goes_on(page, model, optimizer)


@pytest.mark.parametrize("given", ["optimizer", "state_dict"])
def test_loading_in_place_needs_as_many_slots_and_then_restores_the_step(
    page: SimpleNamespace, tmp_path: Path, given: str
) -> None:
    """The saved step ends beside the state, under a string: it was lost once, as torch's SparseAdam loses it."""
    page.save(*run(page, range(4)), tmp_path)
    model, optimizer = run(page, range(4))
    steps(model, optimizer, range(2))  # no rows that were not there
    assert optimizer.state[model.users.weight]["step"] == 6
    if given == "optimizer":
        dcp.load({"model": model, "optim": optimizer}, checkpoint_id=tmp_path)
    else:
        target = {"model": model.state_dict(), "optim": optimizer.state_dict()}
        dcp.load(target, checkpoint_id=tmp_path)
        optimizer.load_state_dict(target["optim"])
    assert_goes_on(page, model, optimizer)


def test_loading_in_place_into_other_slots_changes_nothing(page: SimpleNamespace, tmp_path: Path) -> None:
    page.save(*run(page, range(4)), tmp_path)
    model, optimizer = run(page, range(2))
    before = weights(model), snapshot(optimizer)
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        dcp.load({"model": model, "optim": optimizer}, checkpoint_id=tmp_path)
    assert (weights(model), snapshot(optimizer)) == before


@pytest.mark.parametrize("make_optimizer", [SparseAdam, torch.optim.SparseAdam, torch.optim.Adam], ids=repr)
def test_loading_in_place_into_a_fresh_optimizer_finds_no_moments(
    page: SimpleNamespace, tmp_path: Path, make_optimizer: Any
) -> None:
    """As the page warns, of PyTorch's optimizers too."""
    table = nn.Embedding(5, 2, sparse=make_optimizer is not torch.optim.Adam)
    optimizer = make_optimizer(list(table.parameters()))
    table(torch.tensor([1, 3])).sum().backward()
    optimizer.step()
    dcp.save({"optim": optimizer}, checkpoint_id=tmp_path)
    fresh = make_optimizer(list(table.parameters()), lr=7.0)
    dcp.load({"optim": fresh}, checkpoint_id=tmp_path)
    assert fresh.param_groups[0]["lr"] == 0.001
    assert len(fresh.state) == 0


def test_a_state_by_names_loads_into_a_fresh_optimizer(page: SimpleNamespace, tmp_path: Path) -> None:
    saved = copy.deepcopy(get_optimizer_state_dict(*run(page, range(4))))
    assert set(saved["state"]) == {"users.weight", "items.weight"}
    dcp.save({"optim": saved}, checkpoint_id=tmp_path / "folder")
    dcp_to_torch_save(tmp_path / "folder", tmp_path / "file")
    for read in saved, torch.load(tmp_path / "file", weights_only=True)["optim"]:
        model, optimizer = start(page, seed=7)
        model.load_state_dict(run(page, range(4))[0].state_dict())
        optimizer.load_state_dict(read)
        assert_goes_on(page, model, optimizer)


def test_names_that_are_numbers_are_names(page: SimpleNamespace) -> None:
    """A ParameterList names its tables so; the optimizer has them the other way round."""

    def build() -> tuple[nn.ParameterList, SparseAdam]:
        tables = nn.ParameterList(nn.Parameter(torch.ones(3, 2)) for _ in range(2))
        return tables, SparseAdam([tables[1], tables[0]])

    tables, optimizer = build()
    for row, table in enumerate(tables):
        table.grad = torch.sparse_coo_tensor(torch.tensor([[row]]), torch.ones(1, 2), (3, 2), check_invariants=True)
    optimizer.step()
    _, fresh = build()
    fresh.load_state_dict(get_optimizer_state_dict(tables, optimizer))
    assert [state["rows"].tolist() for state in fresh.state.values()] == [[1], [0]]
    assert snapshot(fresh)["states"] == snapshot(optimizer)["states"]


@pytest.mark.parametrize(
    "options",
    [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}],
    ids=["plain", "flattened", "full"],
)
def test_set_optimizer_state_dict_resumes_in_an_optimizer_with_state(
    page: SimpleNamespace, options: dict[str, bool]
) -> None:
    chosen = StateDictOptions(strict=False, **options)  # the unused table has no state
    stopped = run(page, range(4))
    saved = copy.deepcopy(get_optimizer_state_dict(*stopped, options=chosen))
    model, optimizer = run(page, range(3, 8))
    model.load_state_dict(stopped[0].state_dict())
    set_optimizer_state_dict(model, optimizer, saved, options=chosen)
    for group in optimizer.param_groups:
        group["betas"] = tuple(group["betas"])  # of which full_state_dict makes a list
    assert_goes_on(page, model, optimizer)


@pytest.mark.parametrize("make_optimizer", [SparseAdam, torch.optim.SparseAdam], ids=["ours", "torch's"])
@pytest.mark.parametrize("way", [get_optimizer_state_dict, set_optimizer_state_dict], ids=["get", "set"])
def test_torch_makes_up_a_first_state_with_dense_gradients_in_vain(
    page: SimpleNamespace, make_optimizer: Any, way: Any
) -> None:
    """As the page says. It would be good news if this failed."""
    model = make(page.Recommender)
    optimizer = make_optimizer(list(model.parameters()))
    before = weights(model)
    arguments = () if way is get_optimizer_state_dict else (get_optimizer_state_dict(*run(page, range(4))),)
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        way(model, optimizer, *arguments)
    assert weights(model) == before
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_a_state_under_a_string_is_refused_as_one_under_a_number_is(page: SimpleNamespace) -> None:
    saved = copy.deepcopy(run(page, range(4))[1].state_dict())
    _, optimizer = run(page, range(3, 8))
    before = snapshot(optimizer)
    for wrong in 3, {"step": -1}, {"rows": torch.tensor([400])}:
        with pytest.raises(ValueError, match=r"state of group 0, parameter 1: .*The optimizer is unchanged"):
            optimizer.load_state_dict({**saved, "state": {**saved["state"], "1": wrong}})
        assert snapshot(optimizer) == before
