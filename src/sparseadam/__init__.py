"""Adam for embedding tables: a step touches only the rows that the batch touched."""

from importlib.metadata import version

from .clip import clip_grad_norm_, clip_grad_value_, coalesce_grads_
from .mapped_table import initialize_on_read, initialize_rows, memory_mapped
from .optimizer import SparseAdam
from .update import Backend, backends

__all__ = [
    "Backend",
    "SparseAdam",
    "backends",
    "clip_grad_norm_",
    "clip_grad_value_",
    "coalesce_grads_",
    "initialize_on_read",
    "initialize_rows",
    "memory_mapped",
]
__version__ = version("sparseadam")
