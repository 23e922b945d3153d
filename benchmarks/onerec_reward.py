"""Reinforcement learning of the recommender: ECPO beside GRPO and GBPO, judged by another model.

Data comes from the flow's own stages (`reelflow run recommend --until semantic_ids`) of
KuaiRand-Pure where it is at hand, of the simulator elsewhere. Two preference models learn from
disjoint users; one is the reward, the other, the *judge*, never trains anything. All figures of a
policy are on validation users from whom neither model learned, the same for every arm: the highest
P-Score of the first K items of beam search ("best", as in the report's Pass@K) and their mean.
The reference is the supervised model (SFT) unless a figure's name says otherwise; low and high are
its value plus the 95 % interval of the paired difference over users, so that a gain is beyond
doubt where low exceeds the reference.

``ecpo_chosen`` is the arm of the stage: of the weights every ten steps those with the highest
reward whose NDCG@10 is no lower than SFT's, both on validation users *with* models; it is then
measured on the others. All other arms are taken after their last step.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.result import Result

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from components.training.onerec.recommender import Recommender
    from components.training.onerec.reward.align import Progress
    from components.training.onerec.reward.config import AlignConfig
    from components.training.onerec.reward.evaluation import Offered
    from components.training.onerec.reward.exposures import Exposures
    from components.training.onerec.reward.pscore import PScore
    from components.training.onerec.reward.pscore_measure import Measured
    from components.training.onerec.train import TrainingData

SUMMARY = "Reward learning of OneRec: ECPO, GRPO and GBPO under an independent judge; legality"

ROOT = Path(__file__).resolve().parent.parent
DATA = "kuairand_pure"
WIDTHS = (8, 32, 128)
#: What the report's format reward reaches with samples drawn at random (Fig. 12).
TARGET_LEGALITY = 0.95
STAGES = ("split", "item_features", "align_items", "semantic_ids", "validate")


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        arms: of each comparison, the first so many.
    """

    sft_steps: int
    steps: int
    format_steps: int
    users: int
    valid_users: int
    widths: tuple[int, ...]
    samples: int
    pscore_epochs: int
    arms: int = 99


FULL = Size(1200, 60, 120, 32, 1000, WIDTHS, 32, 3)
QUICK = Size(10, 2, 2, 4, 30, (8, 32), 8, 1, arms=1)


def run(quick: bool = False) -> list[Result]:
    """All arms; ``quick`` is a small simulated platform and three steps each."""
    size = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="bench_reward_") as home:
        world = prepare(Path(home), size, quick)
    results = preference_figures(world)
    before = world.offered(world.recommender)
    # Every arm is the default of the stage with no rollout older than the trainer.
    arms: dict[str, dict[str, Any]] = {
        "ecpo": {},
        "grpo": {"objective": "grpo"},
        "gbpo": {"objective": "gbpo"},
        "ecpo_group_16": {"group": 16},
        "ecpo_group_64": {"group": 64},
        "ecpo_sampled": {"sampler": "constrained"},
        "ecpo_stale": {"max_staleness": size.steps},
    }
    for name, settings in list(arms.items())[: size.arms]:
        after = world.offered(world.aligned(settings)[0])
        results += gains(name, before, after)
    results += gains("ecpo_chosen", before, world.offered(world.chosen()))
    shuffled = world.aligned({}, shuffled=True)[0]
    results += gains("shuffled_reward", before, world.offered(shuffled))
    return [*results, *stability(world), *legality(world, before)]


