"""A small causal text decoder that writes an item's title from its compressed tokens.

Its loss, L_cap of arXiv 2506.13695 section 2.1, keeps the compressed tokens from drifting away from
what the item is; the report takes LLaMA3 for it. Words are hashed into a fixed vocabulary, so that
nothing of it has to be kept and new words have a place.

Shapes: N items, B batch, T words of a title, W words of the vocabulary, q compressed tokens, d
their width, c width of the decoder.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from components.training.onerec.config import CaptionConfig


#: A word, or one character of a script that has no spaces.
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
#: Ids below this are no words.
END, PADDING = 0, 1
SPECIAL = 2


def caption_ids(titles: Sequence[str], config: CaptionConfig) -> Tensor:
    """Word ids of titles, each closed by `END`: int64 [N, T], `PADDING` behind.

    An item without a title is all padding: there is nothing to write.
    """
    id_NT = np.full((len(titles), config.length + 1), PADDING, np.int64)
    for row_T, title in zip(id_NT, titles, strict=True):
        words = WORD.findall(title.lower())[: config.length]
        if words:
            hashed = [SPECIAL + zlib.crc32(word.encode()) % config.words for word in words]
            row_T[: len(words) + 1] = [*hashed, END]
    return torch.from_numpy(id_NT)


class CaptionDecoder(nn.Module):
    """``P(t^{k+1} | t^{1..k}, M~)``: causal self-attention over ``[M~, t]``."""

    def __init__(self, queries: int, width: int, config: CaptionConfig) -> None:
        super().__init__()
        self.config, self.queries = config, queries
        self.read = nn.Linear(width, config.width)
        self.word = nn.Embedding(SPECIAL + config.words, config.width)
        self.place = nn.Parameter(torch.empty(queries + config.length, config.width))
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        for weight in (self.word.weight, self.place):
            nn.init.normal_(weight, std=0.02)

    def forward(self, compressed_Bqd: Tensor, word_BT: Tensor) -> Tensor:
        """L_cap: mean negative log-likelihood of a word, in nats; 0 where there is no word.

        Args:
            word_BT: int64 of `caption_ids`.
        """
        # The compressed tokens stand for the beginning; the last of them writes the first word.
        x_BSc = torch.cat([self.read(compressed_Bqd), self.word(word_BT[:, :-1])], 1) + self.place
        for layer in self.layers:
            x_BSc = layer(x_BSc)
        real_BT = word_BT != PADDING
        x_nc = self.norm(x_BSc[:, self.queries - 1 :])[real_BT]
        logits_nW = x_nc @ self.word.weight.T
        return F.cross_entropy(logits_nW, word_BT[real_BT], reduction="sum") / real_BT.sum().clamp(
            1
        )


class _Layer(nn.Module):
    def __init__(self, config: CaptionConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn = nn.Sequential(
            nn.Linear(width, 2 * width, bias=False),
            nn.GELU(),
            nn.Linear(2 * width, width, bias=False),
        )

    def forward(self, x_BSc: Tensor) -> Tensor:
        parts = self.query_key_value(self.attention_norm(x_BSc)).unflatten(-1, (3, self.heads, -1))
        q_BHSc, k_BHSc, v_BHSc = (part.transpose(1, 2) for part in parts.unbind(2))
        mixed_BHSc = F.scaled_dot_product_attention(q_BHSc, k_BHSc, v_BHSc, is_causal=True)
        x_BSc = x_BSc + self.out(mixed_BHSc.transpose(1, 2).flatten(2))
        return x_BSc + self.ffn(self.ffn_norm(x_BSc))
