"""Which weights of an alignment are kept, and whom figures of them are measured on.

The best of many checkpoints is also the luckiest one: on the users who chose it its figures are too
good. So users of the validation are parted, some to choose and the others to report.

Shapes: U validation examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from components.training.onerec.reward.align import Progress
    from components.training.onerec.reward.evaluation import Offered

Int64 = npt.NDArray[np.int64]
#: The model and the length of lists whose mean P-Score decides.
CHOSEN_BY = ("reward", 8)


def part_users(held_out_U: npt.NDArray[np.bool_], most: int) -> tuple[Int64, Int64]:
    """Validation examples that choose, and those that figures are reported of: int64, ascending.

    Users from whom no preference was learned report, the others choose. Where there are no two such
    groups every other user reports; a single user does both.

    Args:
        held_out_U: whether neither preference model learned from the user.
        most: users of each group at most, spread evenly.
    """
    choose_U, report_U = np.flatnonzero(~held_out_U), np.flatnonzero(held_out_U)
    if not len(choose_U) or not len(report_U):
        every_U = np.arange(len(held_out_U))
        choose_U, report_U = every_U[::2], every_U[1::2] if len(every_U) > 1 else every_U
    return spread(choose_U, most), spread(report_U, most)


def spread(user_U: Int64, most: int) -> Int64:
    """So many of them at most, evenly apart."""
    return user_U[np.linspace(0, len(user_U) - 1, min(len(user_U), most)).astype(int)]


def ndcg_floor(before: Offered, max_ndcg_loss: float) -> float:
    """The least NDCG@10 of weights that may be kept."""
    return float((1 - max_ndcg_loss) * before.ndcg_U.mean())


def keep_if_better(
    progress: Progress, now: Offered, before: Offered, max_ndcg_loss: float = 0.0
) -> bool:
    """Keeps the newest weights if they are the best so far; tells whether they are.

    They are if their lists have a higher mean reward than those of the weights kept so far, and
    than before the alignment, and their NDCG@10 is not below the floor.

    Args:
        progress: with the newest weights; ``best_*`` are set.
        now, before: what the newest weights and those of step 0 offer the choosing users.
        max_ndcg_loss: share of the NDCG@10 before that may be lost.
    """
    assert progress.trainer is not None
    reward, reward_before = (float(of.mean[CHOSEN_BY].mean()) for of in (now, before))
    best = progress.best_score if progress.best_step else reward_before
    if now.ndcg_U.mean() < ndcg_floor(before, max_ndcg_loss) or reward <= best:
        return False
    progress.best_step, progress.best_score = progress.step, reward
    progress.best_weights = progress.trainer.weights
    return True