@dataclass(frozen=True)
class World:
    """Data, models and users of all arms.

    Attributes:
        held_U, own_U: validation examples of users without and with a preference model.
    """

    size: Size
    data: TrainingData
    recommender: Recommender
    pscores: Mapping[str, PScore]
    measured: Mapping[str, Measured]
    user_UF: np.ndarray
    valid_UF: np.ndarray
    user_R: np.ndarray
    held_U: np.ndarray
    own_U: np.ndarray

    def offered(self, recommender: Recommender, event_U: np.ndarray | None = None) -> Offered:
        from components.training.onerec.reward.evaluation import offer

        return offer(
            recommender,
            self.pscores,
            self.data.valid,
            self.held_U if event_U is None else event_U,
            self.valid_UF,
            widths=self.size.widths,
            samples=self.size.samples,
            seed=0,
        )

    def config(self, settings: Mapping[str, Any]) -> AlignConfig:
        from components.training.onerec.reward.config import AlignConfig

        common = {"steps": self.size.steps, "users": self.size.users, "max_staleness": 0}
        given = {**common, "ahead": 0, "checkpoint_every": 10_000, **settings}
        return AlignConfig(**given)

    def aligned(
        self, settings: Mapping[str, Any], *, shuffled: bool = False, checkpoint: Any = None
    ) -> tuple[Recommender, Progress]:
        """The recommender after some arm's last step."""
        import torch

        from components.training.onerec.reward.align import Parts, Progress, align, in_process
        from components.training.onerec.reward.features import requests_after
        from components.training.onerec.reward.workers import with_weights

        config = self.config(settings)
        common = {"requests": requests_after(self.data.train), "config": config}
        codes_NQ, items = self.data.codes_NQ, len(self.data.codes_NQ)
        crew = in_process(
            Parts(
                {**common, "recommender": self.recommender, "user_R": self.user_R, "seed": 0},
                {
                    **common,
                    "pscore": self.pscores["reward"],
                    "user_UF": self.user_UF,
                    "codes_NQ": codes_NQ,
                    "flagged_N": torch.zeros(items, dtype=torch.bool),
                },
                {**common, "recommender": self.recommender, "data": self.data, "seed": 0},
            )
        )
        if shuffled:
            crew.reward.score = _shuffled(crew.reward.score)
        progress = align(crew, config, Progress(), checkpoint=checkpoint or (lambda progress: None))
        assert progress.trainer is not None
        return with_weights(self.recommender, progress.trainer.weights), progress

    def chosen(self) -> Recommender:
        """As the stage chooses: the highest reward at no lower NDCG@10, every ten steps."""
        from components.training.onerec.reward.workers import with_weights

        before = self.offered(self.recommender, self.own_U)
        key = ("reward", self.size.widths[0])
        best = float(before.mean[key].mean())
        weights: Mapping[str, Tensor] | None = None

        def judge(progress: Progress) -> None:
            nonlocal best, weights
            assert progress.trainer is not None
            now = self.offered(with_weights(self.recommender, progress.trainer.weights), self.own_U)
            reward = float(now.mean[key].mean())
            if now.ndcg_U.mean() >= before.ndcg_U.mean() and reward > best:
                best, weights = reward, progress.trainer.weights

        self.aligned({"checkpoint_every": 10}, checkpoint=judge)
        return self.recommender if weights is None else with_weights(self.recommender, weights)


def _shuffled(score: Any) -> Any:
    """Rewards dealt out anew within each group: the control that must not gain."""
    import torch

    lot = torch.Generator().manual_seed(0)

    def shuffled(rollouts: Any) -> Tensor:
        reward_BG: Tensor = score(rollouts)
        order_BG = torch.rand(reward_BG.shape, generator=lot).argsort(1)
        return reward_BG.gather(1, order_BG)

    return shuffled


def gains(name: str, before: Offered, after: Offered) -> list[Result]:
    """One arm beside the supervised model on the same users."""
    from components.evaluation.ranking.metrics import paired_difference

    def compared(figure: str, unit: str, ours_U: np.ndarray, theirs_U: np.ndarray) -> Result:
        reference = float(theirs_U.mean())
        found = paired_difference(ours_U, theirs_U, 0)
        low, high = reference + found.low, reference + found.high
        label = f"{name}_{figure}"
        return Result(label, float(ours_U.mean()), reference, unit, low, high, len(ours_U), True)

    rows = []
    for (model, k), theirs_U in before.best.items():
        rows.append(compared(f"{model}_best_of_{k}", "P-Score", after.best[model, k], theirs_U))
    for (model, k), theirs_U in before.mean.items():
        rows.append(compared(f"{model}_mean_of_{k}", "P-Score", after.mean[model, k], theirs_U))
    rows.append(compared("ndcg_at_10", "NDCG@10", after.ndcg_U, before.ndcg_U))
    rows.append(compared("legality", "of samples", after.legality_U, before.legality_U))
    distinct = float(after.distinct)
    n = len(after.ndcg_U)
    figure = f"{name}_distinct_at_10"
    rows.append(Result(figure, distinct, before.distinct, "items", distinct, distinct, n, True))
    return rows


