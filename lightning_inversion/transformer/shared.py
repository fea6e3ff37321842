"""One model in memory for many experiments that only cut it, or switch parts of it off."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_inversion.transformer.blocks import block_count, frozen_copy, without_head
from lightning_inversion.transformer.loading import WHAT_IS_LOADED, TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer


class SharedModels:
    """Loads the deepest blocks that are expected once, and gives each experiment its cut of them.

    The weights are shared; what is cut from or switched off in one cut leaves the others as they
    are. One model is in memory at a time: another one takes its place. Quantised layers and
    devices given by hand are not shared out: such a model is loaded for each spec.

    Args:
        expected: the specs that will be asked for; a deeper one than expected is loaded anew.
    """

    def __init__(self, expected: Iterable[TransformerSpec] = ()) -> None:
        self._depths: dict[str, int] = {}
        for spec in expected:
            key = weights_of(spec)
            self._depths[key] = max(self._depths.get(key, 0), spec.blocks_needed())
        self._key: str | None = None
        self._model: PreTrainedModel | None = None
        self._whole: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def load(self, spec: TransformerSpec) -> TruncatedTransformer:
        """What ``spec.load()`` gives, from the blocks in memory where they are enough."""
        if spec.quantization is not None or spec.device_map is not None:
            return spec.load()
        key, needed = weights_of(spec), spec.blocks_needed()
        if self._model is None or key != self._key or needed > self._depths[key]:
            self._model = self._whole = None  # before the next, so that two never lie in memory
            self._depths[key] = max(self._depths.get(key, 0), needed)
            self._model = spec.load_blocks(self._depths[key])
            self._tokenizer = spec.load_tokenizer()
            self._key = key
        assert self._tokenizer is not None
        return spec.cut(frozen_copy(self._model), self._tokenizer)

    def load_with_head(self, spec: TransformerSpec) -> tuple[TruncatedTransformer, PreTrainedModel]:
        """What ``spec.load_with_head()`` gives; the whole model stays, and serves every depth."""
        if spec.quantization is not None or spec.device_map is not None:
            return spec.load_with_head()
        key = weights_of(spec)
        if self._whole is None or key != self._key:
            self._model = self._whole = None
            self._whole, self._tokenizer = spec.load_causal_lm()
            self._model = without_head(self._whole)
            self._depths[key] = block_count(self._whole.config)
            self._key = key
        assert self._tokenizer is not None
        return spec.cut(frozen_copy(without_head(self._whole)), self._tokenizer), self._whole


def weights_of(spec: TransformerSpec) -> str:
    """Names the weights that a spec reads: equal where one model serves both."""
    return repr([getattr(spec, name) for name in WHAT_IS_LOADED])
