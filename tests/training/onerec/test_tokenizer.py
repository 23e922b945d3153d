"""Claims about the tokenizer (arXiv 2506.13695 section 2.1; balanced: 2502.18965 Algorithm 1)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor

from components.pipeline.errors import DataContractError, ParamsError
from components.training.onerec.config import RQVAEConfig, TokenizerConfig
from components.training.onerec.tokenizer import balanced, kmeans, rq_vae
from components.training.onerec.tokenizer import semantic_ids as tokenizer


def mixture(items: int = 600, width: int = 16, centres: int = 24, seed: int = 0) -> Tensor:
    """Points around centres of unequal weight: clusters of very different size."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(centres, 0.4))
    centre = rng.normal(size=(centres, width))[rng.choice(centres, items, p=share)]
    return torch.from_numpy(centre + 0.4 * rng.normal(size=(items, width))).float()


@pytest.fixture(scope="module")
def x_ND() -> Tensor:
    return mixture()


@pytest.fixture(scope="module", params=["plain", "balanced", "in_turn"])
def fitted(request: pytest.FixtureRequest, x_ND: Tensor) -> tokenizer.SemanticIds:
    return tokenizer.fit(
        x_ND, TokenizerConfig(collisions="keep", codebook_size=16, method=request.param), seed=3
    )


def test_embedding_is_sum_of_centroids_and_residual(
    x_ND: Tensor, fitted: tokenizer.SemanticIds
) -> None:
    residual = x_ND.double()
    for level in range(3):
        residual = (
            residual - fitted.quantizer.codebooks_QKD[level][fitted.codes_NQ[:, level].long()]
        )
    rebuilt = tokenizer.decode(fitted.codes_NQ, fitted.quantizer)
    assert torch.allclose(rebuilt.double() + residual, x_ND.double(), atol=1e-6)
    stats = tokenizer.measure(x_ND, fitted)
    assert stats.mse[-1] == pytest.approx(float(residual.square().mean()), rel=1e-5)


def test_error_never_rises_with_levels(x_ND: Tensor, fitted: tokenizer.SemanticIds) -> None:
    mse = tokenizer.measure(x_ND, fitted).mse
    assert mse[0] >= mse[1] >= mse[2]


def test_codes_of_plain_fit_are_those_of_frozen_codebooks(x_ND: Tensor) -> None:
    config = TokenizerConfig(method="plain", collisions="keep", codebook_size=16)
    ids = tokenizer.fit(x_ND, config, seed=0)
    assert torch.equal(tokenizer.encode(x_ND, ids.quantizer), ids.codes_NQ)


def test_first_level_centroid_encodes_to_its_own_index(fitted: tokenizer.SemanticIds) -> None:
    codes = tokenizer.encode(fitted.quantizer.codebooks_QKD[0], fitted.quantizer)
    assert codes[:, 0].tolist() == list(range(16))


