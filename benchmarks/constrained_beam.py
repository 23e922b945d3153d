"""Constrained beam search: the array trie against `transformers` generate with a dictionary.

The same OneRec weights decode the same requests twice in one process on one thread: by
`components.training.onerec.decode.beam_search`, and wrapped as a `transformers` encoder-decoder
whose `generate` gets the legal ids through ``prefix_allowed_tokens_fn`` (a dictionary from prefix
to codes, the common way). The reference has its own cache for keys and values and runs the encoder
once, too. Before anything is timed both must return the same ids with the same scores.

Figure: ids a second = requests × beams / seconds of one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from benchmarks.result import Result, Sample, measure

if TYPE_CHECKING:
    import numpy as np

    from components.training.onerec.data import Batch
    from components.training.onerec.decode import DeviceTrie
    from components.training.onerec.model import OneRec

SUMMARY = "constrained beam search of OneRec against transformers generate, same weights"

#: What the specification asks of the widest beam: ten times the reference.
WIDTHS = (8, 64, 512)


def run(quick: bool = False) -> list[Result]:
    """Ids a second at each beam width; ``quick`` is a small model, two widths and one repeat."""
    requests, widths, repeats = (2, (4, 16), 1) if quick else (8, WIDTHS, 5)
    with _one_thread():
        model, trie, batch, legal = _world(requests, quick)
        reference = as_transformers(model, legal)
        results = []
        for width in widths:
            check_same(model, trie, reference, batch, legal, width)
            ours, theirs = _measure_both(model, trie, reference, batch, width, repeats)
            ids = requests * width
            results.append(
                Result(
                    name=f"ids_per_second_{width}_beams",
                    ours=ids / ours.median,
                    reference=ids / theirs.median,
                    unit="ids/s",
                    low=ids / ours.high,
                    high=ids / ours.low,
                    n=ours.n,
                    higher_is_better=True,
                )
            )
    return results


def _measure_both(
    model: OneRec, trie: DeviceTrie, reference: Any, batch: Batch, width: int, repeats: int
) -> tuple[Sample, Sample]:
    from components.training.onerec.decode import beam_search

    ours = measure(lambda: beam_search(model, trie, batch, width), repeats=2 * repeats)
    theirs = measure(lambda: generate(reference, batch, width), repeats=repeats)
    return ours, theirs


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _world(requests: int, quick: bool) -> tuple[OneRec, DeviceTrie, Batch, np.ndarray]:
    """A `scientific` model with peaked probabilities, its catalogue and requests of full length.

    Every item has as many successors in the model's memory as it can keep.
    """
    import numpy as np
    import torch

    from benchmarks.synthetic_onerec import SCIENTIFIC, SMALLEST, catalogue, full_batch
    from components.training.onerec.config import OneRecConfig
    from components.training.onerec.decode import DeviceTrie
    from components.training.onerec.model import OneRec
    from components.training.onerec.trie import build_trie

    config = OneRecConfig(**(SMALLEST if quick else SCIENTIFIC))
    codes_NQ = catalogue(config.num_items, config.codebook_size, config.num_levels)
    torch.manual_seed(0)
    model = OneRec(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 2.0
    _fill_memory(model, codes_NQ, np.random.default_rng(0))
    trie = build_trie(codes_NQ, np.ones(config.num_items, np.int64))
    batch = full_batch(config, codes_NQ, requests)
    return model, DeviceTrie.on(trie), batch, trie.leaf_codes()


def _fill_memory(model: OneRec, codes_NQ: np.ndarray, rng: np.random.Generator) -> None:
    import numpy as np
    import torch

    from components.training.onerec.memory import SuccessorMemory, Successors

    memory = cast(SuccessorMemory, model.memory)
    shape = (model.config.num_items, model.config.memory.successors)
    weight_NR = -np.sort(-rng.geometric(0.3, shape), axis=1).astype(np.float32)
    item_NR = rng.integers(0, shape[0], shape).astype(np.int32)
    memory.fill(Successors(item_NR, weight_NR, weight_NR.sum(1)), codes_NQ)
    for table in memory.parameters():
        torch.nn.init.normal_(table, std=0.2)


def check_same(
    model: OneRec,
    trie: DeviceTrie,
    reference: Any,
    batch: Batch,
    legal: np.ndarray,
    width: int,
) -> None:
    """Both ways return the same ids with the same scores.

    Raises:
        AssertionError: they do not; a speed would then compare different work.
    """
    import torch

    from components.training.onerec.decode import beam_search

    ours = beam_search(model, trie, batch, width)
    sequence_BWQ, score_BW = generate(reference, batch, width)
    if not torch.allclose(ours.score_BW, score_BW, atol=1e-3):
        raise AssertionError(f"scores differ at {width} beams")
    ids_BWQ = torch.from_numpy(legal.astype("int64"))[ours.leaf_BW]
    # Two ids of nearly the same score may stand in either order, or at the edge of the beam.
    same = (ids_BWQ == sequence_BWQ).all(-1).float().mean()
    if same < 0.98:
        raise AssertionError(f"only {same:.1%} of the ids agree at {width} beams")


def generate(reference: Any, batch: Batch, width: int) -> tuple[Any, Any]:
    """Codes [B, W, Q] and scores [B, W] of `transformers` beam search."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    with torch.inference_mode():
        z_BSD, mask_B11S = reference.onerec.encode(batch)
        reference.recalled = reference.onerec.recall(batch)
        out = reference.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=z_BSD),
            attention_mask=mask_B11S[:, 0, 0].long(),
            prefix_allowed_tokens_fn=reference.allowed,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=reference.levels,
            length_penalty=0.0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    rows_BWQ = out.sequences[:, 1:].unflatten(0, (len(batch), width))
    return rows_BWQ - reference.onerec.tokens.level_start_Q, out.sequences_scores.view(-1, width)


