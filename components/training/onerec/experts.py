"""A mixture of experts as a feed-forward, balanced without a loss (arXiv 2506.13695, section 2.3).

Cost follows the experts that are active: positions are sorted by expert and every expert multiplies
its own contiguous slice, without padding and without a capacity that drops positions. The balance
is that of arXiv 2412.19437: a bias decides with the affinity who is chosen, never how much the
chosen weigh, and no gradient reaches it.

Shapes: B batch, T positions, N = B · T, k active experts, M = N · k, D width, E experts, F hidden
width of an expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig

#: Hidden widths are rounded up to it.
HIDDEN_MULTIPLE = 128
#: Rows of a grouped product must start at multiples of sixteen bytes.
GROUPED_MULTIPLE = 8


def expert_hidden(d_model: int) -> int:
    """``(2/3) · 4 · d_model``, rounded up to a multiple of 128: 2816 at width 1024."""
    return -(-(8 * d_model) // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE


def has_experts(config: OneRecConfig, part: Literal["encoder", "decoder"], layer: int) -> bool:
    """Whether a layer's feed-forward is a mixture; every ``moe_every``-th is, the last one first.

    Args:
        layer: counted from 0 in its part of the model.
    """
    if not config.experts or (part == "encoder" and config.moe_in == "decoder"):
        return False
    layers = config.encoder_layers if part == "encoder" else config.decoder_layers
    return (layers - 1 - layer) % config.moe_every == 0


class MixtureOfExperts(nn.Module):
    """``Σ_{j ∈ top-k} Gate_j(x) · Expert_j(x)`` with SwiGLU experts.

    Affinities are ``σ(x · w_e)``, or with ``gating: softmax`` a softmax over all experts; chosen
    are the k largest of affinity + bias, and their affinities divided by their sum are the gates.
    With a bias of zero and softmax this is the sparse block of Mixtral (arXiv 2401.04088).

    Attributes:
        bias_E: float32 selection bias, a buffer: in checkpoints, without gradient.
        load_E: float32, positions of each expert since the last `balance`, counted in training
            alone.
    """

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        E, D, hidden = config.experts, config.d_model, expert_hidden(config.d_model)
        self.active, self.gating = config.active_experts, config.gating
        self.router = nn.Parameter(torch.empty(E, D))
        self.gate_up = nn.Parameter(torch.empty(E, 2 * hidden, D))
        self.down = nn.Parameter(torch.empty(E, D, hidden))
        self.down.is_residual = True  # type: ignore[attr-defined]
        self.register_buffer("bias_E", torch.zeros(E))
        self.register_buffer("load_E", torch.zeros(E), persistent=False)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Experts int64 [N, k] of every position and their gates float32 [N, k], of sum 1."""
        # Nearly equal affinities decide who computes: in half precision they would be equal.
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = x_ND.float() @ self.router.float().T
        affinity_NE = logits_NE.sigmoid() if self.gating == "sigmoid" else logits_NE.softmax(-1)
        chosen_Nk = (affinity_NE.detach() + self.bias_E).topk(self.active, dim=-1).indices
        gate_Nk = affinity_NE.gather(1, chosen_Nk)
        return chosen_Nk, gate_Nk / gate_Nk.sum(-1, keepdim=True)

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """The mixture of each position: float [B, T, D].

        Args:
            real_BT: bool; other positions are padding and count in no load. None: all are real.
        """
        x_ND = x_BTD.flatten(0, -2)
        chosen_Nk, gate_Nk = self.route(x_ND)
        expert_M, order_M = chosen_Nk.flatten().sort(stable=True)
        # Found by search and not by counting: `bincount` makes a GPU's host wait.
        experts_E = torch.arange(len(self.router), device=x_ND.device)
        end_E = torch.searchsorted(expert_M, experts_E, right=True, out_int32=True)
        if self.training:
            with torch.no_grad():
                if real_BT is None:
                    self.load_E += end_E.diff(prepend=end_E.new_zeros(1))
                else:
                    real_Nk = real_BT.flatten()[:, None].expand_as(chosen_Nk)
                    self.load_E.index_add_(0, chosen_Nk.flatten(), real_Nk.flatten().float())
        sorted_MD = x_ND.index_select(0, order_M // self.active)
        y_MD = grouped_experts(sorted_MD, self.gate_up, self.down, end_E)
        y_NkD = y_MD.index_select(0, order_M.argsort()).unflatten(0, (-1, self.active))
        return (gate_Nk[..., None].to(y_NkD.dtype) * y_NkD).sum(1).view_as(x_BTD)

    @torch.no_grad()
    def balance(self, rate: float) -> Tensor:
        """``b_e ← b_e + γ · sign(mean_load − load_e)`` with the loads since the last call.

        With a process group, loads are summed over its processes, so all take the same step.

        Args:
            rate: γ; 0 leaves the bias as it is.

        Returns:
            the largest load over the mean load, a scalar on the device; 1 is perfect balance.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.load_E)
        mean = self.load_E.mean()
        self.bias_E += rate * (mean - self.load_E).sign()
        # Where nothing was counted nothing is uneven.
        ratio = torch.where(mean > 0, self.load_E.max() / mean, 1.0)
        self.load_E.zero_()
        return ratio


def grouped_experts(x_MD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, end_E: Tensor) -> Tensor:
    """SwiGLU of every position by its expert: float [M, D].

    Args:
        x_MD: positions in the order of their experts.
        end_E: int32, one past each expert's last position.
    """
    if x_MD.is_cuda and torch.is_autocast_enabled("cuda"):
        kind = torch.get_autocast_dtype("cuda")
        x_MD, gate_up_E2FD, down_EDF = (w.to(kind) for w in (x_MD, gate_up_E2FD, down_EDF))
    narrow = any(width % GROUPED_MULTIPLE for width in down_EDF.shape[1:])
    if not x_MD.is_cuda or x_MD.dtype != torch.bfloat16 or narrow or not hasattr(F, "grouped_mm"):
        return expert_by_expert(x_MD, gate_up_E2FD, down_EDF, end_E)
    return all_experts_at_once(x_MD, gate_up_E2FD, down_EDF, end_E)


def all_experts_at_once(
    x_MD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, end_E: Tensor
) -> Tensor:
    """Two grouped products; the host need not know how many positions an expert has."""
    gate_MF, up_MF = F.grouped_mm(x_MD, gate_up_E2FD.mT, offs=end_E).chunk(2, -1)
    return F.grouped_mm(F.silu(gate_MF) * up_MF, down_EDF.mT, offs=end_E)


def expert_by_expert(x_MD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, end_E: Tensor) -> Tensor:
    """Two products for each expert that has positions."""
    counts = end_E.diff(prepend=end_E.new_zeros(1)).tolist()
    slices = x_MD.split(counts)
    # Unbound once: an index for each expert would fill a gradient as large as all of them.
    weights = zip(gate_up_E2FD.unbind(), down_EDF.unbind(), strict=True)
    parts = []
    for x_mD, (gate_up_2FD, down_DF) in zip(slices, weights, strict=True):
        if len(x_mD):
            gate_mF, up_mF = F.linear(x_mD, gate_up_2FD).chunk(2, -1)
            parts.append(F.linear(F.silu(gate_mF) * up_mF, down_DF))
    return torch.cat(parts)


def balance_experts(model: nn.Module, rate: float) -> Tensor | None:
    """Balance every mixture of a model after a step of its optimiser.

    Returns:
        the mean over the mixtures of the largest over the mean load, a scalar on the device; None
        if the model has no mixture.
    """
    ratios = [m.balance(rate) for m in model.modules() if isinstance(m, MixtureOfExperts)]
    return torch.stack(ratios).mean() if ratios else None
