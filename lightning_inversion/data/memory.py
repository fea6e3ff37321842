"""What a fit needs: bytes and seconds, before anything is loaded.

    python -m lightning_inversion.data.memory --model huggyllama/llama-7b --depth 8 --tokens 2048

Parameters, floating-point operations and what a backward pass keeps are counted, not estimated: the
model's own code is run once on torch's ``meta`` device, which has shapes and no numbers. Seconds
follow from two rates of the machine, which ``Machine.measured`` finds in a second.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PretrainedConfig

from lightning_inversion.errors import InputError
from lightning_inversion.inputs import VocabularyInput
from lightning_inversion.transformer.blocks import (
    language_model,
    shorten_config_,
    takes_position_ids,
    text_config,
)
from lightning_inversion.transformer.embedding import scored_at_a_time
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer

LIBRARIES = 450 * 2**20
"""Bytes of a process that is about to load a model for a fit on a CPU: torch, transformers,
Lightning, a tokenizer."""

_KEPT_COPIES = 6
"""Of the input: values, gradient, two moments, the values before the step, the target."""
_OBJECTIVE_COPIES = 12
"""While the objective is followed back: the features, and of both sides what is standardised, their
difference, its square, the cosine's products and norms, and the gradients of these."""
_MEASURED = 1024
"""Tokens that run together when the probe is fitted."""
_FLOAT64_MATRICES = 8
"""D x D at the end of that fit: three sums, the solver's and the eigenvectors' copies."""
_TWIN_BYTES = 256
"""Of a token's digest, list and place in a dictionary, while equal embeddings are looked for."""
_CANDIDATES = 4096
"""Run in one forward at most, over all rows; a row is given 512 of them at most."""
_MOST_OF_A_ROW = 512
_SCORES_AT_ONCE = 8
"""Tensors of scores while candidates are proposed: of three orders, stacked, added, masked."""
_LENGTH = 32


@dataclass(frozen=True)
class Shape:
    """What a model's first blocks cost, by counting.

    Attributes:
        vocabulary: V.
        width: D.
        blocks: how many are kept.
        parameters: of one block.
        saved: floats of a token that one block keeps for the backward pass.
        flops: floating-point operations of a token in one block's forward pass, attention within
            a text of 32 tokens counted.
    """

    vocabulary: int
    width: int
    blocks: int
    parameters: int
    saved: float
    flops: float

    @classmethod
    def of(cls, config: PretrainedConfig, blocks: int) -> Shape:
        """Of the model with this configuration, cut after ``blocks`` blocks.

        Raises:
            InputError: the model's code needs numbers to run (experts that are chosen by them).
        """
        language = text_config(config)
        try:
            one, two = _counted(config, 1), _counted(config, 2)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise InputError(
                f"--model: a {config.model_type} cannot be counted without its weights; name "
                "--data.tokens_per_batch."
            ) from error
        per_block = [b - a for a, b in zip(one, two, strict=True)]
        return cls(
            vocabulary=language.vocab_size,
            width=language.hidden_size,
            blocks=blocks,
            parameters=int(per_block[0]),
            saved=per_block[1],
            flops=per_block[2],
        )


def _blocks_of(config: PretrainedConfig) -> int:
    return int(text_config(config).num_hidden_layers)


