"""What the user tells of hidden states in a file, and the sizes of the model that they are of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.blocks import block_count, settings_of, text_config
from lightning_inversion.transformer.selection import Output

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Axis = Literal["prompts", "layers", "positions", "features"]
AXES: tuple[str, ...] = get_args(Axis)


@dataclass(frozen=True)
class Layout:
    """What the shapes and names in a file of hidden states leave open.

    Args:
        axes: the meaning of each axis of a tensor: prompts, layers, positions, features.
        depths: the depths that the layers hold, in their order.
        lengths: the tokens of each prompt, where prompts are padded and no mask is in the file.
        padding: the side that is padded.
        dtype: the floating type whose bits integers hold.
    """

    axes: list[Axis] | None = None
    depths: list[int] | None = None
    lengths: list[int] | None = None
    padding: Literal["right", "left"] = "right"
    dtype: Literal["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"] | None = None

    def __post_init__(self) -> None:
        axes = self.axes or ["features"]
        if len(set(axes)) < len(axes) or "features" not in axes or not set(axes) <= set(AXES):
            raise InputError(
                f"--data.layout.axes is {','.join(axes)}; name each axis once, of "
                f"{', '.join(AXES)}, with features among them."
            )
        for name in ("depths", "lengths"):
            values = getattr(self, name)
            if values is not None and (not values or min(values) < (name == "lengths")):
                raise InputError(f"--data.layout.{name} is {values}; give one or more numbers.")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model by which its hidden states are recognised.

    Attributes:
        blocks: all of them.
        width: features of one depth.
        vocabulary: logits of one position.
        heads: of its keys and values.
        head_size: features of one head.
    """

    blocks: int
    width: int
    vocabulary: int
    heads: int
    head_size: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelShape:
        """The sizes in a model's configuration."""
        language = text_config(config)

        def first(name: str, otherwise: int) -> int:
            return next(iter(settings_of(language, name)), 0) or otherwise

        heads = first("num_attention_heads", 1)  # RWKV and Mamba have none
        size = first("head_dim", language.hidden_size // heads)
        heads = first("num_key_value_heads", heads)
        width = language.hidden_size * first("hc_count", 1)  # Qwen 4: streams side by side
        return cls(block_count(config), width, language.vocab_size, heads, size)


@dataclass(frozen=True)
class Wanted:
    """Which hidden states are asked for, and of which model.

    Attributes:
        where: names the file or argument in messages.
        depths: whose features are read, ascending; None for the last.
        final_norm: whether they are read after the final norm.
        layout: what the user told of the file.
        shape: reads the model's configuration, when first needed.
        checks_width: whether the states are as wide as the model.
        output: hidden states, or keys, values or both of the block after each depth.
        logits: whether logits are read in place of hidden states.
    """

    where: str
    depths: tuple[int, ...] | None
    final_norm: bool = False
    layout: Layout = field(default_factory=Layout)
    shape: Callable[[], ModelShape] | None = None
    checks_width: bool = True
    output: Output = "hidden_states"
    logits: bool = False

    @property
    def width(self) -> int:
        """How many numbers a position has."""
        return self.sizes.vocabulary if self.logits else self.sizes.width

    @property
    def sizes(self) -> ModelShape:
        """The model's, from its configuration."""
        if self.shape is None:
            raise self.error(" cannot be understood without the model's sizes; name the model.")
        return self.shape()

    def error(self, what: str) -> InputError:
        """An error whose sentence begins with where the states are."""
        return InputError(f"{self.where}{what}")


@dataclass(frozen=True)
class Beside:
    """What lies beside the states.

    Attributes:
        mask: of attention.
        ids_shape: the shape of token ids.
        depth: that a name tells.
        lengths: the tokens of each prompt.
    """

    mask: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    ids_shape: tuple[int, ...] | None = None
    depth: int | None = None


def named(name: str) -> str:
    """How a message names a tensor."""
    return f": tensor {name!r}" if name else ""
