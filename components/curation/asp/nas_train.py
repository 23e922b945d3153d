"""Trains the network of a cell on the subsets of a rule: one loop for proxies and for all data.

SGD with Nesterov's momentum and a cosine to 0, as in NAS-Bench-201 (arXiv 2001.00326), over the
steps that are really taken. Images may be mirrored, by lot for each sample and epoch.

Shapes: N samples, B batch, C colours, H, W edges of the image, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from components.curation.asp.draw import generator
from components.curation.asp.evaluator import Candidate, Report
from components.curation.asp.nas_cell import Architecture
from components.curation.asp.nas_network import CellNetwork, build
from components.curation.asp.sampler import Sampler
from components.curation.asp.signals import Forward

#: Images that are judged at once.
JUDGED = 1000


@dataclass(frozen=True)
class Labelled:
    """Images with their classes.

    Attributes:
        x_NCHW: float32, standardised.
        target_N: int64.
    """

    x_NCHW: Tensor
    target_N: Tensor


@dataclass(frozen=True)
class CellTrainer:
    """Trains cells; a `Train` of `ProxyEvaluator`, whose candidates have an ``architecture``.

    Attributes:
        train: what the rule selects from.
        valid: what candidates are ranked by.
        channels: of the first stage.
        learning_rate: of the first step.
        mirrored: half of the images of an epoch are seen from behind.
    """

    train: Labelled
    valid: Labelled
    classes: int
    channels: int = 16
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    mirrored: bool = True

    def __call__(self, candidate: Candidate, sampler: Sampler, report: Report) -> float:
        """Validation accuracy in percent, after the last epoch; it is also reported."""
        network = self.fit(Architecture.parse(candidate["architecture"]), sampler)
        reached = accuracy(network, self.valid)
        report(reached, sampler.samples)
        return reached

    def fit(self, architecture: Architecture, sampler: Sampler) -> CellNetwork:
        """A network trained through all epochs; the rule's seed makes its first weights.

        Raises:
            StageError: training diverged, and the rule noticed.
        """
        x_NCHW, target_N = self.train.x_NCHW, self.train.target_N
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sampler.selector.seed)
            network = build(architecture, self.channels, self.classes)
        network.to(x_NCHW.device).train()
        # On a processor a third of the time is saved by keeping the colours of a pixel together.
        convert_conv2d_weight_memory_format(network, torch.channels_last)
        optimiser = torch.optim.SGD(
            network.parameters(),
            self.learning_rate,
            self.momentum,
            weight_decay=self.weight_decay,
            nesterov=True,
        )
        steps, step = sampler.selector.schedule.steps(sampler.batch_size), 0
        for epoch in sampler.epochs():
            lot_N = generator(sampler.selector.seed, epoch.number, "mirror").random(len(target_N))
            behind_N = torch.from_numpy(lot_N < 0.5 * self.mirrored).to(target_N.device)
            for batch in epoch:
                for group in optimiser.param_groups:
                    group["lr"] = self.learning_rate * cosine(step / steps)
                index_B = torch.from_numpy(batch.index_b).to(target_N.device)
                x_BCHW, target_B = x_NCHW[index_B], target_N[index_B]
                behind_B111 = behind_N[index_B, None, None, None]
                output = network(torch.where(behind_B111, x_BCHW.flip(3), x_BCHW))
                loss_B = F.cross_entropy(output.logit_BK, target_B, reduction="none")
                weight_B = torch.from_numpy(batch.weight_b).to(loss_B.device)
                optimiser.zero_grad()
                ((loss_B * weight_B).sum() / batch.size).backward()
                optimiser.step()
                seen = Forward(output.logit_BK.detach(), target_B, output.feature_BD.detach())
                epoch.record(batch, seen)
                step += 1
            epoch.finish()
        return network


def cosine(passed: float) -> float:
    """Share of the learning rate after a share of the steps."""
    return (1 + math.cos(math.pi * passed)) / 2


@torch.no_grad()
def accuracy(network: CellNetwork, data: Labelled) -> float:
    """Share of right classes in percent, with the moments of training."""
    was_training = network.training
    network.eval()
    right = 0
    for x_BCHW, target_B in zip(
        data.x_NCHW.split(JUDGED), data.target_N.split(JUDGED), strict=True
    ):
        right += int((network(x_BCHW).logit_BK.argmax(1) == target_B).sum())
    network.train(was_training)
    return 100 * right / len(data.target_N)
