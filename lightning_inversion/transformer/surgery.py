"""The block taken apart: no MLP, no norms, no residuals, no positions, no causality.

The source replicates blocks in pieces for this ('Cosine loss optimization and model training');
here parts of the one frozen model are switched off. Each part is there by default, and what is
not switched off is bit-identical. `FAMILIES` lists where each family keeps the parts of a block;
loading, truncating and running need none of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.blocks import block_output, takes_position_ids

Positions = Literal["own", "first", "none"]


@dataclass(frozen=True)
class Surgery:
    """Which parts of the blocks are left.

    Self-attention alone, as in the source, is `mlp=False, norms=False, residuals=False`.

    Args:
        mlp: keep the MLPs.
        norms: keep the norms of the blocks (not the final one, nor those inside attention).
        residuals: keep the residual connections; without them a block is what its MLP makes of
            its attention's output, or that output alone where the MLP is gone as well.
        positions: own; 'first' gives every token the first position, as the source's GPT-2
            code does with wpe[0]; 'none' has no positions, as its direct method.
        causal: keep the causal mask; without it every token sees every other, as in the
            source's Llama code.
        repeat_first: put copies of the first block in place of the others, as the source's code for
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
    position ids; here it is only checked that it can take them.

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
        _check_takes_positions(model)
    if surgery.positions == "none":
        # Rotary positions are gone when all are equal: attention sees their differences alone.
        added = family_of(config, "positions").position_embedding
        for path, module in model.named_modules():
            if added is not None and path.split(".")[-1] == added:
                module.register_forward_hook(_nothing)


class Zeros(nn.Module):
    """Zeros [..., width] instead of what an MLP computes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..., any] -> zeros [..., width]."""
        return inputs.new_zeros(*inputs.shape[:-1], self.width)


class WithoutResiduals:
    """Hooks that take the residual stream out of one block.

    The block still adds; its sum is thrown away and the features are made of the captured parts,
    so that no precision is lost to a subtraction.
    """

    def __init__(self, block: nn.Module, family: Family, mlp: bool) -> None:
        self.parallel = family.middle is None
        self.with_mlp = mlp
        self.attention: Tensor | None = None
        self.mlp: Tensor | None = None
        block.get_submodule(family.attention).register_forward_hook(self._capture_attention)
        if family.middle is not None:
            block.get_submodule(family.middle).register_forward_pre_hook(self._give_attention)
        block.get_submodule(family.mlp[-1]).register_forward_hook(self._capture_mlp)
        block.register_forward_hook(self._put_together)

    def _capture_attention(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.attention = block_output(output)

    def _give_attention(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.attention is not None
        # OPT gives its MLP all rows of a batch in one.
        return (self.attention.reshape_as(inputs[0]), *inputs[1:])

    def _capture_mlp(self, module: nn.Module, inputs: Any, output: Any) -> None:
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


def _check_takes_positions(model: PreTrainedModel) -> None:
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


# -- where each family keeps its parts ---------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """The names of the parts of a block, which are its own children.

    Args:
        attention: the module whose output is added to the residual stream as attention's part;
            where a norm follows the attention, that norm.
        mlp: the modules of the MLP's part in their order; the output of the last is added.
        norms: the norms of the block, those inside its attention left aside.
        middle: the first module that takes what lies between attention and MLP; None where
            both always read the block's input, in parallel.
        parallel_if: configuration flags, of which any one makes the two parallel.
        only_if: a configuration flag without which the row does not hold.
        position_embedding: the module that adds vectors of positions before the first block.
        excluded: options that cannot be had in this family, with the reason.
    """

    attention: str = "self_attn"
    mlp: tuple[str, ...] = ("mlp",)
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    middle: str | None = "post_attention_layernorm"
    parallel_if: tuple[str, ...] = ()
    only_if: str | None = None
    position_embedding: str | None = None
    excluded: Mapping[str, str] = field(default_factory=dict)


_LLAMA = Family()
_GPT2 = Family(attention="attn", norms=("ln_1", "ln_2"), middle="ln_2", position_embedding="wpe")
_GEMMA2 = Family(
    attention="post_attention_layernorm",
    mlp=("mlp", "post_feedforward_layernorm"),
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    middle="pre_feedforward_layernorm",
)
_INSIDE = "its attention and MLP add the residual inside themselves"
_ALIBI = "its positions are a bias inside the attention (ALiBi)"

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "granite": _LLAMA,
    "phi3": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": replace(_LLAMA, parallel_if=("use_parallel_residual",)),
    "gpt_neox": replace(_LLAMA, attention="attention", parallel_if=("use_parallel_residual",)),
    "falcon": replace(
        _LLAMA,
        attention="self_attention",
        norms=("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp"),
        parallel_if=("parallel_attn", "new_decoder_architecture"),
    ),
    "phi": replace(_LLAMA, norms=("input_layernorm",), middle=None),
    "cohere": replace(_LLAMA, norms=("input_layernorm",), middle=None),
    "gpt2": _GPT2,
    "gpt_neo": _GPT2,
    "gptj": replace(_GPT2, norms=("ln_1",), middle=None, position_embedding=None),
    "opt": Family(
        mlp=("fc1", "fc2"),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        middle="final_layer_norm",
        only_if="do_layer_norm_before",
        position_embedding="embed_positions",
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "olmo2": replace(
        _GEMMA2, norms=("post_attention_layernorm", "post_feedforward_layernorm"), middle="mlp"
    ),
    "bloom": replace(
        _LLAMA,
        attention="self_attention",
        excluded={"mlp": _INSIDE, "residuals": _INSIDE, "positions": _ALIBI},
    ),
    "mpt": Family(
        attention="attn",
        mlp=("ffn",),
        norms=("norm_1", "norm_2"),
        middle="norm_2",
        excluded={"mlp": _INSIDE, "residuals": _INSIDE, "positions": _ALIBI},
    ),
}


def family_of(config: PretrainedConfig, option: str) -> Family:
    """The row for a model, as this model's own configuration makes it.

    Args:
        option: the surgery that is asked for, named in the error.

    Raises:
        InputError: there is no row for the model, or the row excludes the option.
    """
    kind = config.model_type
    family = FAMILIES.get(kind)
    if family is None:
        raise InputError(
            f"--model.transformer.{option}: it is not known where a {kind} keeps its parts; "
            f"add a row {kind!r} to FAMILIES in lightning_inversion/transformer/surgery.py, "
            f"or choose one of {', '.join(sorted(FAMILIES))}."
        )
    reason = family.excluded.get(option)
    if reason is None and family.only_if is not None and not getattr(config, family.only_if):
        reason = f"this one is built differently ({family.only_if} is off)"
    if reason is None and option == "positions" and getattr(config, "alibi", False):
        reason = _ALIBI
    if reason is not None:
        raise InputError(
            f"--model.transformer.{option}: it cannot be changed in a {kind}, because {reason}; "
            "leave it at its default, or choose another model."
        )
    if any(getattr(config, flag, False) for flag in family.parallel_if):
        return replace(family, middle=None)
    return family