def preference_figures(world: World) -> list[Result]:
    """AUCs of the reward model: of p, beside the best fixed sum of the towers; of the towers."""
    rows = []
    for name, found in world.measured.items():
        p, tower = found.p_auc, found.tower_auc
        n = found.positives
        rows.append(Result(f"p_auc_{name}", p.value, found.sum_auc, "AUC", p.low, p.high, n, True))
        rows.append(
            Result(f"tower_auc_{name}", tower.value, None, "AUC", tower.low, tower.high, n, True)
        )
        gauc = found.tower_gauc
        rows.append(
            Result(f"tower_gauc_{name}", gauc.value, None, "GAUC", gauc.low, gauc.high, n, True)
        )
    return rows


def stability(world: World) -> list[Result]:
    """Largest gradient norm at a high rate under a behaviour policy that never follows.

    The reference is GRPO's; low is the median step.
    """
    import statistics

    settings = {
        "preference_weight": 5.0,
        "format_weight": 0.0,
        "learning_rate": 1e-2,
        "max_staleness": 10_000,
        "sampler": "constrained",
        "sft_batch": 32,
        "clip": None,
        "steps": max(2, world.size.steps // 2),
    }
    norms = {}
    for objective in ("grpo", "ecpo", "gbpo")[: world.size.arms + 1]:
        curve = world.aligned({**settings, "objective": objective})[1].curve
        norms[objective] = [row["gradient_norm"] for row in curve]
    grpo = max(norms["grpo"])
    rows = []
    for objective, found in norms.items():
        largest, median = max(found), statistics.median(found)
        name, n = f"{objective}_stale_gradient_norm_max", len(found)
        reference = None if objective == "grpo" else grpo
        rows.append(Result(name, largest, reference, "norm", median, largest, n, False))
    return rows


def legality(world: World, before: Offered) -> list[Result]:
    """Share of legal ids among unconstrained samples: without, random-k and top-k format reward.

    The reference of random-k is what the report reaches; of the others it is the SFT model's.
    """
    common = {
        "steps": world.size.format_steps,
        "preference_weight": 1.0,
        "learning_rate": 1e-3,
    }
    arms: dict[str, dict[str, Any]] = {
        "random": {"format_weight": 20.0},
        "without": {"format_weight": 0.0},
        "top": {"format_weight": 20.0, "format_choice": "top"},
    }
    rows = []
    for name, settings in list(arms.items())[: world.size.arms]:
        recommender, _ = world.aligned({**common, **settings})
        after = world.offered(recommender)
        row = next(r for r in gains(f"format_{name}", before, after) if r.name.endswith("legality"))
        reference = TARGET_LEGALITY if name == "random" else row.reference
        rows.append(Result(row.name, row.ours, reference, row.unit, row.low, row.high, row.n, True))
    return rows


def prepare(home: Path, size: Size, quick: bool) -> World:
    """Artifacts of the flow, the supervised model and both preference models."""
    import numpy as np
    import pyarrow.parquet as pq

    from components.training.onerec.reward import features
    from components.training.onerec.reward.config import PScoreConfig
    from components.training.onerec.reward.exposures import Cut, cut_by_time, usable
    from components.training.onerec.reward.pscore_measure import measure_pscore
    from components.training.onerec.reward.pscore_train import train_pscore

    files = _artifacts(home, quick)
    config = PScoreConfig(epochs=size.pscore_epochs, candidates=1 if quick else 12)
    exposures, train_ids = _exposures(files, config)
    data, recommender = _supervised(files, size)
    cut = cut_by_time(exposures, config.valid_share, config.max_exposures)
    objectives = usable(exposures.labels, cut.train_S, config.min_labels)
    groups = features.split_users(train_ids, config.held_out_share, 0)
    user_S = exposures.users(cut.train_S)
    pscores, weight_O = {}, None
    for seed, name in enumerate(("reward", "judge")):
        own = Cut(cut.train_S[groups[name][user_S]], cut.valid_S)
        trained = train_pscore(exposures, own, objectives, config, seed, weight_O=weight_O)
        pscores[name], weight_O = trained.model, trained.weight_O
    valid_ids = data.valid.user_id_U
    users = pq.read_table(files["users"])
    held = features.split_users(valid_ids, config.held_out_share, 0)["held_out"]
    event_U = data.valid.example_targets()

    def some(chosen: np.ndarray) -> np.ndarray:
        place = np.linspace(0, len(chosen) - 1, min(len(chosen), size.valid_users)).astype(int)
        return event_U[chosen[np.unique(place)]]

    return World(
        size=size,
        data=data,
        recommender=recommender,
        pscores=pscores,
        measured=measure_pscore(pscores["reward"], exposures, cut.valid_S, config, 0),
        user_UF=exposures.user_UF,
        valid_UF=features.user_features(valid_ids, users, config.model.user_buckets),
        user_R=np.flatnonzero(~groups["held_out"]),
        held_U=some(np.flatnonzero(held)),
        own_U=some(np.flatnonzero(~held)),
    )


def _artifacts(home: Path, quick: bool) -> dict[str, Path]:
    """Files of the flow's artifacts by name."""
    place = Path(os.environ.get("REELFLOW_SHARED_DATA", ROOT.parent / "shared" / "data")) / DATA
    small = [f"ingest.simulator.{s}" for s in ("users=150", "items=200", "interactions=6000")]
    small += ["ingest.simulator.render_videos=false", "validate.great_expectations=false"]
    small += ["align_items.method=none"]
    words = [word for setting in small for word in ("--set", setting)] if quick else []
    source = ["--data", str(place)] if place.is_dir() and not quick else words
    command = [sys.executable, "-P", "-m", "components.pipeline.cli", "run", "recommend"]
    environment = {**os.environ, "REELFLOW_HOME": str(home), "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "--until", "semantic_ids", *source], cwd=ROOT, env=environment, check=True
    )
    return {
        folder.name: next(iter([*folder.glob("*.parquet"), *folder.glob("*.safetensors")]))
        for stage in STAGES
        for folder in home.glob(f"store/data/{stage}/*/*")
        if any([*folder.glob("*.parquet"), *folder.glob("*.safetensors")])
    }


def _exposures(files: Mapping[str, Path], config: Any) -> tuple[Exposures, np.ndarray]:
    import numpy as np
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    from components.training.onerec.data import read_sequences
    from components.training.onerec.reward import features
    from components.training.onerec.reward.exposures import Exposures

    train = pq.read_table(files["train_sequences"])
    item_ids = pq.read_table(files["catalogue"], columns=["item_id"])["item_id"].to_numpy()
    interactions = pq.ParquetFile(files["interactions"]).iter_batches()
    sequences = read_sequences(train.to_batches())
    known_E = features.known_signals(train, interactions, item_ids)
    users = pq.read_table(files["users"])
    items = pq.read_table(files["items"])
    content_NC = load_file(files["item_embedding"])["embedding"]
    user_ids = train["user_id"].to_numpy()
    exposures = Exposures(
        sequences,
        features.labels_of(sequences, known_E),
        features.user_features(user_ids, users, config.model.user_buckets),
        np.zeros((len(item_ids), 1), np.int32),
        features.item_features(item_ids, items, content_NC, config.model),
    )
    return exposures, user_ids


def _supervised(files: Mapping[str, Path], size: Size) -> tuple[TrainingData, Recommender]:
    """The recommender before any reward: trained as the stage trains, in this process."""
    from components.training.onerec.config import OneRecConfig, TrainConfig
    from components.training.onerec.decode import DeviceTrie
    from components.training.onerec.model import OneRec
    from components.training.onerec.recommender import Recommender
    from components.training.onerec.stage import read_training_data
    from components.training.onerec.train import successors_of, train, training_targets
    from components.training.onerec.trie import build_trie

    names = ("catalogue", "items", "users", "aligned_embedding", "semantic_ids")
    given = {name: files[name] for name in names}
    given |= {"train": files["train_sequences"], "valid": files["valid_examples"]}
    config = OneRecConfig()
    data = read_training_data(given, config)
    assert data.features is not None
    codes_NQ = data.codes_NQ
    config = config.model_copy(
        update={
            "num_levels": codes_NQ.shape[1],
            "codebook_size": int(codes_NQ.max()) + 1,
            "num_items": len(codes_NQ),
            **data.features.sizes(config.features),
        }
    )
    training = TrainConfig(
        max_steps=size.sft_steps,
        evaluate_every=max(1, size.sft_steps // 4),
        valid_users=size.valid_users,
    )
    state = train(config, data, training)
    model = OneRec(config)
    model.load_state_dict(state.best_weights)
    assert model.memory is not None
    counted = successors_of(data, training_targets(data, training.targets), config)
    model.memory.fill(counted, data.codes_NQ)
    trie = DeviceTrie.on(build_trie(data.codes_NQ, data.popularity_N))
    return data, Recommender(model.eval(), trie, data.codes_NQ, data.features)
