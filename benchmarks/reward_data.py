"""Data and models of the reward benchmark.

Every seed has a chain of its own: a supervised recommender, two preference models, reinforcement
learning. The split, the semantic ids and the groups of users are the same for all seeds, so that
figures of different seeds are of the same users. Users are dealt into three groups, and who sees
whom is:

* a preference model learns from train exposures of its own users, and its w^xtr are chosen on the
  newest of these users' exposures;
* the recommender learns from the train sequences of all users; its checkpoint, and the weights of
  an alignment, are chosen on validation requests of users with a model;
* whatever is reported is of users without a model: test requests for policies, the newest
  exposures for preference models.

Shapes: U users, S exposures, V validation exposures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.flow_runs import run_flow
from benchmarks.kept import kept, short_digest
from components.training.onerec.reward.stage import JUDGE, REWARD

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig
    from components.training.onerec.data import Sequences
    from components.training.onerec.recommender import Recommender
    from components.training.onerec.reward.config import PScoreConfig
    from components.training.onerec.reward.exposures import Exposures
    from components.training.onerec.train import TrainingData

Int64 = npt.NDArray[np.int64]

MODELS = (REWARD, JUDGE)
HELD_OUT = "held_out"
#: Users are dealt into groups once: all seeds are measured on the same ones.
GROUPS_SEED = 0


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        sft_steps: steps of the supervised recommender.
        valid_users, test_users: users at most, spread evenly.
        widths: lengths of lists, ascending.
        samples: unconstrained samples of a test user.
        pscore: what preference models do otherwise than the stage, as ``(name, value)``.
    """

    sft_steps: int
    valid_users: int
    test_users: int
    widths: tuple[int, ...]
    samples: int
    pscore: tuple[tuple[str, Any], ...] = ()


class Files(NamedTuple):
    """Artifacts of the flow that the benchmark reads."""

    catalogue: Path
    items: Path
    users: Path
    interactions: Path
    train_sequences: Path
    valid_examples: Path
    test_examples: Path
    item_embedding: Path
    aligned_embedding: Path
    semantic_ids: Path


@dataclass(frozen=True)
class Place:
    """Where the models and the figures of one state of data and code are kept."""

    folder: Path
    files: Files
    size: Size


def prepare(home: Path, size: Size, settings: tuple[str, ...], data: Path | None) -> Place:
    """Run the flow up to the semantic ids.

    A later call in the same ``home`` finds what an earlier one left, as long as neither data nor
    code nor size differ.
    """
    from components.pipeline.code_digest import closure_digests, combined_digest

    artifacts = run_flow(home, "semantic_ids", settings, data)
    files = Files(*(_only_file(artifacts[name]) for name in Files._fields))
    digests = [artifacts[name].digest for name in Files._fields]
    modules = ("benchmarks.reward_data", "benchmarks.reward_world")
    code = [combined_digest(closure_digests(module)) for module in modules]
    key = short_digest([digests, code, asdict(size)])
    return Place(home / f"reward_{key}", files, size)


def _only_file(artifact: Any) -> Path:
    """The table of an artifact, or its tensors."""
    (name,) = (n for n in ("table.parquet", "model.safetensors") if n in artifact.files)
    return Path(artifact.path(name))


def pscore_config(size: Size) -> PScoreConfig:
    from components.training.onerec.reward.config import PScoreConfig

    return PScoreConfig(**dict(size.pscore))


def groups_of(user_ids: Int64, size: Size) -> Mapping[str, npt.NDArray[np.bool_]]:
    """Users of either preference model and of none (`HELD_OUT`): bool [U] each."""
    from components.training.onerec.reward.features import split_users

    return split_users(user_ids, pscore_config(size).held_out_share, GROUPS_SEED)


def train_recommender(place: Place, seed: int) -> Path:
    """The supervised recommender of a seed, trained as the stage trains; its weights' folder."""
    from safetensors.torch import save_file

    from components.training.onerec.config import TrainConfig
    from components.training.onerec.train import train

    def make(folder: Path) -> None:
        print(f"recommender, seed {seed}", flush=True)
        data, size = read_data(place), place.size
        training = TrainConfig(
            seed=seed,
            max_steps=size.sft_steps,
            evaluate_every=min(size.sft_steps, TrainConfig().evaluate_every),
            valid_users=size.valid_users,
            # How far it gets must not depend on how fast a machine is.
            max_minutes=1e6,
        )
        state = train(_model_config(data), data, training)
        save_file(state.best_weights, folder / "model.safetensors")

    return kept(place.folder / f"recommender_{seed}", make)


