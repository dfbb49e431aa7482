"""The tasks by name, and where their data is."""

from pathlib import Path

from .data import read_interactions, read_triples
from .knowledge_graph import KnowledgeGraph
from .recommender import Recommender
from .task import Task

DIM = 64
EPOCHS = 10
RETAIL_BATCHES = {"retail-2048": 2048, "retail-256": 256}
GRAPHS = ("wn18rr", "codex-s")
GRAPH_BATCH, GRAPH_NEGATIVES = 512, 256
TASKS = (*RETAIL_BATCHES, *GRAPHS)
INTERACTIONS = Path("rec", "online_retail", "interactions.txt.gz")


def build_task(name: str, directory: Path, epochs: int) -> Task:
    """Read a task's data.

    Args:
        name: one of ``TASKS``.
        directory: holds ``rec/online_retail/interactions.txt.gz``, and a directory for each graph in ``kg``.
        epochs: times the training part is read.

    Raises:
        RecipeError: data is missing or not of its form.
    """
    if name in RETAIL_BATCHES:
        return Recommender(name, read_interactions(directory / INTERACTIONS), DIM, RETAIL_BATCHES[name], epochs)
    return KnowledgeGraph(name, read_triples(directory / "kg" / name), DIM, GRAPH_BATCH, epochs, GRAPH_NEGATIVES)
