"""What a policy offers: P-Scores of its lists, ranking, and how often it is legal by itself.

Shapes: U users, B users of a batch, K length of a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from components.training.onerec.data import Sequences, assemble
from components.training.onerec.recommender import Recommender
from components.training.onerec.reward.features import requests_at
from components.training.onerec.reward.pscore import PScore
from components.training.onerec.reward.rewards import preference_reward
from components.training.onerec.reward.rollout import sample

Int64 = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]
BATCH = 128
RANKED = 10


@dataclass(frozen=True)
class Offered:
    """Per-user figures of one policy; those of two policies on the same users are paired.

    Attributes:
        best, mean: by (preference model, K), float64 [U]: highest and mean P-Score of the first K
            items of beam search.
        ndcg_U: NDCG@10 of the target.
        legality_U: share of legal ids among unconstrained samples.
        distinct: different items among all first 10.
    """

    best: Mapping[tuple[str, int], Float]
    mean: Mapping[tuple[str, int], Float]
    ndcg_U: Float
    legality_U: Float
    distinct: int


def offer(
    recommender: Recommender,
    pscores: Mapping[str, PScore],
    sequences: Sequences,
    event_U: Int64,
    user_UF: Int64,
    *,
    widths: tuple[int, ...],
    samples: int,
    seed: int,
) -> Offered:
    """Figures of a policy on some requests.

    Args:
        event_U: events to be predicted.
        user_UF: features of the users of ``sequences``.
        widths: lengths K of lists, by beam search of the largest.
        samples: unconstrained samples a user.
    """
    model, trie, codes_NQ = recommender.model, recommender.trie, recommender.codes_NQ
    device = trie.items.device
    lists = recommender.rank(
        sequences, event_U, beams=max(widths), top_n=max(widths), batch_size=BATCH
    )
    item_UK = np.concatenate([items for items, _ in lists]).astype(np.int64)
    best: dict[tuple[str, int], list[Float]] = {(n, k): [] for n in pscores for k in widths}
    mean: dict[tuple[str, int], list[Float]] = {(n, k): [] for n in pscores for k in widths}
    legality = []
    generator = torch.Generator().manual_seed(seed)
    attached = recommender.features.attach(sequences, event_U, model.config)
    for start in range(0, len(event_U), BATCH):
        event_B = event_U[start : start + BATCH]
        item_BK = torch.from_numpy(item_UK[start : start + BATCH])
        for name, pscore in pscores.items():
            requests = requests_at(sequences, event_B, user_UF, codes_NQ, pscore.size.history)
            at = pscore.no_event.device
            reward_BK = preference_reward(pscore, requests.to(at), item_BK.to(at)).cpu().numpy()
            for k in widths:
                best[name, k].append(np.nanmax(reward_BK[:, :k], 1).astype(np.float64))
                mean[name, k].append(np.nanmean(reward_BK[:, :k], 1).astype(np.float64))
        batch = assemble(attached, event_B, codes_NQ, model.config).to(device)
        _, leaf_BG, _ = sample(model, trie, batch, samples, "sample", generator)
        legality.append((leaf_BG >= 0).double().mean(1).cpu().numpy())
    hit_UK = item_UK[:, :RANKED] == sequences.item_E[event_U][:, None]
    ndcg_U = (hit_UK / np.log2(2.0 + np.arange(hit_UK.shape[1]))).sum(1)
    top = np.unique(item_UK[:, :RANKED])
    return Offered(
        {key: np.concatenate(parts) for key, parts in best.items()},
        {key: np.concatenate(parts) for key, parts in mean.items()},
        ndcg_U,
        np.concatenate(legality),
        int((top >= 0).sum()),
    )
