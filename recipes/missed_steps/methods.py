"""What is compared: dense Adam, and ways in which SparseAdam treats the rows that a batch leaves out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparseadam import SparseAdam


@dataclass(frozen=True)
class Method:
    """An optimizer of all tables of a model.

    Attributes:
        name: what the report calls it.
        sparse: whether gradients of tables are sparse, and SparseAdam takes them.
        options: what the optimizer is given beside the learning rate.
    """

    name: str
    sparse: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def build_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """Build the optimizer; where missed steps are replayed, the model's lookups bring rows up to date."""
        if not self.sparse:
            return torch.optim.Adam(model.parameters(), lr=lr, **self.options)
        optimizer = SparseAdam(model.parameters(), lr=lr, **self.options)
        if self.options.get("missed_steps") == "replay":
            optimizer.attach(model)
        return optimizer


DENSE = Method("dense Adam", sparse=False, options={"fused": True})
# The same formulas in another order of operations: how far rounding alone leads away from dense Adam.
FOREACH = Method("dense Adam, foreach", sparse=False, options={"foreach": True})
REPLAY = Method("replay", options={"missed_steps": "replay"})
SKIP = Method("skip")
ROW = Method("skip, bias by row", options={"bias_correction": "row"})
METHODS = (DENSE, FOREACH, REPLAY, SKIP, ROW)
