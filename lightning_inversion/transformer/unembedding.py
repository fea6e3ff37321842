"""Logits -> the states after the final norm that gave them, by least squares.

A model has more tokens than features, so that its logits determine the state: V equations for D
numbers. Log-probabilities do too: they differ from logits by one constant for each position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.blocks import settings_of, text_config

_ROWS = 8192
_TOKENS = 4
_OFF = 1e-2
"""How far logits may be from those of the nearest state, as a share of their std."""


@dataclass(frozen=True)
class Unembedding:
    """The head of a model: logits = cap(scale * (W h + bias)).

    Attributes:
        matrix: W ``[V, D]``.
        bias: ``[V]``.
        scale: a factor that the model applies.
        cap: the value at which logits are capped softly (Gemma 2); None where they are not.
    """

    matrix: Tensor
    bias: Tensor
    scale: float
    cap: float | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> Unembedding:
        """The head of a model, checked on a few tokens.

        Raises:
            InputError: its logits do not follow from the states after its final norm in this way.
        """
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
            raise InputError("--data.logits needs a model whose head is one matrix; save states.")
        bias = getattr(head, "bias", None)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        caps = settings_of(text_config(model.config), "final_logit_softcapping")
        cap = float(caps[0]) if caps and caps[0] else None
        ids = torch.arange(_TOKENS, device=weight.device)[None]
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        logits = output.logits[0].float()
        plain = (output.hidden_states[-1][0] @ weight.T + bias).float()
        uncapped = logits if cap is None else _uncapped(logits, cap)
        scale = float((plain * uncapped).sum() / plain.square().sum().clamp_min(1e-30))
        if float((scale * plain - uncapped).std()) > _OFF * float(uncapped.std()):
            raise InputError(
                "--data.logits: the logits of this model are no linear map of its last hidden "
                "states; save the states."
            )
        return cls(weight, bias, scale, cap)

    @torch.no_grad()
    def states(self, logits: Tensor) -> Tensor:
        """The states ``[..., D]`` whose logits, up to a constant for each, are ``[..., V]``.

        Raises:
            InputError: they are the logits of no state of this model.
        """
        given = logits.reshape(-1, logits.shape[-1]).double()
        wanted = (given if self.cap is None else _uncapped(given, self.cap)) / self.scale
        wanted = wanted - self.bias.double()
        D = self.matrix.shape[1]
        gram = torch.zeros(D + 1, D + 1, dtype=torch.float64, device=given.device)
        products = torch.zeros(D + 1, len(given), dtype=torch.float64, device=given.device)
        for start in range(0, len(self.matrix), _ROWS):
            part = self.matrix[start : start + _ROWS].double()
            part = torch.cat([part, torch.ones_like(part[:, :1])], dim=1)
            gram.addmm_(part.T, part)
            products.addmm_(part.T, wanted[:, start : start + _ROWS].T)
        solved = torch.linalg.solve(gram, products)
        left = wanted.T - self.matrix.double() @ solved[:-1] - solved[-1]
        off = left.std(0) / wanted.T.std(0).clamp_min(1e-30)
        if not bool((off <= _OFF).all()):
            raise InputError(
                "--data.logits: the logits are those of no state of this model (the nearest "
                f"state's are off by {float(off.max()):.2g} std); give the model that made them, "
                "and logits of its whole vocabulary."
            )
        states: Tensor = solved[:-1].T.float().reshape(*logits.shape[:-1], D)
        return states


def _uncapped(logits: Tensor, cap: float) -> Tensor:
    return cap * (logits / cap).clamp(-1 + 1e-7, 1 - 1e-7).atanh()
