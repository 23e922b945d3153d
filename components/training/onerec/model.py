"""OneRec's encoder-decoder over semantic ids (arXiv 2506.13695, sections 2.2 and 2.3).

Architecture and point-wise next-token loss only; it knows nothing of tables, tries or optimisers.
What the report leaves open and is chosen here: RMSNorm before every sublayer and at the end
(printed only before the feed-forward), the sum of an item's level embeddings as its input, a GELU
feed-forward with two matrices (the report's parameter counts fit two, not three), and output heads
that share their weights with the token embedding. What the decoder may copy besides comes from the
successor memory, an addition of ours.

Shapes: B batch, n ids of a request, G = B · n, L events of a pathway, S encoder positions, T
decoder positions, W beams, D width,
H heads, d width of a head, K codebook size, Q quantiser levels, F width of an event feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.training.onerec.attention import Attention, KeysValues
from components.training.onerec.data import Batch
from components.training.onerec.decoder import DecoderLayer
from components.training.onerec.encoder import EncoderLayer, Pathway, build_pathways
from components.training.onerec.lazy_decoder import LazyContext, LazyDecoderLayer
from components.training.onerec.memory import Recall, SuccessorMemory, nothing_recalled
from components.training.onerec.tokens import TokenEmbedding

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig

#: Standard deviation of weights at the report's width.
INIT_STD, INIT_WIDTH = 0.02, 1024


class OneRec(nn.Module):
    """Writes the semantic id of the next item, coarse to fine, from what a user did."""

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = TokenEmbedding(config)
        self.pathways = build_pathways(config, self.tokens)
        positions = sum(cast(Pathway, p).num_positions for p in self.pathways.values())
        self.position = nn.Parameter(torch.empty(positions, config.d_model))
        lazy = config.architecture == "lazy_decoder"
        encoder_layers = 0 if lazy else config.encoder_layers
        self.encoder = nn.ModuleList(EncoderLayer(config, i) for i in range(encoder_layers))
        self.encoder_norm = nn.RMSNorm(config.d_model)
        self.lazy_context = LazyContext(config) if lazy else None
        layer = LazyDecoderLayer if lazy else DecoderLayer
        self.decoder = nn.ModuleList(layer(config, i) for i in range(config.decoder_layers))
        self.decoder_norm = nn.RMSNorm(config.d_model)
        self.memory = SuccessorMemory(config) if config.memory.successors else None
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02) at width 1024 and wider in narrower layers, so that signals keep their size.

        Projections into the residual stream are smaller by √(2 · layers). The memory starts
        without preferences. Authors, tags and features of users start at nothing, and items' own
        embeddings beside their semantic ids: what no sample had keeps saying nothing.
        """
        layers = len(self.encoder) + len(self.decoder)
        from_nothing = [".author.weight", ".tag.weight", ".static.feature.weight"]
        if self.config.item_input == "both":
            from_nothing.append(".vid.weight")
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", *from_nothing)) or name.startswith("memory."):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(
                    parameter, std=INIT_STD * math.sqrt(INIT_WIDTH / parameter.shape[-1])
                )
            if getattr(parameter, "is_residual", False):
                parameter.data /= math.sqrt(2 * layers)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Encoder output float [B, S, D] and its mask bool [B, 1, 1, S]."""
        states, masks, offset = [], [], 0
        for module in self.pathways.values():
            pathway = cast(Pathway, module)
            h_BLD, mask_BL = pathway(batch)
            states.append(h_BLD + self.position[offset : offset + h_BLD.shape[1]])
            masks.append(mask_BL)
            offset += pathway.num_positions
        mask_BS = torch.cat(masks, 1)
        # Without any event there is nothing to attend to: let such a request see one padding.
        mask_BS[:, 0] |= ~mask_BS.any(1)
        mask_B11S = mask_BS[:, None, None]
        z_BSD = self.dropout(torch.cat(states, 1))
        for layer in self.encoder:
            # Kernels that need no mask are faster than those that take one.
            z_BSD = layer(z_BSD, mask_B11S if batch.is_padded else None)
        return self.encoder_norm(z_BSD), mask_B11S

    def contexts(self, z_BSD: Tensor) -> list[KeysValues]:
        """Keys and values of the encoder output for every decoder layer, once a request."""
        if self.lazy_context is not None:
            shared: list[KeysValues] = self.lazy_context(z_BSD)
            return shared
        layers = (cast(DecoderLayer, layer) for layer in self.decoder)
        return [cast(Attention, x.cross_attention).keys_values(z_BSD) for x in layers]

    def recall(self, batch: Batch) -> Recall:
        """What the decoder may copy, once a request."""
        if self.memory is None:
            return nothing_recalled(len(batch.fold_B), self.config.num_levels, self.position.device)
        return cast(Recall, self.memory(batch))

    def start_rows(self, batch_size: int) -> Tensor:
        """The BOS token of every request: int64 [B, 1]."""
        return torch.full((batch_size, 1), self.tokens.bos, device=self.position.device)

    def step(
        self,
        row_BW: Tensor,
        past: Sequence[list[KeysValues]],
        contexts: Sequence[KeysValues],
        mask_B11S: Tensor,
    ) -> Tensor:
        """States float [B, W, D] after one more token of every beam; ``past`` grows in place."""
        x_BWD = self.tokens(row_BW)
        for module, own, context in zip(self.decoder, past, contexts, strict=True):
            x_BWD = cast(DecoderLayer, module).step(x_BWD, own, context, mask_B11S)
        return self.decoder_norm(x_BWD)

    def logits(self, x_BTD: Tensor, level: int, recall: Recall) -> Tensor:
        """Scores of the K codes of one level, generated and copied: float32 [B, T, K]."""
        return recall.blend((x_BTD @ self.tokens.level_weight(level).T).float(), level)

    def level_logits(
        self, z_BSD: Tensor, mask_B11S: Tensor, sid_GQ: Tensor, recall: Recall
    ) -> list[Tensor]:
        """Teacher-forced scores [G, K] of every level: input [BOS, s¹ … s^(Q-1)].

        Args:
            sid_GQ: ids of the requests, as many of each, G = B · n, one request's after the
                other's: its context is computed once and read by all of them.
        """
        rows = self.tokens.rows(sid_GQ[:, :-1])
        x_GTD = self.dropout(self.tokens(torch.cat([self.start_rows(len(sid_GQ)), rows], 1)))
        for layer, context in zip(self.decoder, self.contexts(z_BSD), strict=True):
            x_GTD = layer(x_GTD, context, mask_B11S)
        # From here on the ids of a request are what its beams are in a search.
        x_BnTD = self.decoder_norm(x_GTD).unflatten(0, (len(z_BSD), -1))
        sid_BnQ = sid_GQ.unflatten(0, (len(z_BSD), -1))
        logits = []
        for level in range(self.config.num_levels):
            logits.append(self.logits(x_BnTD[:, :, level], level, recall).flatten(0, 1))
            recall = recall.follow(None, sid_BnQ[..., level], level)
        return logits

    def sid_log_probs(self, batch: Batch, sid_GQ: Tensor) -> Tensor:
        """``log P(s^l | s^<l, user)`` of every level: float [G, Q]; ids as in `level_logits`."""
        logits = self.level_logits(*self.encode(batch), sid_GQ, self.recall(batch))
        picked = [-F.cross_entropy(x_GK, s, reduction="none") for x_GK, s in zip(logits, sid_GQ.T)]
        return torch.stack(picked, 1)

    def forward(self, batch: Batch) -> Tensor:
        """Next-token loss of every level, mean over the batch: float [Q]; L_NTP is their sum."""
        return -self.sid_log_probs(batch, batch.target_BQ).float().mean(0)
