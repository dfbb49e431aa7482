"""Tables of several processes: sharded by rows, or one copy in each, over ``torch.distributed``.

A shard is an ordinary parameter with a sparse gradient, so any optimizer steps it, and nothing here knows what Adam is.
``docs/sharding.md`` says what travels when, and what it costs.
"""

from .checkpoint import load_checkpoint, save_checkpoint
from .exchange import Traffic
from .replicated import gather_rows_hook, replicate
from .sharded import ShardedEmbedding, ShardedEmbeddingBag

__all__ = [
    "ShardedEmbedding",
    "ShardedEmbeddingBag",
    "Traffic",
    "gather_rows_hook",
    "load_checkpoint",
    "replicate",
    "save_checkpoint",
]
