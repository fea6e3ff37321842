"""The source's recipe on a model in memory, at several learning rates side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.decoding import CosineDecoder, L2Decoder, PinvDecoder, decode
from lightning_inversion.inputs import EmbeddingInput, Initializer, NormalInitializer
from lightning_inversion.inversion import Inversion, MakeOptimizer, linear_rate
from lightning_inversion.metrics import token_accuracy
from lightning_inversion.objectives import L1, Objective
from lightning_inversion.schedules import AllPositions
from lightning_inversion.transformer.truncated import TruncatedTransformer

PRINTED = 1.0
"""The source's learning rate, which falls linearly to a hundredth."""
RATES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Those that a tuned one is chosen from."""
_LAST = 0.01


class Rated(Objective):
    """Another objective times a factor of each row: under SGD, a learning rate for each row.

    Args:
        rates: ``[B]`` the factors.
        objective: of which each row's distance is multiplied.
    """

    def __init__(self, rates: Tensor, objective: Objective) -> None:
        super().__init__()
        self.rates, self.objective = rates, objective
        self.by_row = False  # the factor follows from the row's number

    def forward(self, generated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The distance of each row ``[B]`` times its factor."""
        distance: Tensor = self.rates * self.objective(generated, target, mask)
        return distance


@dataclass(frozen=True)
class Recipe:
    """What the recipe is made of; its defaults are those of ``configs/original/original.yaml``.

    Attributes:
        iterations: N.
        objective: default the summed L1.
        initializer: default N(1/2, 1/20).
        optimizer: made with a learning rate of 1; default SGD.
        seed: of the initial values.
    """

    iterations: int = 300
    objective: Objective | None = None
    initializer: Initializer | None = None
    optimizer: MakeOptimizer = lambda values: torch.optim.SGD(values, lr=1.0)
    seed: int = 0


@dataclass(frozen=True)
class RecipeResult:
    """Where the recipe ends, for each rate and each prompt.

    Attributes:
        right: by decoder, ``[R, N]`` shares of tokens right.
        error: ``[R, N, T]`` the distance from the true embedding.
        step: ``[R, N, T]`` how far the last iteration moved a position.
        first: ``[R, N]`` whether position 0 is right, by the pseudo-inverse.
        values: ``[R, N, T, D]`` the input.
    """

    right: dict[str, Tensor]
    error: Tensor
    step: Tensor
    first: Tensor
    values: Tensor


DECODERS = {"pinv": PinvDecoder(), "nearest": L2Decoder(), "cosine": CosineDecoder()}


def run_recipe(
    transformer: TruncatedTransformer, ids: Tensor, rates: Sequence[float], recipe: Recipe
) -> RecipeResult:
    """Run the recipe on prompts ``[N, T]`` at each rate, from the same initial values.

    A row is what ``fit --config configs/original/original.yaml`` gives at that learning rate.
    """
    N, T = ids.shape
    rows = [(number, None, own) for _ in rates for number, own in enumerate(ids.tolist())]
    inversion = Inversion(
        learnable=EmbeddingInput(recipe.initializer or NormalInitializer()),
        objective=Rated(torch.tensor(rates).repeat_interleave(N), recipe.objective or L1()),
        optimizer=recipe.optimizer,
        schedule=AllPositions(),
        decoder=PinvDecoder(),
        iterations=recipe.iterations,
        seed=recipe.seed,
    ).use(transformer)
    inversion.begin(PromptBatch.collate(rows))
    state = inversion.state
    before = state.values.detach()
    optimizer = inversion.make_optimizer([state.values])
    for iteration in range(recipe.iterations):
        for group in optimizer.param_groups:
            group["lr"] = linear_rate(1.0, _LAST, iteration, recipe.iterations)
        before = state.values.detach().clone()
        inversion.iterate(optimizer)
    values, own, mask = state.values.detach(), ids.repeat(len(rates), 1), state.batch.mask
    shape = (len(rates), N)
    best = {
        name: decode(values, inversion.learnable, inversion.embedding, decoder, 1, mask=mask).best
        for name, decoder in DECODERS.items()
    }
    return RecipeResult(
        {name: token_accuracy(found, own, mask).view(shape) for name, found in best.items()},
        (values - inversion.embedding(own)).norm(dim=-1).view(*shape, T),
        (values - before).norm(dim=-1).view(*shape, T),
        (best["pinv"] == own)[:, 0].view(shape),
        values.view(*shape, T, -1),
    )


def tuned_rate(outcome: RecipeResult, rates: Sequence[float], decoder: str = "pinv") -> float:
    """The rate with the most tokens right; of equal ones that nearest to the source's."""
    means = outcome.right[decoder].mean(1)
    best = [rate for rate, mean in zip(rates, means, strict=True) if mean == means.max()]
    return min(best, key=lambda rate: abs(torch.tensor(rate / PRINTED).log().item()))
