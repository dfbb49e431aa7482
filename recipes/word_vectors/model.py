"""The two tables of skip-gram and its loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .corpus import Batch


class SkipGram(nn.Module):
    r"""Skip-gram with negative sampling over two tables of vectors, one per role of a word.

    The loss of a pair with center vector :math:`u`, context vector :math:`v` and negatives
    :math:`n_1 \dots n_k` is :math:`-\log\sigma(u \cdot v) - \sum_j \log\sigma(-u \cdot n_j)`. A
    negative that happens to be the pair's own context is not taken out, which is rare enough not
    to matter.
    """

    def __init__(self, num_rows: int, dim: int) -> None:
        """Fill the tables as word2vec does: centers with small noise, contexts with zeros.

        Args:
            num_rows: words in the vocabulary.
            dim: length of a vector.
        """
        super().__init__()
        self.centers = nn.Embedding(num_rows, dim, sparse=True)
        self.contexts = nn.Embedding(num_rows, dim, sparse=True)
        nn.init.uniform_(self.centers.weight, -0.5 / dim, 0.5 / dim)
        nn.init.zeros_(self.contexts.weight)

    def forward(self, batch: Batch) -> Tensor:
        """Sum the loss over the pairs of the batch.

        It is summed, not averaged, so that the gradient of a rare word does not shrink with the
        size of the batch towards the optimizer's ``eps``.
        """
        contexts, negatives = torch.from_numpy(batch.contexts), torch.from_numpy(batch.negatives)
        num_pairs, (num_groups, _) = len(contexts), negatives.shape
        # One look-up for both, because autograd would otherwise have to join two gradients.
        looked_up = self.contexts(torch.cat([contexts, negatives.flatten()]))
        context = looked_up[:num_pairs].unflatten(0, (num_groups, -1))
        negative = looked_up[num_pairs:].unflatten(0, (num_groups, -1))
        center = self.centers(torch.from_numpy(batch.centers)).unflatten(0, (num_groups, -1))

        attraction = F.logsigmoid((center * context).sum(dim=-1))
        repulsion = F.logsigmoid(-(center @ negative.mT))
        return -(attraction.sum() + repulsion.sum())
