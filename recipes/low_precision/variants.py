"""What is compared: dtypes of tables and moments, everything else equal."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparseadam import SparseAdam

from ..word_vectors.model import SkipGram


@dataclass(frozen=True)
class Variant:
    """One way to store tables and moments.

    Attributes:
        name: what the report calls it.
        table_dtype: dtype of the tables.
        options: what the optimizer is given beside the learning rate.
    """

    name: str
    table_dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stores_codes_of_v(self) -> bool:
        """Whether there is a second moment for each element, in fewer bits than it is computed in."""
        return "moment_dtype" in self.options and "second_moment" not in self.options

    def build_optimizer(self, tables: Iterable[nn.Parameter], lr: float, seed: int) -> SparseAdam:
        """Build the optimizer; ``seed`` fixes its stochastic rounding."""
        return SparseAdam(list(tables), lr=lr, generator=torch.Generator().manual_seed(seed), **self.options)

    def store_tables(self, model: SkipGram) -> None:
        """Round the model's tables to ``table_dtype``; the loss is computed in float32 all the same."""
        if self.table_dtype is torch.float32:
            return
        model.to(self.table_dtype)
        for embedding in (model.centers, model.contexts):
            embedding.register_forward_hook(_widen)


def _widen(_embedding: nn.Module, _inputs: tuple[Tensor, ...], looked_up: Tensor) -> Tensor:
    return looked_up.float()


BASELINE = Variant("float32")
MOMENTS = (
    BASELINE,
    Variant("bfloat16 moments", options={"moment_dtype": torch.bfloat16}),
    Variant("8-bit moments", options={"moment_dtype": torch.uint8}),
    Variant("one v a row", options={"second_moment": "row"}),
    Variant("one v a row, 8-bit m", options={"second_moment": "row", "moment_dtype": torch.uint8}),
)
BFLOAT16_TABLES = (
    Variant("bfloat16 table, nearest", torch.bfloat16),
    Variant("bfloat16 table, stochastic", torch.bfloat16, {"stochastic_rounding": True}),
)
FLOAT16_TABLES = (
    Variant("float16 table, nearest", torch.float16),
    Variant("float16 table, stochastic", torch.float16, {"stochastic_rounding": True}),
)
TRAINED = (*MOMENTS, *BFLOAT16_TABLES)
CONTINUED = (BASELINE, *BFLOAT16_TABLES, *FLOAT16_TABLES)
TIMED = (*TRAINED, *FLOAT16_TABLES)
