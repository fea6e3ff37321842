"""Where each family keeps the parts of a block: data for `surgery`, one row a family.

Loading, truncating and running need none of this. Names are those of the block's own children.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from transformers import PretrainedConfig

from lightning_inversion.errors import InputError


@dataclass(frozen=True)
class Family:
    """The anatomy of a block.

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
            f"add a row {kind!r} to FAMILIES in lightning_inversion/transformer/families.py, "
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
