"""Trains preference models on exposures and chooses the weights w^xtr on later ones.

All exposures are learned from, not only liked ones; a label the source did not record has no part
in any loss. Two models learn from disjoint users: one is the reward, the other judges what the
reward made of the recommender. Validation is the newest part of the fully labelled exposures; it
chooses w^xtr and is what AUCs are reported on.

Shapes: S exposures, O objectives, U users.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from components.pipeline.errors import DataContractError, StageError
from components.training.onerec.data import Sequences
from components.training.onerec.reward.auc import Auc, auc, auc_interval, gauc_interval
from components.training.onerec.reward.config import PScoreConfig
from components.training.onerec.reward.features import ItemFeatures, Labels, Requests, requests_at
from components.training.onerec.reward.pscore import PScore, fused_loss

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

SCORE_BATCH = 2048
#: The search of w^xtr trains the fusion alone, on the towers' states under equal weights.
FUSION_EXPOSURES, FUSION_STEPS, FUSION_BATCH, FUSION_RATE = 40_000, 300, 1024, 3e-3
#: Fixed sums that the fusion is compared with.
SUMS = 200
#: Candidates of w^xtr are ``rate^-a · e^u``: a from 0 to 1, |u| up to log RANGE.
RANGE = 4.0


@dataclass(frozen=True)
class Exposures:
    """Everything that preference models read.

    Attributes:
        sequences: train sequences; every event is an exposure.
        labels: of every event.
        user_UF: features of the users of ``sequences``.
        codes_NQ: semantic ids, as `Sequences` batches carry them; the model does not read them.
    """

    sequences: Sequences
    labels: Labels
    user_UF: Int64
    codes_NQ: npt.NDArray[np.integer]
    items: ItemFeatures

    def requests(self, event_S: Int64, history: int) -> Requests:
        return requests_at(self.sequences, event_S, self.user_UF, self.codes_NQ, history)

    def users(self, event_S: Int64) -> Int64:
        return np.searchsorted(self.sequences.start_U1, event_S, side="right") - 1


@dataclass(frozen=True)
class Cut:
    """Exposures by their use: int64 events, ascending in time; validation comes after training."""

    train_S: Int64
    valid_S: Int64


def cut_by_time(exposures: Exposures, valid_share: float, max_exposures: int) -> Cut:
    """The newest of the fully labelled exposures validate; the newest before them train.

    Raises:
        DataContractError: no label is known, or all exposures have the same time.
    """
    known_EO = exposures.labels.known_EO
    if not known_EO.any():
        raise DataContractError(
            "there is no feedback to learn a preference from",
            where="artifact 'interactions'",
            remedy="bring a source with signals of feedback (click, like, watch time, …)",
        )
    time_E = exposures.sequences.time_ms_E
    count_E = known_EO.sum(1)
    full_S = np.flatnonzero(count_E == count_E.max())
    border = np.quantile(time_E[full_S], 1 - valid_share)
    valid_S = full_S[time_E[full_S] > border]
    train_S = np.flatnonzero((count_E > 0) & (time_E <= border))
    if not len(valid_S) or not len(train_S):
        raise DataContractError(
            f"{len(train_S)} exposures would train and {len(valid_S)} validate: their times do "
            "not tell them apart",
            where="artifact 'interactions'",
            remedy="bring exposures with times",
        )
    train_S = train_S[np.argsort(time_E[train_S], kind="stable")][-max_exposures:]
    return Cut(train_S, valid_S[np.argsort(time_E[valid_S], kind="stable")])


def usable(labels: Labels, event_S: Int64, min_labels: int) -> list[int]:
    """Objectives with at least so many positive and so many negative known labels."""
    known_SO, value_SO = labels.known_EO[event_S], labels.value_EO[event_S]
    positive_O, negative_O = (known_SO & value_SO).sum(0), (known_SO & ~value_SO).sum(0)
    return np.flatnonzero(np.minimum(positive_O, negative_O) >= min_labels).tolist()


@dataclass(frozen=True)
class Trained:
    """A preference model and how it was chosen.

    Attributes:
        weight_O: w^xtr.
        tried: mean AUC of p of every candidate, equal weights first.
    """

    model: PScore
    weight_O: npt.NDArray[np.float64]
    tried: list[float]


def train_pscore(
    exposures: Exposures,
    cut: Cut,
    objectives: list[int],
    config: PScoreConfig,
    seed: int,
    *,
    weight_O: npt.NDArray[np.float64] | None = None,
    device: str = "cpu",
    advance: Callable[[float], None] = lambda share: None,
) -> Trained:
    """Choose w^xtr, unless given, and train.

    The weights are searched at random around equal ones: a model trained with equal weights gives
    the towers' states, on which the fusion alone is trained again for every candidate. Of the
    candidates under which the AUC of p falls for no objective below the 95 % interval that it has
    under equal weights, the one with the highest mean AUC on validation wins; then everything is
    trained with it.

    Raises:
        StageError: the loss is no longer a number.
    """
    labels = _chosen(exposures.labels, objectives)
    given = np.ones(len(objectives)) if weight_O is None else weight_O
    searches = weight_O is None and config.candidates > 1 and len(objectives) > 1
    passes = 2 if searches else 1
    fit = lambda w, begun: _fit(  # noqa: E731
        exposures, labels, cut.train_S, w, config, seed, device,
        lambda share: advance((begun + share) / passes),
    )  # fmt: skip
    model = fit(given, 0)
    if not searches:
        return Trained(model, given, [])
    weight_O, tried = _search(model, exposures, labels, cut, config, seed)
    if np.array_equal(weight_O, given):
        return Trained(model, weight_O, tried)
    return Trained(fit(weight_O, 1), weight_O, tried)


def _chosen(labels: Labels, objectives: list[int]) -> Labels:
    names = tuple(labels.names[o] for o in objectives)
    return Labels(names, labels.value_EO[:, objectives], labels.known_EO[:, objectives])


def _fit(
    exposures: Exposures,
    labels: Labels,
    train_S: Int64,
    weight_O: npt.NDArray[np.float64],
    config: PScoreConfig,
    seed: int,
    device: str,
    advance: Callable[[float], None],
) -> PScore:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PScore(config.model, labels.names, exposures.items).to(device).train()
        _start_at_the_rates(model, labels, train_S)
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        weights = torch.from_numpy(weight_O / weight_O.mean()).float().to(device)
        rng = np.random.default_rng(seed)
        batches = math.ceil(len(train_S) / config.batch_size)
        total = config.epochs * batches
        for step in range(total):
            if step % batches == 0:
                order_S = train_S[rng.permutation(len(train_S))]
            event_B = order_S[step % batches * config.batch_size :][: config.batch_size]
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
            requests = exposures.requests(event_B, config.model.history).to(device)
            item_B1 = torch.from_numpy(exposures.sequences.item_E[event_B].astype(np.int64))[:, None]
            tower_BGO, p_BG = model(requests, item_B1.to(device))
            loss = fused_loss(
                p_BG[:, 0],
                tower_BGO[:, 0],
                torch.from_numpy(labels.value_EO[event_B]).to(device),
                torch.from_numpy(labels.known_EO[event_B]).to(device),
                weights,
                config.tower_weight,
            )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if step % 20 == 0 or step + 1 == total:
                _require_finite(float(loss.detach()), step)
            advance((step + 1) / total)
    return model.eval()


def _start_at_the_rates(model: PScore, labels: Labels, train_S: Int64) -> None:
    """Towers begin at their objective's rate: rare ones need not first unlearn one half."""
    rate_O = _rates(labels, train_S)
    with torch.no_grad():
        model.tower_bias.copy_(torch.from_numpy(np.log(rate_O / (1 - rate_O))))


