"""The whole model with its head: probabilities of next tokens, and text of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from lightning_inversion.transformer.blocks import (
    block_count,
    config_of,
    most_positions,
    text_config,
)
from lightning_inversion.transformer.cached import kept
from lightning_inversion.transformer.kv_cache import (
    RaggedCache,
    additive_mask,
    one_after_another,
    serves,
)
from lightning_inversion.transformer.load_checks import FAILURES

_NEAR = 0.02
"""How far logits of a kept cache may be off, relative to the largest; half precision rounds."""
_WORDS = 2**16
"""Eight bytes each of weights, that a checksum sums at a time."""


class LanguageModel:
    """A causal language model as a source of next tokens.

    Args:
        model: with its head, frozen.
        caches: whether it obeys masks after kept keys and values (`TruncatedTransformer.caches`).
    """

    def __init__(self, model: PreTrainedModel, caches: bool) -> None:
        self.model, self.caches = model, caches
        self.layers = block_count(model.config)

    @property
    def device(self) -> torch.device:
        """The device on which ids must be."""
        return self.embeddings.device

    @property
    def embeddings(self) -> Tensor:
        """The token embeddings ``[V, D]`` as they are stored."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def log_probabilities(self, ids: Tensor) -> Tensor:
        """log p ``[B, T, V]`` of the token after each of ids ``[B, T]``."""
        return self.scores(self.model(input_ids=ids, use_cache=False).logits)

    def scores(self, logits: Tensor) -> Tensor:
        """Logits ``[..., any]`` of the model -> log p ``[..., V]`` of the tokens of its embedding.

        A head for fewer tokens (Moshi) never writes the others. Logits that are not finite numbers,
        of float16, are as good as none.
        """
        V = self.embeddings.shape[0]
        scores = logits[..., :V].float().nan_to_num(0.0, 0.0, 0.0).log_softmax(-1)
        return nn.functional.pad(scores, (0, V - scores.shape[-1]), value=-torch.inf)

    @torch.no_grad()
    def sample_text(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """Text ``[rows, length]`` that the model writes after a random token each.

        Sampled at temperature 1, end-of-text included, so that it is as varied as the model.
        """
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.embeddings.shape[0]
        ids = torch.randint(vocabulary, (rows, 1), generator=generator)
        cache = self._own_cache() if self._continues() else None
        for _ in range(length - 1):
            logits = self._next_logits(ids.to(self.device), cache)
            chances = self.scores(logits).exp().cpu()
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
        return ids

    def _own_cache(self) -> Cache:
        return DynamicCache(config=self.model.config)

    def _next_logits(self, ids: Tensor, cache: Cache | None) -> Tensor:
        """Logits ``[B, any]`` of the token after ids ``[B, T]``, all but the last in the cache."""
        if cache is None:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        else:
            logits = self.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
        return logits[:, -1]

    @torch.no_grad()
    def _continues(self) -> bool:
        """Whether the model takes up a cache that it was given: recurrent ones may not."""
        ids = torch.arange(1, 4, device=self.device)[None]
        try:
            cache = self._own_cache()
            found = [self._next_logits(ids[:, :length], cache) for length in (1, 2, 3)][-1]
        except torch.OutOfMemoryError:
            raise
        except FAILURES:
            return False
        expected = self._next_logits(ids, None)
        allowed = _NEAR * float(expected.abs().max())
        return bool((found - expected).abs().max() <= allowed)


@dataclass(frozen=True)
class OwnText:
    """Text that a model wrote.

    Attributes:
        ids: ``[N, T]``.
    """

    ids: Tensor


def own_text(language_model: LanguageModel, rows: int = 48, length: int = 48) -> Tensor:
    """Text ``[rows, length]`` of the model's own, sampled once and kept in the cache folder.

    Sampling is most of what a first run at few blocks measures. With 2.7 times as much text the
    linear probe ranks no more tokens first (configs/recovery/README.md).
    """
    model = language_model.model
    length = min(length, most_positions(model.config) or length)
    identity = {
        "description": {"model": model.config.name_or_path or type(model).__name__},
        "config": config_of(model),
        "weights": weights_checksum(model),
        "shape": [rows, length],
    }
    return kept(OwnText, identity, lambda: OwnText(language_model.sample_text(rows, length))).ids


@torch.no_grad()
def weights_checksum(model: nn.Module) -> str:
    """A checksum of all weights in their order: sums of their bytes, as integers times odd numbers.

    Several times as fast as sha256, and computed where the weights are; no protection against
    forgery.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        raw = tensor.reshape(-1).clone() if tensor.storage_offset() % 8 else tensor.reshape(-1)
        raw = raw.view(torch.uint8)
        whole = len(raw) // 8 * 8
        parts = [*raw[:whole].view(torch.int64).split(_WORDS), raw[whole:].long()]
        odd = torch.arange(1, 2 * _WORDS, 2, device=raw.device)
        sums = torch.stack([(part * odd[: len(part)]).sum() for part in parts]).tolist()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sums}\n".encode())
    return digest.hexdigest()


class Beams:
    """log p of the next token of sequences that branch, run token by token.

    Args:
        language_model: the source of the probabilities.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self.language_model = language_model
        self._cache = language_model._own_cache() if language_model._continues() else None
        self.ids = torch.zeros(1, 0, dtype=torch.long, device=language_model.device)

    @torch.no_grad()
    def extend(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """log p ``[W, V]`` after W sequences, each a parent [W] of the latest with a token [W]."""
        if self._cache is not None and self.ids.shape[1]:
            self._cache.reorder_cache(parents)  # type: ignore[arg-type]
        self.ids = torch.cat([self.ids[parents], tokens[:, None]], dim=1)
        return self.language_model.scores(self.language_model._next_logits(self.ids, self._cache))


class Continuations:
    """log p of the next token of B growing sequences, run token by token after kept keys.

    Tokens are run when probabilities are asked for, several at once where several were appended.

    Args:
        language_model: the source of the probabilities.
        rows: B.
    """

    def __init__(self, language_model: LanguageModel, rows: int) -> None:
        self.language_model = language_model
        device = language_model.device
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._done = [0] * rows
        self._latest: list[Tensor | None] = [None] * rows
        self._cache = (
            RaggedCache(rows, language_model.layers, device) if language_model.caches else None
        )

    def append(self, rows: Tensor, ids: Tensor) -> None:
        """Append to each of ``rows`` [R] its token of ``ids`` [R]."""
        for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
            self._ids[row].append(token)

    def drop_last(self, rows: Tensor) -> None:
        """Remove the last token of each of ``rows`` [R]; another must be appended before scores."""
        for row in rows.tolist():
            self._ids[row].pop()
            self._latest[row] = None
            if self._done[row] > len(self._ids[row]):
                self._done[row] -= 1
                if self._cache is not None:
                    self._cache.lengths[row] -= 1

    def log_probability(self, row: int, token: int) -> float | None:
        """log p of a row's next token, where the row has been asked about it."""
        latest = self._latest[row]
        if latest is None or self._done[row] < len(self._ids[row]):
            return None
        return float(latest[token])

    @torch.no_grad()
    def log_probabilities(self, rows: Tensor) -> Tensor:
        """log p ``[R, V]`` of the next token; each row must hold at least one."""
        waiting = [row for row in rows.tolist() if self._done[row] < len(self._ids[row])]
        if waiting:
            self._catch_up(waiting)
        latest = [self._latest[row] for row in rows.tolist()]
        return torch.stack([one for one in latest if one is not None])

    def _catch_up(self, waiting: list[int]) -> None:
        longest = max(len(self._ids[row]) for row in waiting)
        if not serves(text_config(self.language_model.model.config), longest, longest):
            self._cache = None
        if self._cache is None:
            self._done = [0] * len(self._done)
        new = [self._ids[row][self._done[row] :] for row in waiting]
        width = max(map(len, new))
        device = self.language_model.device
        ids = torch.tensor([one + [0] * (width - len(one)) for one in new], device=device)
        ends = torch.tensor([len(one) - 1 for one in new], device=device)
        logits = self._logits(torch.tensor(waiting, device=device), ids, ends)
        for row, scores in zip(waiting, self.language_model.scores(logits), strict=True):
            self._latest[row] = scores
            self._done[row] = len(self._ids[row])

    def _logits(self, rows: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        model, each = self.language_model.model, torch.arange(len(rows), device=ids.device)
        if self._cache is None:
            with _head_at(model, each, ends):
                plain: Tensor = model(input_ids=ids, use_cache=False).logits
            return plain[each, ends] if plain.shape[1] > 1 else plain[:, 0]

        def forward(mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
            output = model(
                input_ids=ids,
                attention_mask=additive_mask(mask, model.dtype),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits: Tensor = output.logits
            return logits

        with _head_at(model, each, ends):
            logits = self._cache.run(forward, rows, one_after_another(ids.shape[1], ids.device))
        slots = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        self._cache.keep(slots.masked_fill(slots > ends[:, None], -1))
        return logits[each, ends] if logits.shape[1] > 1 else logits[:, 0]


@contextmanager
def _head_at(model: PreTrainedModel, each: Tensor, ends: Tensor) -> Iterator[None]:
    """The head scores one position of each row, where the model has a head of its own.

    Scores of the whole vocabulary at every position would need more than the forward itself, in
    time and in memory.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        yield
        return

    def last_only(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0][each, ends][:, None], *given[1:])

    handle = head.register_forward_pre_hook(last_only)
    try:
        yield
    finally:
        handle.remove()
