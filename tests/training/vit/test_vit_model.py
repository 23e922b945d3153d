"""Claims about the vision transformer: its parts, what depends on what, its counts, its peer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from components.training.vit.config import SIZES, VitConfig
from components.training.vit.flops import image_flops, parameters
from components.training.vit.model import Attention, Mlp, StochasticDepth, Vit

SMALL = VitConfig(image_size=12, patch=4, d_model=24, heads=3, layers=3, mlp=40, classes=7)


@pytest.fixture
def model() -> Vit:
    """Fresh, with biases and norms that are not those of a fresh one."""
    torch.manual_seed(0)
    model = Vit(SMALL).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    return model


def images(count: int = 5, config: VitConfig = SMALL) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = config.image_size
    return torch.randn(count, config.channels, size, size, generator=generator)


def on_meta(config: VitConfig) -> Vit:
    with torch.device("meta"):
        return Vit(config)


# Architecture


def test_features_are_what_the_last_layer_reads(model: Vit) -> None:
    logit_BK, feature_BD = model(images(), with_feature=True)
    assert logit_BK.shape == (5, 7)
    assert feature_BD.shape == (5, 24)
    assert torch.equal(model.head(feature_BD), logit_BK)
    assert torch.equal(model(images()), logit_BK)


def test_weights_begin_as_truncated_normals() -> None:
    torch.manual_seed(0)
    model = Vit(SIZES["cifar"])
    # Cut off at two standard deviations, a normal has 0.88 of its own.
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float("weight" in name))), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            std = 48**-0.5 if name == "patches.weight" else 0.02
            assert parameter.abs().max() <= 2 * std, name
            assert float(parameter.detach().std()) == pytest.approx(0.88 * std, rel=0.2), name
    x_BND = model.embed(images(64, SIZES["cifar"]))
    assert float(x_BND[:, 1:].detach().std()) == pytest.approx(0.88, rel=0.05)


def test_an_image_knows_nothing_of_the_others(model: Vit) -> None:
    image_BCHW = images().requires_grad_()
    logit_BK = model(image_BCHW)
    logit_BK[2].sum().backward()
    assert image_BCHW.grad is not None
    seen_B = image_BCHW.grad.flatten(1).abs().sum(1)
    assert seen_B[2] > 0
    assert not seen_B[[0, 1, 3, 4]].any()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(model(images()[order]), logit_BK[order])
    torch.testing.assert_close(model(images()[1:2]), logit_BK[1:2])


def test_every_pixel_counts(model: Vit) -> None:
    image_BCHW = images(1).requires_grad_()
    model(image_BCHW).square().sum().backward()
    assert image_BCHW.grad is not None
    assert (image_BCHW.grad != 0).all()


def test_patches_are_read_row_by_row(model: Vit) -> None:
    image_BCHW = images(2)
    tokens_BND = model.embed(image_BCHW)
    for n, (row, column) in enumerate([(0, 0), (0, 4), (0, 8), (4, 0), (4, 4)], 1):
        patch_BE = image_BCHW[:, :, row : row + 4, column : column + 4].flatten(1)
        torch.testing.assert_close(tokens_BND[:, n], model.patches(patch_BE) + model.position[n])


def test_order_is_known_by_positions_alone(model: Vit) -> None:
    image_BCHW, turned = images(2), images(2)
    turned[:, :, :4], turned[:, :, 4:8] = image_BCHW[:, :, 4:8], image_BCHW[:, :, :4]
    before = model(image_BCHW)
    assert not torch.allclose(model(turned), before, atol=1e-3)
    # Rows of patches 0 and 1 change places, and so do their positions.
    order = torch.tensor([0, 4, 5, 6, 1, 2, 3, 7, 8, 9])
    model.position.data = model.position.data[order]
    torch.testing.assert_close(model(turned), before)


def test_branches_do_not_know_how_many_tokens_there_are(model: Vit) -> None:
    x_BND = model.embed(images())[:, [0, 2, 5, 7]]
    for block in model.blocks:
        x_BND = block(x_BND)
    assert model.feature(x_BND).shape == (5, 24)


def test_blocks_are_those_of_pytorch(model: Vit) -> None:
    theirs = nn.TransformerEncoderLayer(
        24, 3, 40, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    ours: Any = model.blocks[0]
    read = (ours.attention.query, ours.attention.key, ours.attention.value)
    state = {
        "self_attn.in_proj_weight": torch.cat([part.weight for part in read]),
        "self_attn.in_proj_bias": torch.cat([part.bias for part in read]),
    }
    pairs = {
        "self_attn.out_proj": ours.attention.proj,
        "norm1": ours.attention.norm,
        "norm2": ours.mlp.norm,
        "linear1": ours.mlp.fc1,
        "linear2": ours.mlp.fc2,
    }
    for name, part in pairs.items():
        state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    theirs.load_state_dict(state)
    x_BND = torch.randn(2, 10, 24)
    torch.testing.assert_close(ours(x_BND), theirs.train()(x_BND), rtol=1e-5, atol=1e-5)


def test_logits_are_those_of_transformers(model: Vit) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=12,
        patch_size=4,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        num_labels=7,
        layer_norm_eps=1e-6,
    )
    theirs = transformers.ViTForImageClassification(config).eval()
    names = {
        "patches": "vit.embeddings.patch_embeddings.projection",
        "cls": "vit.embeddings.cls_token",
        "position": "vit.embeddings.position_embeddings",
        "norm": "vit.layernorm",
        "head": "classifier",
        "blocks": "vit.layers",
        "attention.norm": "layernorm_before",
        "mlp.norm": "layernorm_after",
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "proj": "o_proj",
    }
    own = theirs.state_dict()
    given = {}
    for name, value in model.state_dict().items():
        for ours in ("attention.norm", "mlp.norm"):
            name = name.replace(ours, names[ours])
        renamed = ".".join(names.get(part, part) for part in name.split("."))
        given[renamed] = value.view_as(own[renamed])
    theirs.load_state_dict(given)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images()), theirs(pixel_values=images()).logits, rtol=1e-5, atol=1e-5
        )


# Cuts


def cut(linear: nn.Linear, rows: list[int] | None = None, columns: list[int] | None = None) -> None:
    """Keep some outputs or some inputs of a linear layer."""
    if rows is not None:
        linear.weight.data, linear.bias.data = linear.weight.data[rows], linear.bias.data[rows]
    if columns is not None:
        linear.weight.data = linear.weight.data[:, columns]
    linear.out_features, linear.in_features = linear.weight.shape


def test_a_head_is_its_rows_and_columns(model: Vit) -> None:
    attention: Any = model.blocks[1].attention
    gone, kept = range(8, 16), [*range(8), *range(16, 24)]
    attention.proj.weight.data[:, gone] = 0
    masked = model(images())
    for part in (attention.query, attention.key, attention.value):
        cut(part, rows=kept)
    cut(attention.proj, columns=kept)
    torch.testing.assert_close(model(images()), masked, rtol=1e-5, atol=1e-5)


def test_a_neuron_is_its_row_and_column(model: Vit) -> None:
    mlp: Any = model.blocks[1].mlp
    kept = [n for n in range(40) if n % 3]
    mlp.fc2.weight.data[:, ::3] = 0
    masked = model(images())
    cut(mlp.fc1, rows=kept)
    cut(mlp.fc2, columns=kept)
    torch.testing.assert_close(model(images()), masked, rtol=1e-5, atol=1e-5)


def test_a_branch_without_output_is_none(model: Vit) -> None:
    block: Any = model.blocks[1]
    for last in (block.attention.proj, block.mlp.fc2):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    with_it = model(images())
    del model.blocks[1]
    assert torch.equal(model(images()), with_it)


def test_a_cut_model_is_counted_as_it_is(model: Vit) -> None:
    whole = image_flops(model)
    attention: Any = model.blocks[1].attention
    for part in (attention.query, attention.key, attention.value):
        cut(part, rows=[*range(8)])
    cut(attention.proj, columns=[*range(8)])
    left = image_flops(model)
    assert left.attention_L[1] * 3 == whole.attention_L[1]
    assert whole.forward - left.forward == whole.attention_L[1] - left.attention_L[1]
    assert counted(model, images()) == 5 * left.forward


# Randomness in training


def test_stochastic_depth_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    depth = StochasticDepth(0.25).train()
    out_BND = depth(torch.ones(4000, 2, 3))
    by_sample_B = out_BND[:, 0, 0]
    assert torch.equal(out_BND, by_sample_B[:, None, None].expand_as(out_BND))
    assert set(by_sample_B.tolist()) == {0.0, by_sample_B.max().item()}
    # Four standard errors of a share of 4000.
    assert (by_sample_B == 0).double().mean() == pytest.approx(0.25, abs=0.028)
    assert out_BND.mean() == pytest.approx(1.0, abs=0.04)
    assert torch.equal(depth.eval()(torch.ones(2, 2, 3)), torch.ones(2, 2, 3))


def test_depth_of_skipping_rises_from_nothing() -> None:
    config = SMALL.model_copy(update={"stochastic_depth": 0.4})
    single = config.model_copy(update={"layers": 1})
    rates = [
        [part.rate for part in Vit(c).modules() if isinstance(part, StochasticDepth)]
        for c in (config, single)
    ]
    assert rates == [pytest.approx([0, 0.2, 0.4]), [0]]


@pytest.mark.parametrize("rates", [{"dropout": 0.3}, {"stochastic_depth": 0.5}])
def test_training_is_random_and_evaluation_is_not(rates: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = Vit(SMALL.model_copy(update=rates))
    assert not torch.equal(model.train()(images()), model(images()))
    assert torch.equal(model.eval()(images()), model(images()))


# Counts


def counted(model: Vit, image_BCHW: Tensor) -> int:
    """Operations that PyTorch's counter sees; of a fused kernel it would see none."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image_BCHW)
    return counter.get_total_flops()


