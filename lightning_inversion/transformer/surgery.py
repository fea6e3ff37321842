"""The block taken apart: no MLP, no norms, no residuals, no positions, no causality.

The document replicates blocks in pieces for this ('Cosine loss optimization and model training');
here parts of the one frozen model are switched off. Each part is there by default, and what is
not switched off is bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.blocks import block_output, takes_position_ids
from lightning_inversion.transformer.families import Family, family_of

Positions = Literal["own", "first", "none"]


@dataclass(frozen=True)
class Surgery:
    """Which parts of the blocks are left.

    Self-attention alone, as in the document, is `mlp=False, norms=False, residuals=False`.

    Args:
        mlp: keep the MLPs.
        norms: keep the norms of the blocks (not the final one, nor those inside attention).
        residuals: keep the residual connections; without them a block is what its MLP makes of
            its attention's output, or that output alone where the MLP is gone as well.
        positions: own; 'first' gives every token the first position, as the document's GPT-2
            code does with wpe[0]; 'none' has no positions, as its direct method.
        causal: keep the causal mask; without it every token sees every other, as in the
            document's Llama code.
        repeat_first: put the first block in the place of each, as the document's code for
            several layers does.
    """

    mlp: bool = True
    norms: bool = True
    residuals: bool = True
    positions: Positions = "own"
    causal: bool = True
    repeat_first: bool = False

    def description(self) -> dict[str, Any]:
        """The choices as plain values."""
        return asdict(self)


def operate_(model: PreTrainedModel, blocks: Sequence[nn.Module], surgery: Surgery) -> None:
    """Switch off what `surgery` leaves out, in place.

    `causal` and `positions` take effect when the model is run, which gives it a mask and
    position ids; here is only looked whether it can take them.

    Raises:
        InputError: the model's family is not known, or cannot do without the part.
    """
    config = model.config
    if not surgery.norms:
        family = family_of(config, "norms")
        for block in blocks:
            for name in family.norms:
                if hasattr(block, name):
                    setattr(block, name, nn.Identity())
    if not surgery.mlp:
        family = family_of(config, "mlp")
        for block in blocks:
            for name in family.mlp:
                setattr(block, name, nn.Identity())
            setattr(block, family.mlp[-1], Zeros(config.hidden_size))
    if not surgery.residuals:
        family = family_of(config, "residuals")
        for block in blocks:
            WithoutResiduals(block, family, surgery.mlp)
    if surgery.positions != "own":
        _check_positions(model)
    if surgery.positions == "none":
        # Rotary positions are gone when all are equal: attention sees their differences alone.
        added = family_of(config, "positions").position_embedding
        for path, module in model.named_modules():
            if added is not None and path.split(".")[-1] == added:
                module.register_forward_hook(_nothing)


class Zeros(nn.Module):
    """Zeros [..., width] whatever comes: the place of an MLP that is gone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..., any] -> zeros [..., width]."""
        return inputs.new_zeros(*inputs.shape[:-1], self.width)


class WithoutResiduals:
    """Hooks that take the residual stream out of one block.

    The block goes on adding; what it adds up is thrown away, and its parts are put together
    anew, so that nothing is lost to a subtraction.
    """

    def __init__(self, block: nn.Module, family: Family, mlp: bool) -> None:
        self.parallel = family.middle is None
        self.with_mlp = mlp
        self.attention: Tensor | None = None
        self.mlp: Tensor | None = None
        block.get_submodule(family.attention).register_forward_hook(self._hear_attention)
        if family.middle is not None:
            block.get_submodule(family.middle).register_forward_pre_hook(self._give_attention)
        block.get_submodule(family.mlp[-1]).register_forward_hook(self._hear_mlp)
        block.register_forward_hook(self._put_together)

    def _hear_attention(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.attention = block_output(output)

    def _give_attention(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.attention is not None
        # OPT gives its MLP all rows of a batch in one.
        return (self.attention.reshape_as(inputs[0]), *inputs[1:])

    def _hear_mlp(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.mlp = block_output(output).clone()  # Falcon adds to it in place

    def _put_together(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        attention, mlp = self.attention, self.mlp
        self.attention = self.mlp = None  # keep no graph alive
        assert attention is not None
        assert mlp is not None
        mlp = mlp.reshape_as(attention)
        both = attention + mlp if self.parallel else mlp
        features = both if self.with_mlp else attention
        return (features, *output[1:]) if isinstance(output, tuple) else features


def _nothing(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _check_positions(model: PreTrainedModel) -> None:
    if not takes_position_ids(model):
        raise InputError(
            f"--model.transformer.positions: a {model.config.model_type} takes no position ids; "
            "leave it at own, or choose another model."
        )


@torch.no_grad()
def check_bidirectional(run: Any, embeds: Tensor) -> None:
    """Raise InputError if a later token does not reach an earlier one in spite of the mask.

    Args:
        run: vectors [1, T, D] -> features [1, T, F].
        embeds: [1, T, D], T at least 2.
    """
    changed = embeds.clone()
    changed[:, -1] = 1 - changed[:, -1]
    try:
        seen = not torch.equal(run(embeds)[:, 0], run(changed)[:, 0])
    except (RuntimeError, ValueError, TypeError):  # takes no such mask at all
        seen = False
    if not seen:
        raise InputError(
            "--model.transformer.causal: this model's attention is causal whatever the mask; "
            "leave it at true, or choose another model or attention (sdpa)."
        )
