"""The memory of a fit, before anything is loaded: it chooses ``--data.tokens_per_batch auto``.

    python -m lightning_inversion.data.memory
    python -m lightning_inversion.data.memory --model gpt2 --depth 8 --tokens 512

prints it for Llama shapes of 7B to 30B, or for a model of your own; its configuration is enough.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_inversion.inputs import VocabularyInput
from lightning_inversion.recovery.search import CANDIDATES_OF_A_FORWARD
from lightning_inversion.transformer.blocks import block_count, text_config
from lightning_inversion.transformer.embedding import scored_at_a_time
from lightning_inversion.transformer.linear_probe import TOKENS_AT_A_TIME as PROBE_TOKENS
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.untrained import count_block, llama_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LIBRARIES = 450 * 2**20
"""Bytes of a process that is about to load a model for a fit on a CPU: torch, transformers,
Lightning, a tokenizer."""
LLAMAS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40},
    "30B": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60},
}
"""Sizes of the Llama models; each attention head has size 128."""

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.56}
"""Bytes of one weight; int8 and nf4 are quantised."""
_KEPT_COPIES = 6
"""Copies of the input: values, gradient, two moments, the values before the step, the target."""
_OBJECTIVE_COPIES = 12
"""Copies of the features in the objective's backward pass: both sides standardised, their
difference, its square, the cosine's products and norms, and the gradients of these."""
_PROBE_MATRICES = 8
"""D x D in float64 at the end of that fit: three sums, copies for the solver and eigenvectors."""
_DUPLICATE_BYTES = 256
"""Bytes of a token's digest, list and dictionary entry, while equal embeddings are looked for."""
_CANDIDATES_OF_A_ROW = 512
"""Candidates of one row in one forward at most, as the schedule and the policy have them."""
_SCORES = 8
"""Tensors of scores while candidates are proposed: of three proposers, stacked, added, masked."""
_PROMPT = 32
"""Tokens of a prompt, where no prompt is known yet."""


@dataclass(frozen=True)
class ModelSize:
    """What a model's first blocks cost.

    Attributes:
        vocabulary: V.
        width: D.
        blocks: how many are kept.
        parameters: the number of weights of one block.
        saved: floats a token that one block keeps for the backward pass.
    """

    vocabulary: int
    width: int
    blocks: int
    parameters: int
    saved: float

    @classmethod
    def of(cls, config: PretrainedConfig, blocks: int | None) -> ModelSize:
        """The size of a model of this configuration, cut after ``blocks`` blocks (None: whole).

        Raises:
            InputError: the model's code needs numbers to run.
        """
        language = text_config(config)
        blocks = blocks or block_count(config)
        return cls(language.vocab_size, language.hidden_size, blocks, *count_block(config))


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by what they are for."""

    libraries: float
    weights: float
    calibration: float
    iteration: float
    search: float

    @property
    def total(self) -> float:
        """Calibration, iterations and candidates take turns."""
        return self.libraries + self.weights + max(self.calibration, self.iteration, self.search)


def memory(
    shape: ModelSize,
    tokens: int,
    rows: int,
    value_size: int | None = None,
    weights: str = "float32",
    dtype: str = "float32",
) -> Memory:
    """Bytes that a fit of one batch needs.

    Args:
        shape: of the model.
        tokens: of the batch, its padding counted.
        rows: prompts of the batch.
        value_size: numbers a position of the learnable input; None for an ``EmbeddingInput``.
        weights: type of a block's weights; int8 and nf4 are quantised.
        dtype: type of an embedding's entry and of what a block computes.
    """
    V, D, each = shape.vocabulary, shape.width, _BYTES[dtype]
    # The probe's matrices, directions and shrinkages, two of each; and the coordinates of all
    # tokens along the directions that the proposer uses, for first and later positions.
    probe = 6 * 4.0 * D * D + 4.0 * V * D / 3
    loaded = V * D * each + shape.blocks * shape.parameters * _BYTES[weights] + probe
    of_a_block = shape.saved * each  # for a token
    held = _KEPT_COPIES * tokens * (value_size or D) * 4.0

    # A forward without gradients still holds what one block computes of its tokens.
    probe_run = PROBE_TOKENS * (of_a_block + 8.0 * 2 * D) + _PROBE_MATRICES * 8.0 * D * D
    calibration = held + max(probe_run, _DUPLICATE_BYTES * V)

    # A block's backward pass takes gradients about as large as what the block has kept.
    kept = tokens * (shape.blocks + 1) * of_a_block
    iteration = held + kept + _OBJECTIVE_COPIES * tokens * D * 4.0

    at_a_time = scored_at_a_time(V)
    proposed = min(rows, at_a_time) * V * 4.0 * _SCORES
    decoded = min(tokens, at_a_time) * V * 4.0 * 2
    candidates = min(CANDIDATES_OF_A_FORWARD, rows * _CANDIDATES_OF_A_ROW) * (of_a_block + 8 * D)
    keys_and_values = 2.0 * tokens * shape.blocks * D * each
    search = held + 1.0 * rows * V + keys_and_values + max(proposed, decoded, candidates)
    return Memory(LIBRARIES, loaded, calibration, iteration, search)


def tokens_that_fit(spec: TransformerSpec, available: float, learnable: Any = None) -> int:
    """Tokens of the largest batch (a power of two, 32 tokens a prompt) that nine tenths hold.

    Args:
        spec: of the model.
        available: bytes of the device.
        learnable: of the experiment; None for an ``EmbeddingInput``.
    """
    shape = ModelSize.of(spec.config(), spec.blocks_needed())
    value_size = shape.vocabulary if isinstance(learnable, VocabularyInput) else shape.width
    for exponent in range(24, 0, -1):
        tokens = 1 << exponent
        rows = -(-tokens // _PROMPT)
        needed = memory(
            shape, tokens, rows, value_size, spec.quantization or spec.dtype, spec.dtype
        )
        if needed.total <= 0.9 * available:
            return tokens
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_inversion.data.memory",
        description="GiB of a fit, without the libraries; numbers in bfloat16.",
    )
    parser.add_argument("--model", help="as --model.transformer; Llama shapes if left out")
    parser.add_argument("--depth", type=int, help="blocks kept; 8 and all if left out")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch, with its padding")
    options = parser.parse_args(arguments)
    configs = {
        name: llama_config(**sizes, num_attention_heads=sizes["hidden_size"] // 128)
        for name, sizes in LLAMAS.items()
    }
    if options.model is not None:
        configs = {options.model: TransformerSpec(model=options.model).config()}
    print("| model, blocks kept | weights bfloat16 | int8 | nf4 | iteration | candidates |")
    print("|---|---|---|---|---|---|")
    for name, config in configs.items():
        for depth in (8, None) if options.depth is None else (options.depth,):
            shape = ModelSize.of(config, depth)
            needed = [
                memory(shape, options.tokens, -(-options.tokens // _PROMPT), None, kind, "bfloat16")
                for kind in ("bfloat16", "int8", "nf4")
            ]
            parts = [one.weights for one in needed] + [needed[0].iteration, needed[0].search]
            row = " | ".join(f"{part / 2**30:.1f}" for part in parts)
            print(f"| {name}, {shape.blocks} | {row} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
