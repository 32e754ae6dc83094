"""`generate` on CUDA: the decode loop of greedy search and sampling as replays of one graph (see ``moe.decoding``).

What the graph does not cover (beams, streaming, returned scores, a cache that goes on living, ...) takes transformers'
own loop, unasked.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, StaticCache

try:
    from moe import decoding
except ImportError:  # no Triton
    decoding = None  # type: ignore[assignment]

CHECK_EVERY = 16  # steps between two looks at whether all sequences have ended

# Graphs hold memory and may not be copied or saved with the model.
_decoders: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class GraphedGeneration(GenerationMixin):
    """The loop of ``generate``, replaced where a captured step serves; the results are those of the original."""

    @torch.no_grad()
    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        plain = not synced_gpus and streamer is None
        if not (plain and _serves(self, input_ids, stopping_criteria, generation_config, model_kwargs)):
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        outputs = self._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        stop = _stop_tokens(stopping_criteria)
        decoder = _decoder(self, input_ids.shape[0], stopping_criteria.max_length, stop)
        sampled = bool(generation_config.do_sample) or len(logits_processor) > 0
        decoder.prepare(sampled)
        pad = generation_config._pad_token_tensor
        mask_BS = model_kwargs.get("attention_mask")
        mask_BS = torch.ones_like(input_ids) if mask_BS is None else mask_BS
        decoder.start(outputs.past_key_values, input_ids, mask_BS, 0 if pad is None else int(pad))
        choose = _Chooser(logits_processor, generation_config.do_sample)
        decoder.append(choose(input_ids, outputs.logits[:, -1]))
        return _run(decoder, choose if sampled else None, input_ids.shape[1] + 1, stopping_criteria.max_length)


class _Chooser:
    """The next token from logits, as transformers' loop draws it."""

    def __init__(self, logits_processor: Any, do_sample: bool) -> None:
        self.logits_processor, self.do_sample = logits_processor, do_sample

    def __call__(self, ids_BS: Tensor, logits_BV: Tensor) -> Tensor:
        scores_BV = self.logits_processor(ids_BS, logits_BV.to(copy=True, dtype=torch.float32))
        if self.do_sample:
            return torch.multinomial(scores_BV.softmax(-1), num_samples=1).squeeze(1)
        return scores_BV.argmax(-1)


def _run(decoder: Any, choose: _Chooser | None, have: int, want: int) -> Tensor:
    """Steps until every sequence has ended or is full; looks at the device only now and then."""
    first = have
    while have < want:
        if decoder.stop and (have - first) % CHECK_EVERY == 0 and bool(decoder.finished_T.all()):
            break
        decoder.step(choose is not None)
        if choose is not None:
            decoder.append(choose(decoder.ids_TL[:, :have], decoder.logits_TV))
        have += 1
    ids_BL = decoder.ids_TL[:, :have].clone()
    return ids_BL[:, : _length(ids_BL, first, decoder.stop)] if decoder.stop else ids_BL


def _length(ids_BL: Tensor, first: int, stop: tuple[int, ...]) -> int:
    """Where transformers' loop would have ended: right after the last sequence to meet a stop token."""
    new_BN = ids_BL[:, first - 1 :]
    ended_BN = torch.isin(new_BN, torch.tensor(stop, device=ids_BL.device)).cumsum(1) > 0
    open_steps = int((~ended_BN.all(0)).sum())
    return min(first + open_steps, ids_BL.shape[1])


def _serves(model: Any, ids_BS: Tensor, stopping: Any, options: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the graph gives what was asked for."""
    if decoding is None or not ids_BS.is_cuda or model.training or torch.compiler.is_compiling():
        return False
    cache: Any = kwargs.get("past_key_values")
    mask = kwargs.get("attention_mask")
    asked = (
        options.return_dict_in_generate,
        getattr(options, "is_assistant", False),
        not kwargs.get("use_cache", True),
        kwargs.get("inputs_embeds") is not None,
        kwargs.get("token_type_ids") is not None,
        kwargs.get("position_ids") is not None,
        torch.is_autocast_enabled("cuda"),
    )
    fresh = type(cache) in (DynamicCache, StaticCache) and cache.get_seq_length() == 0
    fresh = bool(fresh and not getattr(cache, "_is_user_defined", False))
    known = all(type(c).__name__ in ("MaxLengthCriteria", "EosTokenCriteria") for c in stopping)
    fits = ids_BS.shape[0] <= decoding.MAX_BATCH and (stopping.max_length or 10**9) <= model.config.n_positions
    whole = mask is None or (mask.ndim == 2 and mask.shape == ids_BS.shape)
    return not any(asked) and fresh and known and fits and whole and decoding.unsupported(model) is None


def _stop_tokens(stopping: Any) -> tuple[int, ...]:
    tokens = [c.eos_token_id for c in stopping if hasattr(c, "eos_token_id")]
    return tuple(sorted({int(t) for group in tokens for t in group.reshape(-1).tolist()}))


def _decoder(model: Any, batch: int, length: int, stop: tuple[int, ...]) -> Any:
    """The decoder of this model, captured once per batch size and stop tokens; a new one where the old does not fit."""
    mine = _decoders.setdefault(model, {})
    held = mine.get((batch, stop))
    if held is None or not held.fits(model, batch, length, stop):
        multiple = decoding.CACHE_MULTIPLE
        mine[batch, stop] = held = decoding.Decoder(model, batch, -(-length // multiple) * multiple, stop)
    return held