def _counted(config: PretrainedConfig, blocks: int) -> tuple[float, ...]:
    """Parameters, floats kept a token, operations a token, of a model of so many blocks."""
    config = copy.deepcopy(config)
    shorten_config_(text_config(config), blocks)
    with torch.device("meta"):
        made = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        model = language_model(made).requires_grad_(False).train(False)
        width = model.get_input_embeddings().weight.shape[1]
        vectors = torch.empty(1, _LENGTH, width, requires_grad=True)
        # The models look into the numbers of a mask that they make themselves; there are none.
        given = {"attention_mask": torch.empty(1, 1, _LENGTH, _LENGTH), "use_cache": False}
        if takes_position_ids(model):
            given["position_ids"] = torch.empty(1, _LENGTH, dtype=torch.long)
    own = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own:
            kept[id(base)] = base
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.device("meta"):
        model(inputs_embeds=vectors, **given)
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        model(inputs_embeds=vectors, **given)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    floats = sum(tensor.numel() for tensor in kept.values())
    return parameters, floats / _LENGTH, counter.get_total_flops() / _LENGTH


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by what they are for."""

    libraries: float
    weights: float
    measuring: float
    iteration: float
    search: float

    @property
    def total(self) -> float:
        """Measuring the model, iterations and candidates take turns."""
        turns = max(self.measuring, self.iteration, self.search)
        return self.libraries + self.weights + turns


def memory(
    shape: Shape,
    tokens: int,
    rows: int,
    channels: int | None = None,
    weight_bytes: float = 4.0,
    number_bytes: float = 4.0,
    libraries: float = LIBRARIES,
) -> Memory:
    """Bytes that a fit of one batch needs.

    Args:
        shape: of the model.
        tokens: of the batch, its padding counted.
        rows: prompts of the batch.
        channels: numbers a position of the learnable input; None for an ``EmbeddingInput``.
        weight_bytes: of one weight in a block: 4 float32, 2 bfloat16, 1 int8, 0.5 nf4.
        number_bytes: of one number that a block computes, and of an embedding's entry.
        libraries: what the process holds before.
    """
    V, D = shape.vocabulary, shape.width
    # The probe's matrices, directions and shrinkages, two of each; and the tokens' places along
    # the directions that the linear map uses, for first and later positions.
    probe = 6 * 4.0 * D * D + 4.0 * V * D / 3
    weights = V * D * number_bytes + shape.blocks * shape.parameters * weight_bytes + probe
    of_a_block = shape.saved * number_bytes  # for a token
    held = _KEPT_COPIES * tokens * (channels or D) * 4.0

    # A forward without gradients still holds what one block computes of its tokens.
    run = _MEASURED * (of_a_block + 8.0 * 2 * D)
    measuring = held + max(run + 8.0 * _FLOAT64_MATRICES * D * D, _TWIN_BYTES * V)

    # Going back through a block takes gradients about as large as what the block has kept.
    kept = tokens * (shape.blocks + 1) * of_a_block
    iteration = held + kept + _OBJECTIVE_COPIES * tokens * D * 4.0

    at_a_time = scored_at_a_time(V)
    proposed = min(rows, at_a_time) * V * 4.0 * _SCORES_AT_ONCE
    decoded = min(tokens, at_a_time) * V * 4.0 * 2
    candidates = min(_CANDIDATES, rows * _MOST_OF_A_ROW) * (of_a_block + 8 * D)
    keys_and_values = 2.0 * tokens * shape.blocks * D * number_bytes
    tried = 1.0 * rows * V
    search = held + tried + keys_and_values + max(proposed, decoded, candidates)
    return Memory(libraries, weights, measuring, iteration, search)


_WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.56}


def tokens_that_fit(spec: TransformerSpec, available: float, learnable: Any = None) -> int:
    """Tokens of the largest batch (a power of two, 32 tokens a prompt) that nine tenths hold.

    Args:
        spec: of the model.
        available: bytes of the device.
        learnable: of the experiment; None for an ``EmbeddingInput``.
    """
    config = spec.config()
    depth = max(spec.layers) if spec.layers else spec.depth
    shape = Shape.of(config, depth or _blocks_of(config))
    direct = isinstance(learnable, VocabularyInput)
    channels = shape.vocabulary if direct else shape.width
    weight, number = _WEIGHT_BYTES[spec.quantization or spec.dtype], _WEIGHT_BYTES[spec.dtype]
    for exponent in range(24, 0, -1):
        tokens = 1 << exponent
        needed = memory(shape, tokens, -(-tokens // 32), channels, weight, number)
        if needed.total <= 0.9 * available:
            return tokens
    return 1


@dataclass(frozen=True)
class Machine:
    """Two rates that decide the seconds of an iteration.

    Attributes:
        flops: operations a second in a block, forward and backward, when there are many tokens.
        block: seconds that a block's forward and backward take with hardly any tokens: reading the
            weights and starting the kernels.
        iteration: seconds of an iteration beside the model: optimiser, Trainer, logging.
    """

    flops: float
    block: float
    iteration: float = 0.003

    @classmethod
    def measured(cls, transformer: TruncatedTransformer, tokens: int = 1024) -> Machine:
        """Of this machine with this model, cut after one or a few blocks.

        Args:
            transformer: on the device that is asked about.
            tokens: of the larger of two trials.
        """
        shape = Shape.of(transformer.model.config, transformer.depth)
        few, many = 8, tokens
        seconds = [model_seconds(transformer, count) for count in (few, many)]
        each = (seconds[1] - seconds[0]) / (many - few)
        work = 2 * shape.flops * shape.blocks
        return cls(flops=work / each, block=max(0.0, seconds[0] - few * each) / shape.blocks)


def model_seconds(transformer: TruncatedTransformer, tokens: int, repeats: int = 5) -> float:
    """The least seconds of a forward and backward of so many tokens."""
    length = min(_LENGTH, tokens)
    shape = (tokens // length, length, transformer.embedding.width)
    vectors = torch.randn(*shape, device=transformer.device).requires_grad_()
    least = float("inf")
    for _ in range(repeats):
        _settle(transformer.device)
        began = time.perf_counter()
        transformer(vectors).square().sum().backward()
        _settle(transformer.device)
        least = min(least, time.perf_counter() - began)
    return least


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(shape: Shape, machine: Machine, tokens: int, iterations: int) -> float:
    """Seconds of so many iterations of a batch, every position of it run each time.

    Proven prefixes are not run again, so the recommended recipe needs less.

    Args:
        shape: of the model.
        machine: its rates.
        tokens: of the batch, its padding counted.
        iterations: of the batch.
    """
    work = 2 * tokens * shape.flops / machine.flops
    return iterations * (machine.iteration + shape.blocks * (machine.block + work))


def main(arguments: list[str] | None = None) -> int:
    """Print what a fit needs; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_inversion.data.memory", description="What a fit needs."
    )
    parser.add_argument("--model", default=TransformerSpec.model, help="as --model.transformer")
    parser.add_argument("--config", type=Path, help="a config.json, where the model is not at hand")
    parser.add_argument("--depth", type=int, help="blocks kept; all if left out")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch, with its padding")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--length", type=int, default=36, help="tokens of a prompt")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--flops", type=float, help="a second; measured here if left out")
    options = parser.parse_args(arguments)
    config = (
        AutoConfig.from_pretrained(options.config)
        if options.config
        else TransformerSpec(model=options.model).config()
    )
    shape = Shape.of(config, options.depth or _blocks_of(config))
    rows = max(1, options.tokens // options.length)
    print(f"{shape.blocks} blocks of {shape.parameters / 1e6:.1f} million parameters, width "
          f"{shape.width}, {shape.vocabulary} tokens")  # fmt: skip
    for name, weight, number in (
        ("float32", 4.0, 4.0), ("bfloat16", 2.0, 2.0), ("int8", 1.0, 2.0), ("nf4", 0.56, 2.0),
    ):  # fmt: skip
        needed = memory(shape, options.tokens, rows, weight_bytes=weight, number_bytes=number)
        print(f"  {name:9} weights {needed.weights / 2**30:6.1f} GiB, iteration "
              f"{needed.iteration / 2**30:6.1f}, candidates {needed.search / 2**30:6.1f}, in all "
              f"{needed.total / 2**30:6.1f}")  # fmt: skip
    if options.flops:
        machine = Machine(options.flops, 0.0005)
        batches = -(-options.prompts // rows)
        needed_seconds = batches * seconds(shape, machine, options.tokens, options.iterations)
        print(
            f"  {options.prompts} prompts, {options.iterations} iterations at "
            f"{options.flops:.3g} operations a second: {needed_seconds / 60:.1f} min at most"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
