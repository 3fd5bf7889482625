"""An `Embedding` turns token ids into vectors and, if the head is tied to it, hidden vectors into logits.

Legend: V vocabulary, D hidden.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.cpu import layers as cpu_layers
from model.cpu.linear import linear
from model.cpu.packed_matrix import PackedMatrix, pack_matrix
from model.stored_matrix import StoredMatrix


class Embedding(nn.Module):
    """An `Embedding` holds the weight (V, D) in the checkpoint's layout."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.packed_head: PackedMatrix | None = None  # set only if head and embeddings are tied
        self.packed_rows: tuple[NDArray[np.generic], bool] | None = None  # the embeddings, and True if they are bf16

    def pack(self, is_tied: bool) -> None:
        """Prepare the CPU kernels; if the head is tied to the embeddings, prepare the kernels for `logits`, too."""
        rows = self.weight.detach()
        is_bf16 = rows.dtype == torch.bfloat16
        self.packed_rows = (rows.view(torch.int16) if is_bf16 else rows.float()).contiguous().numpy(), is_bf16
        if is_tied:
            self.packed_head = pack_matrix(StoredMatrix.plain(rows))

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the vectors of the tokens: (T,) -> (T, D)."""
        if self.packed_rows is not None:
            return torch.from_numpy(cpu_layers.embed(token_ids.numpy(), *self.packed_rows))
        return F.embedding(token_ids, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of a head that is tied to the embeddings: (..., D) -> fp32 (..., V)."""
        if self.packed_head is not None:
            return linear(hidden, self.packed_head)
        return F.linear(hidden, self.weight).float()
