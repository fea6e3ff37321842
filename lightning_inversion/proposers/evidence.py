"""``Evidence``: what wrong candidates have shown of the right one."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.linear_probe import LinearProbe

_KEPT = 16
"""How many of the wrong candidates that came closest are kept at a position."""
_STORED = ("_errors", "_closest", "_corrected")


class Evidence:
    """The wrong candidates that came closest at the open position of each of B rows.

    Each wrong candidate shows by how much the linear probe misses in this context: the probe's mean
    guess for such a token, plus its difference between target and candidate, is a guess without
    that miss (a secant step).

    Args:
        probe: of the model.
        embedding: of the model.
        rows: B.
        device: of the rows.
    """

    def __init__(
        self, probe: LinearProbe, embedding: TokenEmbedding, rows: int, device: torch.device
    ) -> None:
        self.probe, self.embedding = probe, embedding
        self._errors = torch.full((rows, _KEPT), torch.inf, device=device)
        self._closest = torch.zeros(rows, _KEPT, embedding.width, device=device)
        self._corrected = torch.zeros_like(self._closest)

    def to_checkpoint(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {name: getattr(self, name) for name in _STORED}

    def restore(self, stored: dict[str, Tensor]) -> None:
        """Continue from what a checkpoint holds."""
        for name in _STORED:
            setattr(self, name, stored[name].to(self._errors.device))

    def forget(self, rows: Tensor) -> None:
        """A new position begins in ``rows``."""
        self._errors[rows] = torch.inf

    def corrected(self, rows: Tensor, positions: Tensor, guess: Tensor) -> Tensor:
        """The guess ``[R, D]``, corrected where there is evidence.

        Closer candidates weigh more. A first token has no context, so its guess is not corrected.
        """
        errors = self._errors[rows]
        known = torch.isfinite(errors)
        squares = errors.square()
        middle = squares.masked_fill(~known, torch.nan).nanmedian(dim=1, keepdim=True).values
        weights = torch.softmax(-squares / (0.3 * middle).clamp_min(1e-12), dim=1)
        weights = weights.masked_fill(~known, 0.0)
        corrected = (weights[..., None] * self._corrected[rows]).sum(1)
        in_context = known.any(1) & (positions > 0)
        return torch.where(in_context[:, None], corrected, guess)

    def closest(self, rows: Tensor, count: int, guess: Tensor) -> Tensor:
        """Embeddings ``[R, K, D]`` of the closest, nearest first; ``guess`` [R, D] fills the rest.

        K is ``count``, or 16.
        """
        known = torch.isfinite(self._errors[rows, :count])[..., None]
        return torch.where(known, self._closest[rows, :count], guess[:, None])

    def keep(
        self, rows: Tensor, positions: Tensor, target: Tensor, ids: Tensor, features: Tensor
    ) -> None:
        """Keep what wrong tokens show.

        Args:
            rows: ``[R]``.
            positions: ``[R]`` where they were run.
            target: ``[R, F]`` what they should have reproduced.
            ids: ``[R, K]``.
            features: ``[R, K, F]``.
        """
        if not len(rows):
            return
        at = positions[:, None].expand(ids.shape)
        distance = self.probe.standardize(features, at) - self.probe.standardize(
            target[:, None], at[:, :1]
        )
        errors = torch.linalg.vector_norm(distance, dim=-1)
        closest = errors.topk(min(_KEPT, ids.shape[1]), dim=1, largest=False).indices
        pick = torch.arange(len(rows), device=rows.device)[:, None]
        vectors = self.embedding(ids[pick, closest])
        corrected = (
            self.probe.expected(vectors, at[pick, closest])
            + self.probe(target, positions)[:, None]
            - self.probe(features[pick, closest], at[pick, closest])
        )
        errors = torch.cat([self._errors[rows], errors[pick, closest]], dim=1)
        order = errors.argsort(dim=1, stable=True)[:, :_KEPT]
        self._errors[rows] = errors.gather(1, order)
        self._closest[rows] = torch.cat([self._closest[rows], vectors], dim=1)[pick, order]
        self._corrected[rows] = torch.cat([self._corrected[rows], corrected], dim=1)[pick, order]
