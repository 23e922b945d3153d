"""Claims about networks of cells: what they compute, what they cost, how they are trained."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from components.curation.asp.asp_r import AspR
from components.curation.asp.config import AspConfig, ScheduleConfig
from components.curation.asp.draw import generator, shuffled
from components.curation.asp.evaluator import ProxyEvaluator
from components.curation.asp.nas_cell import Architecture, all_architectures
from components.curation.asp.nas_network import Cell, Pool, build, convolution, cost
from components.curation.asp.nas_train import CellTrainer, Labelled, accuracy, cosine
from components.curation.asp.rules import Even
from components.curation.asp.sampler import Sampler
from components.curation.asp.schedule import Schedule

NONE, SKIP, ONE, THREE, POOL = (
    "none",
    "skip_connect",
    "nor_conv_1x1",
    "nor_conv_3x3",
    "avg_pool_3x3",
)
TRAIN, EPOCHS, BATCH = 300, 2, 32


def images(seed: int = 0, channels: int = 4) -> Tensor:
    return torch.randn(5, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("operations", "times"),
    [
        ((NONE, SKIP, NONE), 1),
        ((SKIP, NONE, SKIP), 1),
        ((SKIP, SKIP, SKIP), 2),
        ((SKIP, SKIP, NONE, SKIP, SKIP, SKIP), 3),
        ((NONE,) * 3, 0),
        ((THREE, NONE, NONE), 0),
        ((NONE, NONE, SKIP), 0),
    ],
)
def test_skips_carry_the_input_and_none_carries_nothing(
    operations: tuple[str, ...], times: int
) -> None:
    cell = Cell(Architecture(operations), 4)
    assert torch.equal(cell(images()), times * images())
    assert not list(cell.parameters())


def test_a_convolution_is_relu_convolution_and_normalisation() -> None:
    torch.manual_seed(0)
    for kernel, stride in ((1, 1), (3, 1), (3, 2)):
        layer = convolution(4, 6, kernel, stride)
        norm = layer[2]
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        x_BCHW = images()
        by_hand = F.conv2d(x_BCHW.clamp(min=0), layer[1].weight, None, stride, kernel // 2)
        mean, variance = by_hand.mean((0, 2, 3)), by_hand.var((0, 2, 3), unbiased=False)
        scale, shift = norm.weight / (variance + norm.eps).sqrt(), norm.bias
        by_hand = (by_hand - mean[:, None, None]) * scale[:, None, None] + shift[:, None, None]
        torch.testing.assert_close(layer(x_BCHW), by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("edge", [1, 2, 4, 8])
def test_pooling_is_that_of_pytorch_without_the_border(edge: int) -> None:
    x_BCHW = images()[:, :, :edge, :edge].contiguous()
    theirs = nn.AvgPool2d(3, 1, 1, count_include_pad=False)(x_BCHW)
    torch.testing.assert_close(Pool(4)(x_BCHW), theirs)


@pytest.mark.parametrize("operations", [(THREE, ONE, POOL), (POOL, SKIP, THREE), (ONE, NONE, SKIP)])
def test_a_node_sums_what_its_edges_bring(operations: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    cell = Cell(Architecture(operations), 4).eval()

    def along(edge: str, x_BCHW: Tensor) -> Tensor:
        return cell.edges[edge](x_BCHW) if edge in cell.edges else torch.zeros_like(x_BCHW)

    x_BCHW = images()
    by_hand = along("0-2", x_BCHW) + along("1-2", along("0-1", x_BCHW))
    assert torch.equal(cell(x_BCHW), by_hand)


def test_a_convolution_of_nothing_is_its_bias_alone() -> None:
    cell = Cell(Architecture((NONE, NONE, THREE)), 4)
    nn.init.ones_(cell.edges["1-2"][2].bias)
    assert torch.equal(cell(images()), torch.ones(5, 4, 8, 8))


@pytest.mark.parametrize("operations", [(NONE,) * 3, (THREE, NONE, NONE), (NONE, NONE, ONE)])
def test_where_nothing_passes_logits_do_not_depend_on_the_image(
    operations: tuple[str, ...],
) -> None:
    network = build(Architecture(operations), 4, 7).eval()
    output = network(images(channels=3))
    assert output.logit_BK.shape == (5, 7)
    assert torch.equal(output.logit_BK, output.logit_BK[:1].expand(5, 7))
    assert torch.equal(network(images(1, 3)).logit_BK, output.logit_BK)


def test_features_are_what_the_last_layer_reads() -> None:
    network = build(Architecture((THREE, SKIP, POOL)), 4, 7)
    output = network(images(channels=3))
    assert output.feature_BD.shape == (5, 16)
    assert output.feature_BD.min() >= 0
    assert torch.equal(network.head(output.feature_BD), output.logit_BK)


def test_costs_are_counted() -> None:
    # Stem, two reductions and the head, for 16 × 16 pixels, by hand.
    parameters = (27 * 16 + 32) + (9 * 16 * 32 + 64) + (9 * 32 * 64 + 128) + 128 + (640 + 10)
    flops = 27 * 16 * 256 + 9 * 16 * 32 * 64 + 9 * 32 * 64 * 16 + 640
    assert cost(build(Architecture((THREE, SKIP, NONE))), 16) == (parameters, flops)
    assert cost(build(Architecture((NONE, POOL, NONE))), 16) == (parameters, flops)
    convolved = cost(build(Architecture((NONE, THREE, NONE))), 16)
    more = 9 * (16**2 + 32**2 + 64**2)
    assert convolved.parameters == parameters + more + 2 * (16 + 32 + 64)
    assert convolved.flops == flops + 9 * (16**2 * 256 + 32**2 * 64 + 64**2 * 16)


def test_costs_are_those_of_the_counter_of_pytorch() -> None:
    for cell in [c for c in all_architectures(3) if POOL not in c.operations][::9]:
        network = build(cell, 4)
        with FlopCounterMode(display=False) as counter:
            network.eval()(torch.zeros(1, 3, 8, 8))
        assert cost(network, 8).flops == counter.get_total_flops() // 2
        assert not network.training
        assert cost(network, 8).parameters == sum(p.numel() for p in network.parameters())


def digits() -> tuple[Labelled, Labelled]:
    x, y = load_digits(return_X_y=True)
    x_NCHW = torch.from_numpy(x / 8 - 1).float().view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    y_N = torch.from_numpy(y)
    cut = TRAIN + 200
    return Labelled(x_NCHW[:TRAIN], y_N[:TRAIN]), Labelled(x_NCHW[TRAIN:cut], y_N[TRAIN:cut])


def of_ratio(ratio: float, seed: int = 0, epochs: int = EPOCHS) -> Even:
    return Even(Schedule.of(ScheduleConfig(ratio=ratio), TRAIN, epochs), seed)


@pytest.mark.parametrize("mirrored", [False, True])
def test_all_data_is_plain_training(mirrored: bool) -> None:
    """The loop written again, without a rule: the same numbers up to the order of sums."""
    cell = Architecture((THREE, SKIP, POOL))
    train, valid = digits()
    trainer = CellTrainer(train, valid, 10, channels=4, mirrored=mirrored)
    ours = trainer.fit(cell, Sampler(of_ratio(1.0, seed=3), BATCH))
    torch.manual_seed(3)
    theirs = build(cell, 4)
    optimiser = torch.optim.SGD(
        theirs.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = EPOCHS * -(-TRAIN // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(1, EPOCHS + 1):
        x_NCHW = train.x_NCHW.clone()
        behind_N = torch.from_numpy(generator(3, epoch, "mirror").random(TRAIN) < 0.5)
        if mirrored:
            x_NCHW[behind_N] = x_NCHW[behind_N].flip(3)
        order = torch.from_numpy(shuffled(torch.arange(TRAIN).numpy(), 3, epoch))
        for index_B in order.split(BATCH):
            optimiser.zero_grad()
            loss = F.cross_entropy(theirs(x_NCHW[index_B]).logit_BK, train.target_N[index_B])
            loss.backward()
            optimiser.step()
            schedule.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Twenty steps at a high rate let differences of rounding grow.
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_a_proxy_trains_on_its_subsets_and_learns() -> None:
    train, valid = digits()
    trainer = CellTrainer(train, valid, 10, channels=4, mirrored=False)
    config = AspConfig(signals={"grand_last": 1.0})
    told: list[tuple[float, int]] = []
    schedule = Schedule.of(ScheduleConfig(ratio=0.5), TRAIN, 10)
    evaluator = ProxyEvaluator(trainer, lambda seed: AspR(schedule, seed, config=config), BATCH)
    before = torch.get_rng_state()
    outcome = evaluator(
        {"architecture": str(Architecture((THREE, SKIP, NONE)))},
        1,
        lambda metric, samples: told.append((metric, samples)),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert outcome.samples == 10 * TRAIN // 2
    assert told == [(outcome.metric, outcome.samples)]
    assert 50 < outcome.metric <= 100


def test_a_training_is_a_function_of_the_seed_of_its_rule() -> None:
    train, valid = digits()
    trainer = CellTrainer(train, valid, 10, channels=4)
    cell = Architecture((NONE, THREE, NONE))

    def trained(seed: int) -> Tensor:
        network = trainer.fit(cell, Sampler(of_ratio(0.2, seed, epochs=1), BATCH))
        return copy.deepcopy(network.head.weight.detach())

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_accuracy_is_a_percentage_of_all_images() -> None:
    network = build(Architecture((NONE,) * 3), 4)
    with torch.no_grad():
        network.head.bias.copy_(torch.arange(10.0))
        network.head.weight.zero_()
    target_N = torch.arange(2_500) % 10
    data = Labelled(torch.zeros(2_500, 3, 4, 4), target_N)
    assert accuracy(network, data) == 10.0
    assert network.training


def test_the_learning_rate_falls_from_all_to_nothing() -> None:
    assert cosine(0) == 1
    assert cosine(0.5) == pytest.approx(0.5)
    assert cosine(1) == 0
