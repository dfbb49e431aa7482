"""Adam for embedding tables: a step touches only the rows that the batch touched."""

from importlib.metadata import version

from .optimizer import SparseAdam
from .update import Backend, backends

__all__ = ["Backend", "SparseAdam", "backends"]
__version__ = version("sparseadam")