def test_code_of_an_item_does_not_depend_on_what_else_is_encoded(
    x_ND: Tensor, fitted: tokenizer.SemanticIds, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = tokenizer.encode(x_ND, fitted.quantizer)
    alone = torch.cat([tokenizer.encode(x_ND[i : i + 1], fitted.quantizer) for i in range(50)])
    assert torch.equal(alone, together[:50])
    monkeypatch.setattr(kmeans, "BLOCK_BYTES", 4 * 16 * 7)  # seven rows a block
    assert torch.equal(tokenizer.encode(x_ND, fitted.quantizer), together)


def test_inertia_equals_scikit_learn_from_the_same_start(x_ND: Tensor) -> None:
    start = kmeans.plus_plus(x_ND, 16, torch.Generator().manual_seed(0))
    _, _, inertia = kmeans.lloyd(x_ND, start, 100)
    theirs = KMeans(16, init=start.numpy(), n_init=1, max_iter=100, tol=0).fit(x_ND.numpy())
    # The specification's tolerance: the two may settle equal distances differently.
    assert inertia == pytest.approx(theirs.inertia_, rel=0.01)


def test_more_iterations_never_raise_inertia(x_ND: Tensor) -> None:
    start = kmeans.plus_plus(x_ND, 16, torch.Generator().manual_seed(1))
    inertia = [kmeans.lloyd(x_ND, start, n)[2] for n in range(6)]
    assert all(a >= b * (1 - 1e-6) for a, b in itertools.pairwise(inertia))


def test_empty_clusters_come_back_to_life() -> None:
    x_ND = mixture(200, 8)
    start = torch.cat([x_ND[:1], torch.full((7, 8), 1e3)])  # all points go to one centroid
    _, code_N, _ = kmeans.lloyd(x_ND, start, 20)
    assert len(code_N.unique()) == 8


def test_plus_plus_picks_every_one_of_far_apart_groups() -> None:
    groups = torch.arange(10.0).repeat_interleave(30)[:, None] * 1000
    start = kmeans.plus_plus(groups + torch.rand(300, 1), 10, torch.Generator().manual_seed(0))
    assert sorted((start[:, 0] // 1000).int().tolist()) == list(range(10))


@pytest.mark.parametrize("way", [balanced.balanced, kmeans.in_turn])
@pytest.mark.parametrize("items", [64, 100, 127, 600])
def test_balanced_buckets_differ_by_at_most_one(items: int, way: Any) -> None:
    x_ND = mixture(items)
    _, code_N, _ = way(x_ND, x_ND[:16].clone(), 20)
    sizes = torch.bincount(code_N, minlength=16)
    assert int(sizes.max() - sizes.min()) <= 1


def test_balance_by_prices_is_nearly_the_cheapest_there_is() -> None:
    x_ND = mixture(240, 8)
    centroid_KD, code_N, _ = balanced.balanced(x_ND, x_ND[:12].clone(), 20)
    # The cheapest assignment to these centroids with 20 points each, by the Hungarian method.
    cost = torch.cdist(x_ND, centroid_KD).square().double()
    rows, seats = linear_sum_assignment(cost.repeat_interleave(20, 1).numpy())
    cheapest = float(cost[rows, torch.from_numpy(seats) // 20].sum())
    ours = float(cost[torch.arange(240), code_N].sum())
    # Prices are a finite number of steps from the optimum.
    assert cheapest <= ours <= 1.03 * cheapest
    _, _, in_turn = kmeans.in_turn(x_ND, x_ND[:12].clone(), 20)
    assert ours < in_turn


def test_balance_holds_where_few_clusters_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balanced, "CANDIDATE_BYTES", 1)
    x_ND = mixture(1000, 8)
    start_KD = kmeans.plus_plus(x_ND, 50, torch.Generator().manual_seed(0))
    _, code_N, _ = balanced.balanced(x_ND, start_KD, 20)
    assert torch.bincount(code_N, minlength=50).tolist() == [20] * 50


def colliding(code_N: Tensor, prefix_N: Tensor) -> int:
    """Points that share their cluster with a point of their own group."""
    _, count = torch.unique(torch.stack([prefix_N, code_N]), dim=1, return_counts=True)
    return int(count[count > 1].sum())


@pytest.mark.parametrize("groups", [40, 150])
def test_points_of_a_group_get_different_clusters_of_equal_size(groups: int) -> None:
    x_ND = mixture()
    # Points of one group lie together, as items of one prefix do: they want the same cluster.
    prefix_N = kmeans.lloyd(x_ND, x_ND[:groups].clone(), 5)[1]
    start_KD = kmeans.plus_plus(x_ND, 64, torch.Generator().manual_seed(0))
    alone_KD, alone_N, _ = balanced.balanced(x_ND, start_KD, 20)
    _, code_N, inertia = balanced.balanced(x_ND, start_KD, 20, prefix_N)
    assert colliding(alone_N, prefix_N) > 100
    assert colliding(code_N, prefix_N) == 0
    sizes = torch.bincount(code_N, minlength=64)
    assert int(sizes.max() - sizes.min()) <= 1
    # To repair collisions afterwards costs more, though it need not keep the balance.
    repaired_N = tokenizer.next_free_codes(x_ND, alone_KD, prefix_N, alone_N)
    mean_KD, sizes = kmeans.means(x_ND, repaired_N, 64)
    assert colliding(repaired_N, prefix_N) == 0
    assert inertia < float((x_ND - mean_KD[repaired_N]).square().sum())
    assert int(sizes.max() - sizes.min()) > 1


def test_a_full_house_needs_points_that_make_room() -> None:
    # Two groups of four in four clusters of two: each group has every cluster once.
    x_ND = torch.tensor([[0.0], [0.1], [0.2], [10.0], [0.0], [9.9], [10.0], [10.1]])
    prefix_N = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    start_KD = torch.tensor([[0.0], [0.1], [9.9], [10.0]])
    _, code_N, _ = balanced.balanced(x_ND, start_KD, 20, prefix_N)
    assert sorted(code_N[:4].tolist()) == sorted(code_N[4:].tolist()) == [0, 1, 2, 3]


def test_a_point_without_a_place_changes_with_one_that_has() -> None:
    """Clusters 0 and 1 full, one place left in 2, where the last point's group is already."""
    x_ND = torch.tensor([[0.0], [1.0], [2.0], [0.4], [0.9], [2.0]])
    centroid_KD = torch.tensor([[0.0], [1.0], [2.0]])
    code_N = torch.tensor([0, 1, 2, 0, 1, -1])
    groups = balanced._Groups(torch.tensor([0, 1, 2, 3, 4, 2]))
    offset_K, free_K = -centroid_KD.square().sum(1) / 2, torch.tensor([0, 0, 1])
    balanced._make_room(x_ND, centroid_KD, offset_K, code_N, free_K, groups, 5)
    # The cheapest pair of moves: point 1 goes from 1 to 2 at (1 - 2)², the last to its place.
    assert code_N.tolist() == [0, 2, 2, 0, 1, 1]
    assert free_K.tolist() == [0, 0, 0]


@pytest.mark.parametrize("items", [30, 200])
def test_a_group_larger_than_the_clusters_shares_them_evenly(items: int) -> None:
    _, code_N, _ = balanced.balanced(
        mixture(items), mixture(items)[:8].clone(), 20, torch.zeros(items, dtype=torch.long)
    )
    sizes = torch.bincount(code_N, minlength=8)
    assert int(sizes.max() - sizes.min()) <= 1


def test_balanced_ids_collide_only_where_a_prefix_has_more_items_than_codes(x_ND: Tensor) -> None:
    config = TokenizerConfig(method="balanced", collisions="keep", codebook_size=16)
    ids = tokenizer.fit(x_ND[:592], config, seed=0)
    stats = tokenizer.measure(x_ND[:592], ids)
    _, items = torch.unique(ids.codes_NQ[:, :2], dim=0, return_counts=True)
    assert int(items.max()) > 16
    assert stats.distinct == int(items.clamp_max(16).sum())
    assert stats.entropy == pytest.approx([math.log(16)] * 3, abs=1e-12)
    plain = config.model_copy(update={"method": "plain"})
    assert tokenizer.measure(x_ND, tokenizer.fit(x_ND, plain, seed=0)).colliding > 200


def test_points_that_are_all_alike_are_shared_out_evenly() -> None:
    _, code_N, inertia = balanced.balanced(torch.ones(40, 3), torch.ones(8, 3), 20)
    assert torch.bincount(code_N).tolist() == [5] * 8
    assert inertia == 0


def test_round_in_turn_equals_the_algorithm_taken_literally() -> None:
    x_ND, centroid = mixture(90), mixture(90, seed=5)[:7]
    share = [90 // 7 + (k < 90 % 7) for k in range(7)]
    left, expected = set(range(90)), torch.empty(90, dtype=torch.long)
    for k in range(7):
        near = sorted(left, key=lambda i: float((x_ND[i] - centroid[k]).double().square().sum()))
        expected[near[: share[k]]] = k
        left -= set(near[: share[k]])
    assert torch.equal(kmeans._equal_shares(x_ND, centroid, share), expected)


@pytest.mark.parametrize("method", ["balanced", "in_turn"])
def test_entropy_is_at_most_ln_k_and_reaches_it_when_balanced(x_ND: Tensor, method: str) -> None:
    equal = tokenizer.fit(
        x_ND[:592], TokenizerConfig(collisions="keep", codebook_size=16, method=method), seed=0
    )
    for entropy in tokenizer.measure(x_ND[:592], equal).entropy:
        assert entropy == pytest.approx(math.log(16), abs=1e-12)
    config = TokenizerConfig(method="plain", collisions="keep", codebook_size=16)
    plain = tokenizer.fit(x_ND, config, seed=0)
    assert all(e < math.log(16) for e in tokenizer.measure(x_ND, plain).entropy)


def test_collision_statistics_equal_brute_force(
    x_ND: Tensor, fitted: tokenizer.SemanticIds
) -> None:
    buckets: dict[tuple[int, ...], int] = {}
    for code in fitted.codes_NQ.tolist():
        buckets[tuple(code)] = buckets.get(tuple(code), 0) + 1
    stats = tokenizer.measure(x_ND, fitted)
    assert stats.distinct == len(buckets)
    assert stats.colliding == sum(n for n in buckets.values() if n > 1)
    assert stats.largest == max(buckets.values())
    assert stats.utilisation[0] == len({code[0] for code in fitted.codes_NQ.tolist()}) / 16
    assert stats.flat()["mse_3"] == stats.mse[2]


def test_next_free_codes_leave_no_collision_while_a_prefix_has_codes(x_ND: Tensor) -> None:
    config = TokenizerConfig(method="plain", collisions="keep", codebook_size=16)
    kept = tokenizer.fit(x_ND, config, seed=0)
    free = tokenizer.fit(x_ND, config.model_copy(update={"collisions": "next_free"}), seed=0)
    assert torch.equal(kept.codes_NQ[:, :2], free.codes_NQ[:, :2])
    _, prefix_size = torch.unique(kept.codes_NQ[:, :2], dim=0, return_counts=True)
    assert int(prefix_size.max()) > 1
    stats = tokenizer.measure(x_ND, free)
    assert stats.distinct == int(prefix_size.clamp_max(16).sum())
    # The nearest item of every contested code keeps it: no id is lost.
    assert tokenizer.measure(x_ND, kept).distinct <= stats.distinct


def test_free_codes_of_a_single_level_are_refused_and_other_rules_are_not(x_ND: Tensor) -> None:
    with pytest.raises(ValidationError, match="num_levels 1 has not: choose keep or extra_digit"):
        TokenizerConfig(num_levels=1, codebook_size=16)
    for rule, levels in (("keep", 1), ("extra_digit", 2)):
        config = TokenizerConfig(num_levels=1, codebook_size=16, collisions=rule)
        assert tokenizer.fit(x_ND, config, seed=0).codes_NQ.shape[1] == levels


def test_an_extra_digit_numbers_the_items_of_the_same_codes(x_ND: Tensor) -> None:
    config = TokenizerConfig(method="plain", collisions="keep", codebook_size=16)
    kept = tokenizer.fit(x_ND, config, seed=0)
    ids = tokenizer.fit(x_ND, config.model_copy(update={"collisions": "extra_digit"}), seed=0)
    assert torch.equal(ids.codes_NQ[:, :3], kept.codes_NQ)
    # New items of the one cannot be written in the other, though the codebooks are the same.
    assert ids.version != kept.version
    by_codes: dict[tuple[int, ...], list[int]] = {}
    for *codes, number in ids.codes_NQ.tolist():
        by_codes.setdefault(tuple(codes), []).append(number)
    largest = max(len(numbers) for numbers in by_codes.values())
    assert 1 < largest <= 16
    assert all(numbers == list(range(len(numbers))) for numbers in by_codes.values())
    stats, before = tokenizer.measure(x_ND, ids), tokenizer.measure(x_ND, kept)
    assert (stats.colliding, stats.largest) == (0, 1)
    assert (stats.colliding_before, stats.largest_before) == (before.colliding, before.largest)
    assert stats.mse[:3] == before.mse
    assert stats.mse[3] == stats.mse[2]
    assert stats.moved == len(x_ND) - len(by_codes)


@pytest.mark.parametrize("method", ["plain", "in_turn", "rq_vae"])
def test_what_telling_items_apart_changed_is_measured(x_ND: Tensor, method: str) -> None:
    config = TokenizerConfig(collisions="keep", codebook_size=16, method=method)
    kept = tokenizer.fit(x_ND, config, seed=0)
    free = tokenizer.fit(x_ND, config.model_copy(update={"collisions": "next_free"}), seed=0)
    untouched, repaired = (tokenizer.measure(x_ND, ids) for ids in (kept, free))
    assert untouched.colliding > repaired.colliding
    assert untouched.moved == 0
    assert (untouched.colliding_before, untouched.largest_before) == (
        untouched.colliding,
        untouched.largest,
    )
    assert (repaired.colliding_before, repaired.largest_before) == (
        untouched.colliding,
        untouched.largest,
    )
    # Seed and codebooks are the same: what differs was moved.
    assert torch.equal(kept.quantizer.codebooks_QKD, free.quantizer.codebooks_QKD)
    assert repaired.moved == int((kept.codes_NQ != free.codes_NQ).any(1).sum()) > 0


def test_next_free_code_is_the_nearest_free_one() -> None:
    centroid = torch.tensor([[0.0], [1.0], [2.5]])
    residual = torch.tensor([[0.1], [0.3], [0.0], [0.2]])
    prefix = torch.tensor([0, 0, 0, 1])
    codes = tokenizer.next_free_codes(residual, centroid, prefix, torch.zeros(4).long())
    assert codes.tolist() == [1, 2, 0, 0]
    five = torch.zeros(5, 1)
    codes = tokenizer.next_free_codes(five, centroid, torch.zeros(5).long(), torch.zeros(5).long())
    assert codes.tolist() == [0, 1, 2, 0, 0]  # a full prefix keeps the rest


def test_same_seed_gives_the_same_bits(x_ND: Tensor) -> None:
    config = TokenizerConfig(collisions="keep", codebook_size=16, restarts=2)
    first, second = (tokenizer.fit(x_ND, config, seed=5) for _ in range(2))
    assert torch.equal(first.quantizer.codebooks_QKD, second.quantizer.codebooks_QKD)
    assert torch.equal(first.codes_NQ, second.codes_NQ)


def test_restarts_never_raise_the_first_level_error(x_ND: Tensor) -> None:
    one, four = (
        tokenizer.fit(
            x_ND, TokenizerConfig(collisions="keep", codebook_size=16, restarts=n), seed=0
        )
        for n in (1, 4)
    )
    assert tokenizer.measure(x_ND, four).mse[0] <= tokenizer.measure(x_ND, one).mse[0] * (1 + 1e-6)


@pytest.mark.parametrize("items", [200, 4_344, 7_583, 1_000_000])
def test_codebook_fits_the_catalogue(items: int) -> None:
    size = tokenizer.codebook_size_for(items, 3)
    assert size & (size - 1) == 0
    if items > 1000:
        assert size**3 >= 100 * items
        assert size <= items / 16


@pytest.mark.parametrize("items", [2, 3, 15])
def test_a_tiny_catalogue_has_a_code_an_item_and_no_collision(items: int) -> None:
    x_ND = mixture(items)
    ids = tokenizer.fit(x_ND, TokenizerConfig(), seed=0)
    assert ids.quantizer.codebooks_QKD.shape[1] == tokenizer.codebook_size_for(items, 3) == items
    assert tokenizer.measure(x_ND, ids).distinct == items


@pytest.mark.parametrize("size", [None, 2])
def test_a_catalogue_of_one_item_is_an_error_that_names_the_catalogue(size: int | None) -> None:
    with pytest.raises(DataContractError, match=r"artifact 'catalogue': a catalogue of 1 item "):
        tokenizer.fit(torch.randn(1, 4), TokenizerConfig(codebook_size=size), seed=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_an_embedding_that_is_not_finite_is_an_error_that_names_its_row(
    x_ND: Tensor, value: float
) -> None:
    broken = x_ND.clone()
    broken[7, 3] = value
    with pytest.raises(DataContractError, match=r"artifact 'aligned_embedding' row 7: 1 items"):
        tokenizer.fit(broken, TokenizerConfig(method="balanced", codebook_size=16), seed=0)


def test_more_codes_than_items_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ParamsError, match=r"64 codes a level, but only 10 items"):
        tokenizer.fit(torch.randn(10, 4), TokenizerConfig(codebook_size=64), seed=0)


def vae(**changes: Any) -> TokenizerConfig:
    own = RQVAEConfig(hidden=[32], latent=8, batch_size=128, epochs=40)
    return TokenizerConfig(
        method="rq_vae", codebook_size=16, collisions="keep", rq_vae=own.model_copy(update=changes)
    )


def test_rq_vae_learns_to_rebuild_and_uses_its_codes(x_ND: Tensor) -> None:
    before, after = (
        tokenizer.measure(x_ND, tokenizer.fit(x_ND, vae(epochs=epochs), seed=0))
        for epochs in (1, 150)
    )
    assert after.mse[-1] < 0.5 * before.mse[-1]
    assert after.mse[0] > after.mse[2]
    assert min(after.utilisation) > 0.9


def test_rq_vae_loss_is_that_of_the_equation(x_ND: Tensor) -> None:
    torch.manual_seed(0)
    model = rq_vae.RQVAE(16, 2, 4, RQVAEConfig(hidden=[8], latent=3))
    torch.nn.init.normal_(model.codebooks)
    loss, codes = model.loss(x_ND[:5], commitment=0.25)
    z = model.encoder(x_ND[:5]).detach()
    expected, residual, total = 0.0, z, torch.zeros_like(z)
    for level in range(2):
        distance = torch.cdist(residual, model.codebooks_QKD[level])
        assert torch.equal(distance.argmin(1), codes[:, level])
        chosen = model.codebooks_QKD[level][codes[:, level]]
        expected += 1.25 * float((residual - chosen).square().mean())
        residual, total = residual - chosen, total + chosen
    expected += float((model.rebuild(total) - x_ND[:5]).square().mean())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    # Straight through: the encoder learns of the error of rebuilding.
    loss, _ = model.loss(x_ND[:5], commitment=0.0)
    loss.backward()
    assert float(model.encoder[0].weight.grad.abs().max()) > 0
    assert float(model.codebooks.grad.abs().max()) > 0


def test_codes_that_nothing_chose_come_back_to_life(x_ND: Tensor) -> None:
    model = rq_vae.RQVAE(16, 2, 4, RQVAEConfig(hidden=[8], latent=3))
    torch.nn.init.normal_(model.codebooks)
    dead = model.codebooks_QKD[0, 2].clone().fill_(1e3)
    with torch.no_grad():
        model.codebooks[0, 2] = dead
    used = torch.ones(2, 4)
    used[0, 2] = 0
    kept = model.codebooks_QKD.clone()
    rq_vae._revive(model, x_ND, used, torch.Generator().manual_seed(0))
    changed = (model.codebooks_QKD != kept).any(2)
    assert changed.tolist() == [[False, False, True, False], [False] * 4]
    assert (model.codebooks_QKD[0, 2] == model.latent(x_ND)).all(1).any()


@pytest.mark.parametrize("method", ["plain", "balanced", "rq_vae"])
def test_a_quantiser_that_was_kept_encodes_new_items_as_before(x_ND: Tensor, method: str) -> None:
    config = vae() if method == "rq_vae" else TokenizerConfig(codebook_size=16, method=method)
    ids = tokenizer.fit(x_ND[:500], config, seed=0)
    kept = {name: value.clone() for name, value in ids.quantizer.state().items()}
    again = tokenizer.load(config.method, kept, config)
    new = x_ND[500:]
    assert torch.equal(tokenizer.encode(new, again), tokenizer.encode(new, ids.quantizer))
    assert torch.equal(
        tokenizer.decode(ids.codes_NQ, again), tokenizer.decode(ids.codes_NQ, ids.quantizer)
    )
    other = tokenizer.fit(x_ND[:500], config, seed=1)
    assert tokenizer.SemanticIds(again, ids.codes_NQ, ids.clustered_N).version == ids.version
    assert other.version != ids.version


def test_real_item_text_is_tokenised_with_full_use_of_the_codebooks(shared_data: Path) -> None:
    import pyarrow.parquet as pq
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.random_projection import GaussianRandomProjection

    titles = pq.read_table(shared_data / "amazon_scientific/items.parquet")["title"].to_pylist()
    hashed = HashingVectorizer(n_features=2**14).fit_transform(titles)
    x_ND = GaussianRandomProjection(48, random_state=0).fit_transform(hashed)
    x_ND = torch.from_numpy(np.ascontiguousarray(x_ND, dtype=np.float32))
    ids = tokenizer.fit(x_ND, TokenizerConfig(iterations=20, collisions="next_free"), seed=0)
    stats = tokenizer.measure(x_ND, ids)
    assert stats.utilisation[:2] == (1.0, 1.0)
    assert stats.mse[0] > stats.mse[1]
    assert stats.colliding / len(titles) < 0.05