@pytest.mark.parametrize("size", ["cifar", "deit_tiny"])
def test_operations_are_those_of_pytorchs_counter(size: str) -> None:
    config = SIZES[size]
    assert (
        counted(Vit(config).eval(), images(2, config)) == 2 * image_flops(on_meta(config)).forward
    )


@pytest.mark.parametrize(
    ("size", "published", "exact", "gmacs"),
    [
        ("deit_tiny", 5.7e6, 5_717_416, 1.26),
        ("deit_small", 22e6, 22_050_664, 4.60),
        ("deit_base", 86e6, 86_567_656, 17.56),
    ],
)
def test_named_sizes_are_the_published_ones(
    size: str, published: float, exact: int, gmacs: float
) -> None:
    """Table 1 of arXiv 2012.12877; exact counts are those of the released models."""
    model = on_meta(SIZES[size])
    assert parameters(model) == exact == pytest.approx(published, rel=0.01)
    assert image_flops(model).macs / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert model.config.tokens == 197


def test_a_block_of_deit_small_has_the_branches_of_the_formula() -> None:
    flops = image_flops(on_meta(SIZES["deit_small"]))
    assert flops.attention_L == (2 * (4 * 197 * 384 * 384 + 2 * 197**2 * 384),) * 12
    assert flops.mlp_L == (2 * 2 * 197 * 384 * 1536,) * 12
    assert flops.patches == 2 * 196 * 384 * 768


def test_branches_are_modules_of_their_own() -> None:
    block: Any = on_meta(SIZES["cifar"]).blocks[0]
    assert isinstance(block.attention, Attention)
    assert isinstance(block.mlp, Mlp)
    branches = parameters(block.attention) + parameters(block.mlp)
    assert branches == parameters(block)


@pytest.mark.parametrize("wrong", [{"heads": 5}, {"patch": 5}])
def test_sizes_that_do_not_divide_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        VitConfig(**wrong)