def train_preferences(place: Place, seed: int) -> Path:
    """Both preference models of a seed, with their AUCs of users without one; their folder."""
    from components.training.onerec.reward.exposures import Cut, divide
    from components.training.onerec.reward.pscore import save_pscore
    from components.training.onerec.reward.pscore_measure import measure_pscore
    from components.training.onerec.reward.pscore_train import train_pscore

    def make(folder: Path) -> None:
        print(f"preference models, seed {seed}", flush=True)
        config = pscore_config(place.size)
        exposures, user_ids = _exposures(place.files, config)
        groups = groups_of(user_ids, place.size)
        material = divide(exposures, {name: groups[name] for name in MODELS}, config)
        user_V = exposures.users(material.valid_S)
        held_S = material.valid_S[groups[HELD_OUT][user_V]]
        facts = {}
        for number, name in enumerate(MODELS):
            # Each model chooses its w^xtr with users of its own.
            own = Cut(material.cuts[name].train_S, material.valid_S[groups[name][user_V]])
            lot = len(MODELS) * seed + number
            model = train_pscore(exposures, own, material.objectives, config, lot).model
            save_pscore(model, folder, name)
            found = measure_pscore(model, exposures, held_S, config, 0)
            facts[name] = {objective: asdict(measured) for objective, measured in found.items()}
        (folder / "auc.json").write_text(json.dumps(facts))

    return kept(place.folder / f"preferences_{seed}", make)


def read_data(place: Place) -> TrainingData:
    """What the recommender is trained on; validation is of users with a model alone."""
    from components.training.onerec.config import OneRecConfig
    from components.training.onerec.stage import read_training_data

    given = place.files._asdict()
    given |= {"train": place.files.train_sequences, "valid": place.files.valid_examples}
    valid = examples_of(place.files.valid_examples, place.size, held_out=False)
    data = read_training_data(given, OneRecConfig())
    return replace(data, valid=valid)


def examples_of(file: Path, size: Size, *, held_out: bool) -> Sequences:
    """Examples of users without a model, or of those with one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from components.training.onerec.data import read_sequences

    table = pq.read_table(file)
    held_U = groups_of(table["user_id"].to_numpy(), size)[HELD_OUT]
    return read_sequences(table.filter(pa.array(held_U == held_out)).to_batches())


def _exposures(files: Files, config: PScoreConfig) -> tuple[Exposures, Int64]:
    """What preference models read, and the ids of the train users."""
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    from components.training.onerec.data import read_sequences
    from components.training.onerec.reward.exposures import Exposures

    train = pq.read_table(files.train_sequences)
    exposures = Exposures.of(
        read_sequences(train.to_batches()),
        train,
        pq.ParquetFile(files.interactions).iter_batches(),
        pq.read_table(files.catalogue, columns=["item_id"])["item_id"].to_numpy(),
        pq.read_table(files.items),
        pq.read_table(files.users),
        load_file(files.item_embedding)["embedding"],
        config.model,
    )
    return exposures, train["user_id"].to_numpy()


def _model_config(data: TrainingData) -> OneRecConfig:
    """The default architecture over the data's semantic ids and features."""
    from components.training.onerec.config import OneRecConfig

    config, codes_NQ = OneRecConfig(), data.codes_NQ
    assert data.features is not None
    sizes = {
        "num_levels": codes_NQ.shape[1],
        "codebook_size": int(codes_NQ.max()) + 1,
        "num_items": len(codes_NQ),
        **data.features.sizes(config.features),
    }
    return config.model_copy(update=sizes)


def load_recommender(folder: Path, data: TrainingData) -> Recommender:
    from safetensors.torch import load_file

    from components.training.onerec.decode import DeviceTrie
    from components.training.onerec.model import OneRec
    from components.training.onerec.recommender import Recommender
    from components.training.onerec.train import successors_of, training_targets
    from components.training.onerec.trie import build_trie

    config = _model_config(data)
    model = OneRec(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    if model.memory is not None:
        model.memory.fill(successors_of(data, training_targets(data), config), data.codes_NQ)
    trie = DeviceTrie.on(build_trie(data.codes_NQ, data.popularity_N))
    assert data.features is not None
    return Recommender(model.eval(), trie, data.codes_NQ, data.features)
