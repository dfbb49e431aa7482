"""Adam for embedding tables: a step touches only the rows that the batch touched."""

from .optimizer import SparseAdam
from .update import Backend, backends

__all__ = ["Backend", "SparseAdam", "backends"]
__version__ = "0.1.0"
