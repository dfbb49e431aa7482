"""Matrix factorisation: a vector for each customer and each item, told apart from others by a sampled softmax."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseadam.distributed import ShardedEmbedding

from .purchases import Batch, Purchases

# Scores begin small, so that no item is far ahead before anything is learned.
INITIAL_SCALE = 0.1


class Factors(nn.Module):
    r"""Two sharded tables; customer :math:`c` buys item :math:`i` the more likely the larger :math:`u_c \cdot v_i` is.

    The loss of a pair is that of a softmax over its item and the batch's negatives. These are drawn as often as they
    are bought, and scores are lowered by the logarithm of that frequency, so that the softmax is one over all items.
    """

    def __init__(self, purchases: Purchases, dim: int) -> None:
        """Draw the tables, which are the same for any number of processes."""
        super().__init__()
        self.customers = ShardedEmbedding(purchases.num_customers, dim)
        self.items = ShardedEmbedding(purchases.num_items, dim)
        counts = torch.bincount(purchases.items, minlength=purchases.num_items)
        self.register_buffer("log_frequency", (counts.clamp(min=1) / len(purchases.items)).log(), persistent=False)
        with torch.no_grad():
            for table in (self.customers, self.items):
                table.weight.mul_(INITIAL_SCALE)

    def forward(self, batch: Batch) -> Tensor:
        """Sum the loss over the pairs of a batch, of which there may be none.

        It is summed, so that the sum over processes is that of the whole batch.
        """
        num_pairs = len(batch.items)
        # One look-up for both: an item among the negatives too travels once.
        looked_up = self.items(torch.cat([batch.items, batch.negatives]))
        bought, negatives = looked_up[:num_pairs], looked_up[num_pairs:]
        customers = self.customers(batch.customers)
        own = (customers * bought).sum(1) - self.log_frequency[batch.items]
        others = customers @ negatives.T - self.log_frequency[batch.negatives]
        others = others.masked_fill(batch.items[:, None] == batch.negatives, -torch.inf)  # no item against itself
        return F.cross_entropy(torch.cat([own[:, None], others], dim=1), torch.zeros_like(batch.items), reduction="sum")
