"""`generate` on CUDA: the decode loop of greedy search and sampling as replays of one graph (see ``moe.decoding``).

What the graph does not cover (beams, streaming, returned scores, a cache that goes on living, ...) takes transformers'
own loop, unasked.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, StaticCache

try:
    from moe import decoding
except ModuleNotFoundError:  # no Triton
    decoding = None  # type: ignore[assignment]

TOLERANCE = 0.05  # of a step's logits in 16 bits: rounding gives about 0.01
CHECK_EVERY = 16  # steps between two looks at whether all sequences have ended

# Graphs hold memory and may not be copied or saved with the model.
_decoders: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def drop_decoders(model: Any) -> None:
    """Forget what was captured for a model."""
    _decoders.pop(model, None)


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
        if plain and _serves(self, input_ids, stopping_criteria, generation_config, model_kwargs):
            ids_BL = _generate(self, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
            if ids_BL is not None:
                return ids_BL
        return super()._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )


def _generate(
    model: Any, ids_BS: Tensor, processors: Any, stopping: Any, options: Any, kwargs: dict[str, Any]
) -> Tensor | None:
    """The tokens; None where no captured step can be had."""
    decoder = _decoder(model, ids_BS.shape[0], stopping.max_length, _stop_tokens(stopping))
    if decoder is None:
        return None
    mask_BS = kwargs.get("attention_mask")
    mask_BS = torch.ones_like(ids_BS) if mask_BS is None else mask_BS
    cache = DynamicCache(config=model.config)  # the caller's own cache stays as it came
    outputs = model._prefill(ids_BS, options, {**kwargs, "past_key_values": cache}, is_first_iteration=True)
    least = _least_length(processors, ids_BS.shape[1])
    sampled = bool(options.do_sample) or least is None
    pad = options._pad_token_tensor
    decoder.start(cache, ids_BS, mask_BS, 0 if pad is None else int(pad), least or 0)
    choose = _Chooser(processors, options.do_sample)
    decoder.append(choose(ids_BS, outputs.logits[:, -1]))
    if not _prepared(model, decoder, cache, mask_BS, sampled):
        return None
    return _run(decoder, choose if sampled else None, ids_BS.shape[1] + 1, stopping.max_length)


def _least_length(processors: Any, prompt: int) -> int | None:
    """Tokens that a sequence must have before it may end, as far as that is all the processors ask; else None."""
    least = [0]
    for processor in processors:  # min_new_tokens alone brings both
        match type(processor).__name__:
            case "MinLengthLogitsProcessor":
                least.append(int(processor.min_length))
            case "MinNewTokensLengthLogitsProcessor":
                least.append(prompt + int(processor.min_new_tokens))
            case _:
                return None
    return max(least)


def _prepared(model: Any, decoder: Any, cache: Any, mask_BS: Tensor, sampled: bool) -> bool:
    """Capture what this call needs. A new decoder first proves itself on this very prompt: the logits of its step
    must be those of the model's own forward, or it is never used."""
    if decoder.proven:
        decoder.prepare(sampled)
        return True
    try:
        decoder.prepare(True)
        decoder.prepare(sampled)
        decoder.step(sampled=True)
        mask_BS = torch.cat([mask_BS, torch.ones_like(mask_BS[:, :1])], dim=1)
        own = {"input_ids": decoder.token_T[:, None], "position_ids": decoder.position_T[:, None]}
        want_BV = model(**own, attention_mask=mask_BS, past_key_values=cache, use_cache=True).logits[:, -1].float()
        error = float(_distance(decoder.logits_TV.float(), want_BV))
    except Exception as problem:
        decoder.broken = f"{type(problem).__name__}: {problem}"
    else:
        decoder.proven = error < TOLERANCE
        decoder.broken = None if decoder.proven else f"its logits are {error:.3f} off"
    if decoder.broken:
        warnings.warn(f"generate runs without a captured decode step: {decoder.broken}", stacklevel=2)
    return decoder.proven


def _distance(got_BV: Tensor, want_BV: Tensor) -> Tensor:
    """Relative distance of logits, what softmax ignores taken off; the median sequence, since near-ties may route
    single ones to other experts."""
    got_BV, want_BV = (z - z.mean(1, keepdim=True) for z in (got_BV, want_BV))
    return ((got_BV - want_BV).norm(dim=1) / want_BV.norm(dim=1).clamp_min(1e-6)).median()


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
    fits = ids_BS.shape[0] <= decoding.MAX_BATCH and (stopping.max_length or 10**9) <= model.config.n_positions
    return fits and _plain(ids_BS, stopping, options, kwargs) and decoding.unsupported(model) is None


def _plain(ids_BS: Tensor, stopping: Any, options: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for tokens and nothing else, from ids, with a cache of its own."""
    cache: Any = kwargs.get("past_key_values")
    mask = kwargs.get("attention_mask")
    asked = (
        options.return_dict_in_generate,
        getattr(options, "is_assistant", False),
        not kwargs.get("use_cache", True),
        kwargs.get("inputs_embeds") is not None,
        kwargs.get("token_type_ids") is not None,
    )
    fresh = type(cache) in (DynamicCache, StaticCache) and cache.get_seq_length() == 0
    fresh = bool(fresh and not getattr(cache, "_is_user_defined", False))
    known = all(type(c).__name__ in ("MaxLengthCriteria", "EosTokenCriteria") for c in stopping)
    whole = mask is None or (mask.ndim == 2 and mask.shape == ids_BS.shape)
    return not any(asked) and fresh and known and whole and _counts_from_zero(kwargs.get("position_ids"), mask, ids_BS)


def _counts_from_zero(position_BS: Tensor | None, mask_BS: Tensor | None, ids_BS: Tensor) -> bool:
    """Whether positions are those that `generate` itself gives: counted from each sequence's first token."""
    if position_BS is None:
        return True
    mask_BS = torch.ones_like(ids_BS) if mask_BS is None else mask_BS
    if position_BS.shape[-1] != ids_BS.shape[1]:
        return False
    return not bool(((position_BS - (mask_BS.cumsum(1) - 1)) * mask_BS).any())


def _stop_tokens(stopping: Any) -> tuple[int, ...]:
    tokens = [c.eos_token_id for c in stopping if hasattr(c, "eos_token_id")]
    return tuple(sorted({int(t) for group in tokens for t in group.reshape(-1).tolist()}))


def _decoder(model: Any, batch: int, length: int, stop: tuple[int, ...]) -> Any:
    """The decoder of this model, captured once per batch size and stop tokens; a new one where the old does not fit.
    None where it did not prove itself."""
    mine = _decoders.setdefault(model, {})
    held, dtype = mine.get((batch, stop)), decoding.compute_type(model)
    if held is None or not held.fits(model, length, dtype):
        mine.pop((batch, stop), None)
        blocks = -(-(length + decoding.SPARE) // decoding.CACHE_MULTIPLE)
        mine[batch, stop] = held = decoding.Decoder(model, batch, blocks * decoding.CACHE_MULTIPLE, stop, dtype)
    return None if held.broken else held