def as_transformers(model: OneRec, legal: np.ndarray) -> Any:
    """The model behind the `transformers` interface: its decoder with a key-value cache.

    Written as the library's own encoder-decoders are: the encoder output is expanded to every beam,
    keys and values of the cross-attention are computed once and kept.
    """
    import torch
    import torch.nn.functional as F
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.cache_utils import EncoderDecoderCache
    from transformers.modeling_outputs import Seq2SeqLMOutput

    from components.training.onerec.attention import Attention
    from components.training.onerec.decoder import DecoderLayer

    levels, K, bos = model.config.num_levels, model.config.codebook_size, model.tokens.bos
    children: dict[tuple[int, ...], list[int]] = {}
    for code in legal.tolist():
        rows = [c + level * K for level, c in enumerate(code)]
        for level in range(levels):
            below = children.setdefault(tuple(rows[:level]), [])
            if not below or below[-1] != rows[level]:
                below.append(rows[level])

    class Config(PretrainedConfig):
        model_type = "onerec"

    class Reference(PreTrainedModel, GenerationMixin):
        config_class = Config
        main_input_name = "input_ids"
        _supports_cache_class = True

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.onerec = model
            self.levels = levels

        def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
            return {**inputs, "sent": input_ids}

        def allowed(self, batch_id: int, sent: Any) -> list[int]:
            return children[tuple(sent[1:].tolist())]

        def forward(
            self,
            encoder_outputs: Any = None,
            attention_mask: Any = None,
            decoder_input_ids: Any = None,
            past_key_values: Any = None,
            use_cache: bool | None = None,
            sent: Any = None,
            **kwargs: Any,
        ) -> Any:
            cache: EncoderDecoderCache = past_key_values
            level = cache.get_seq_length()
            mask = attention_mask[:, None, None].bool()
            x_BTD = self.onerec.tokens(decoder_input_ids)
            for number, module in enumerate(self.onerec.decoder):
                layer = cast(DecoderLayer, module)
                own, cross = layer.self_attention, cast(Attention, layer.cross_attention)
                normed = layer.self_norm(x_BTD)
                k, v = cache.self_attention_cache.update(*own.keys_values(normed), number)
                x_BTD = x_BTD + own(normed, (k, v))
                if cache.is_updated.get(number):
                    kept = cache.cross_attention_cache.layers[number]
                    context = (kept.keys, kept.values)
                else:
                    context = cache.cross_attention_cache.update(
                        *cross.keys_values(encoder_outputs[0]), number
                    )
                    cache.is_updated[number] = True
                x_BTD = x_BTD + cross(layer.cross_norm(x_BTD), context, mask)
                x_BTD = x_BTD + layer.ffn(layer.ffn_norm(x_BTD))
            recalled, requests = self.recalled, len(self.recalled.code_BMQ)
            level_start_Q = cast(torch.Tensor, self.onerec.tokens.level_start_Q)
            code_BWQ = (sent[:, 1:] - level_start_Q[:level]).unflatten(0, (requests, -1))
            for above in range(level):
                recalled = recalled.follow(None, code_BWQ[..., above], above)
            x_BWD = self.onerec.decoder_norm(x_BTD)[:, 0].unflatten(0, (requests, -1))
            logits = self.onerec.logits(x_BWD, level, recalled).flatten(0, 1)[:, None]
            # A level's codes are a slice of the vocabulary; the softmax is over that slice alone.
            after = levels * K + 1 - (level + 1) * K
            logits = F.pad(logits, (level * K, after), value=-torch.inf)
            return Seq2SeqLMOutput(logits=logits, past_key_values=cache)

    config = Config(
        is_encoder_decoder=True,
        vocab_size=levels * K + 1,
        decoder_start_token_id=bos,
        pad_token_id=bos,
        eos_token_id=None,
        bos_token_id=None,
        num_hidden_layers=len(model.decoder),
    )
    return Reference(config).eval()