def _rates(labels: Labels, event_S: Int64) -> npt.NDArray[np.float64]:
    """Share of positive among the known labels, never quite 0 or 1."""
    known_SO, value_SO = labels.known_EO[event_S], labels.value_EO[event_S]
    rate_O: npt.NDArray[np.float64] = (value_SO.sum(0) + 1) / (known_SO.sum(0) + 2)
    return rate_O


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise StageError(
            f"the loss of the preference model is {loss} at step {step}",
            where="stage 'train_reward_model'",
            remedy="lower train_reward_model.learning_rate",
        )


@torch.inference_mode()
def score_exposures(
    model: PScore, exposures: Exposures, event_S: Int64
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Logits of towers float32 [S, O] and of p float32 [S]."""
    scored = [
        model(requests, item_B1) for requests, item_B1 in _batches(model, exposures, event_S)
    ]
    tower = torch.cat([tower_BGO[:, 0] for tower_BGO, _ in scored])
    p = torch.cat([p_BG[:, 0] for _, p_BG in scored])
    return tower.cpu().numpy(), p.cpu().numpy()


def _batches(
    model: PScore, exposures: Exposures, event_S: Int64
) -> Iterator[tuple[Requests, Tensor]]:
    device = model.no_event.device
    for start in range(0, len(event_S), SCORE_BATCH):
        event_B = event_S[start : start + SCORE_BATCH]
        item_B1 = torch.from_numpy(exposures.sequences.item_E[event_B].astype(np.int64))[:, None]
        requests = exposures.requests(event_B, model.size.history)
        yield requests.to(device), item_B1.to(device)


def _search(
    model: PScore, exposures: Exposures, labels: Labels, cut: Cut, config: PScoreConfig, seed: int
) -> tuple[npt.NDArray[np.float64], list[float]]:
    rng = np.random.default_rng([seed, 1])
    drawn_S = cut.train_S
    if len(drawn_S) > FUSION_EXPOSURES:
        drawn_S = np.sort(rng.choice(drawn_S, FUSION_EXPOSURES, replace=False))
    with torch.inference_mode():
        inputs_train, inputs_valid = (
            torch.cat([model.states(*batch)[1][:, 0] for batch in _batches(model, exposures, part)])
            for part in (drawn_S, cut.valid_S)
        )
    judged = usable(labels, cut.valid_S, config.min_labels)
    O = len(labels.names)
    rate_O = _rates(labels, cut.train_S)
    candidates = [np.ones(O)]
    for _ in range(config.candidates - 1):
        lot_O = rng.uniform(-np.log(RANGE), np.log(RANGE), O)
        candidates.append(rate_O ** -rng.uniform(0, 1) * np.exp(lot_O))
    p_valid = [
        _fusion_of(model, inputs_train.clone(), inputs_valid.clone(), labels, drawn_S, w, seed)
        for w in candidates
    ]
    users = exposures.users(cut.valid_S)
    low_O = np.array([_auc_of(labels, cut.valid_S, o, p_valid[0], users, seed).low for o in judged])
    found = np.array(
        [[_plain_auc(labels, cut.valid_S, o, p) for o in judged] for p in p_valid]
    ).reshape(len(candidates), -1)
    best = choose_weights(found, low_O)
    return candidates[best], found.mean(1).tolist() if judged else []


def choose_weights(auc_WO: npt.NDArray[np.float64], low_O: npt.NDArray[np.float64]) -> int:
    """Which candidate: the highest mean AUC among those that lower none; the first are equal ones.

    Args:
        auc_WO: AUC of p of every candidate for every objective.
        low_O: lower end of the first one's interval; what is above it is no fall.
    """
    if not auc_WO.size:
        return 0
    allowed_W = (auc_WO >= np.minimum(low_O, auc_WO[0])).all(1)
    return int(np.where(allowed_W, auc_WO.mean(1), -np.inf).argmax())


def _fusion_of(
    model: PScore,
    inputs_train: Tensor,
    inputs_valid: Tensor,
    labels: Labels,
    event_S: Int64,
    weight_O: npt.NDArray[np.float64],
    seed: int,
) -> npt.NDArray[np.float32]:
    """p of the validation exposures after training a fusion alone with some weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shapes = [layer for layer in model.fusion if isinstance(layer, nn.Linear)]
        fusion = nn.Sequential(
            nn.Linear(shapes[0].in_features, shapes[0].out_features),
            nn.ReLU(),
            nn.Linear(shapes[1].in_features, 1),
        ).to(inputs_train.device)
        optimiser = torch.optim.AdamW(fusion.parameters(), lr=FUSION_RATE)
        weights = torch.from_numpy(weight_O / weight_O.mean()).float().to(inputs_train.device)
        value_SO, known_SO = (
            torch.from_numpy(x[event_S]).to(inputs_train.device)
            for x in (labels.value_EO, labels.known_EO)
        )
        for step in range(FUSION_STEPS):
            for group in optimiser.param_groups:
                group["lr"] = FUSION_RATE * (1 - step / FUSION_STEPS)
            row_B = torch.randint(len(inputs_train), (min(FUSION_BATCH, len(inputs_train)),))
            row_B = row_B.to(inputs_train.device)
            p_B = fusion(inputs_train[row_B])[:, 0]
            towers_BO = torch.zeros(len(row_B), len(labels.names), device=p_B.device)
            loss = fused_loss(p_B, towers_BO, value_SO[row_B], known_SO[row_B], weights, 0.0)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        with torch.inference_mode():
            return fusion(inputs_valid)[:, 0].cpu().numpy()


def _plain_auc(labels: Labels, event_S: Int64, o: int, score_S: npt.NDArray) -> float:
    known_S = labels.known_EO[event_S, o]
    return auc(score_S[known_S], labels.value_EO[event_S, o][known_S])


def _auc_of(
    labels: Labels, event_S: Int64, o: int, score_S: npt.NDArray, user_S: Int64, seed: int
) -> Auc:
    known_S = labels.known_EO[event_S, o]
    label_S = labels.value_EO[event_S, o][known_S]
    return auc_interval(score_S[known_S], label_S, user_S[known_S], seed)


@dataclass(frozen=True)
class Measured:
    """What one objective says of a preference model, on validation.

    Attributes:
        positives: known positive labels.
        tower_auc, tower_gauc: of the objective's own tower.
        p_auc: of the fused score.
        sum_auc: of the best fixed sum of all towers' scores.
    """

    positives: int
    exposures: int
    tower_auc: Auc
    tower_gauc: Auc
    p_auc: Auc
    sum_auc: float


def measure_pscore(
    model: PScore, exposures: Exposures, valid_S: Int64, config: PScoreConfig, seed: int
) -> dict[str, Measured]:
    """AUCs by objective.

    The fixed sum adds the towers' probabilities with one set of weights for everybody: of `SUMS`
    random sets (and each tower alone) the one with the highest mean AUC on these exposures, over
    the objectives with enough labels. It is chosen and measured on the same exposures, which
    favours it.
    """
    labels = _chosen(exposures.labels, [exposures.labels.names.index(n) for n in model.objectives])
    tower_SO, p_S = score_exposures(model, exposures, valid_S)
    users = exposures.users(valid_S)
    judged = usable(labels, valid_S, config.min_labels)
    rng = np.random.default_rng([seed, 2])
    O = len(model.objectives)
    rate_O = np.maximum(labels.value_EO[valid_S].mean(0), 1e-6)
    weights = np.concatenate([np.eye(O), rng.dirichlet(np.full(O, 0.5), SUMS)])
    sums_WS = (weights / rate_O) @ (1 / (1 + np.exp(-tower_SO.astype(np.float64)))).T
    by_sum = [[_plain_auc(labels, valid_S, o, s) for o in judged] for s in sums_WS]
    best_sum = sums_WS[int(np.mean(by_sum, axis=1).argmax())] if judged else sums_WS[0]
    found = {}
    for o, name in enumerate(model.objectives):
        known_S = labels.known_EO[valid_S, o]
        label_S = labels.value_EO[valid_S, o][known_S]
        found[name] = Measured(
            positives=int(label_S.sum()),
            exposures=int(known_S.sum()),
            tower_auc=_auc_of(labels, valid_S, o, tower_SO[:, o], users, seed),
            tower_gauc=gauc_interval(tower_SO[known_S, o], label_S, users[known_S], seed),
            p_auc=_auc_of(labels, valid_S, o, p_S, users, seed),
            sum_auc=_plain_auc(labels, valid_S, o, best_sum),
        )
    return found
