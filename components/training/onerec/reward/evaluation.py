"""What a policy offers: P-Scores of its lists, ranking, and how often it is legal by itself.

Shapes: U users, B users of a batch, K length of a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Lists:
    """What a policy puts before some users, and what preference models say of it.

    Attributes:
        item_UK: int64, best first; -1 where there is none.
        target_U: int64, the item that each request led to.
        score_UK: P-Scores by preference model, float32; NaN where there is no item.
        legality_U: float64, share of legal ids among unconstrained samples.
    """

    item_UK: Int64
    target_U: Int64
    score_UK: Mapping[str, npt.NDArray[np.float32]]
    legality_U: Float

    def selected(self, by: str) -> Lists:
        """The same items in the order of a preference model's score, highest first.

        The report's optional last step of serving (section 2.6): the policy generates many items,
        the reward model chooses among them. Of equal scores the policy's order stands.
        """
        # NaN sorts behind everything.
        order_UK = np.argsort(-self.score_UK[by], axis=1, kind="stable")

        def ordered(values_UK: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.take_along_axis(values_UK, order_UK, 1)

        scores = {name: ordered(score_UK) for name, score_UK in self.score_UK.items()}
        return Lists(ordered(self.item_UK), self.target_U, scores, self.legality_U)

    def offered(self, widths: tuple[int, ...]) -> Offered:
        """Figures of the lists' first K items, for some K."""
        scores = {(n, k): s_UK[:, :k] for n, s_UK in self.score_UK.items() for k in widths}
        ranked_UK = self.item_UK[:, :RANKED]
        hit_UK = ranked_UK == self.target_U[:, None]
        return Offered(
            {key: np.nanmax(s_UK, 1).astype(np.float64) for key, s_UK in scores.items()},
            {key: np.nanmean(s_UK, 1).astype(np.float64) for key, s_UK in scores.items()},
            (hit_UK / np.log2(2.0 + np.arange(hit_UK.shape[1]))).sum(1),
            self.legality_U,
            int((np.unique(ranked_UK) >= 0).sum()),
        )


def offer(
    recommender: Recommender,
    pscores: Mapping[str, PScore],
    sequences: Sequences,
    event_U: Int64,
    user_UF: Int64,
    *,
    width: int,
    samples: int,
    seed: int,
) -> Lists:
    """What a policy offers to some requests.

    Args:
        event_U: events to be predicted.
        user_UF: features of the users of ``sequences``.
        width: length of the lists, and beams of the search that makes them.
        samples: unconstrained samples a user.
    """
    model, trie, codes_NQ = recommender.model, recommender.trie, recommender.codes_NQ
    device = trie.items.device
    lists = recommender.rank(sequences, event_U, beams=width, top_n=width, batch_size=BATCH)
    item_UK = np.concatenate([items for items, _ in lists]).astype(np.int64)
    scores: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in pscores}
    legality = []
    generator = torch.Generator().manual_seed(seed)
    attached = recommender.features.attach(sequences, event_U, model.config)
    for start in range(0, len(event_U), BATCH):
        event_B = event_U[start : start + BATCH]
        item_BK = torch.from_numpy(item_UK[start : start + BATCH])
        for name, pscore in pscores.items():
            requests = requests_at(sequences, event_B, user_UF, codes_NQ, pscore.size.history)
            at = pscore.no_event.device
            score_BK = preference_reward(pscore, requests.to(at), item_BK.to(at))
            scores[name].append(score_BK.cpu().numpy())
        batch = assemble(attached, event_B, codes_NQ, model.config).to(device)
        _, leaf_BG, _ = sample(model, trie, batch, samples, "sample", generator)
        legality.append((leaf_BG >= 0).double().mean(1).cpu().numpy())
    return Lists(
        item_UK,
        sequences.item_E[event_U].astype(np.int64),
        {name: np.concatenate(parts) for name, parts in scores.items()},
        np.concatenate(legality),
    )
