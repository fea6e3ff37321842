"""Changes made to a model or to the recipe: which of them carries the effect of training."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_inversion.inputs import MeanInitializer, PromptInitializer
from lightning_inversion.ladder.mechanism import jacobians, random_ids
from lightning_inversion.ladder.recipe import Recipe
from lightning_inversion.objectives import L1, Objective
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.truncated import TruncatedTransformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING, NORMS = r"wte\.|embed_tokens\.", r"\.ln_\d\.|layernorm\."
ATTENTION, MLP = r"\.attn\.|self_attn\.", r"\.mlp\."
MATRICES = r"(\.h|\.layers)\.\d.*(attn|mlp).*weight"
BLOCKS = r"\.h\.\d|\.layers\.\d|wpe\."


def exchanged(model: PreTrainedModel, other: PreTrainedModel, pattern: str) -> PreTrainedModel:
    """A copy of a model whose parameters with a matching name are another's of the same shape.

    Args:
        model: is left as it is.
        other: gives the parameters.
        pattern: a regular expression that is searched in the names.
    """
    copy, given = deepcopy(model), dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if re.search(pattern, name):
                parameter.copy_(given[name])
    return copy


def scaled(model: PreTrainedModel, size: Callable[[str, Tensor], Any]) -> PreTrainedModel:
    """A copy of a model whose blocks' weight matrices are multiplied by factors.

    Args:
        model: is left as it is.
        size: from the name of a matrix and the matrix to its factor.
    """
    copy = deepcopy(model)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if re.search(MATRICES, name):
                parameter.mul_(size(name, parameter))
    return copy


def with_embedding(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A copy of a model whose embedding ``[V, D]`` is changed."""
    copy = deepcopy(model)
    weight = copy.get_input_embeddings().weight
    assert isinstance(weight, nn.Parameter)
    with torch.no_grad():
        weight.copy_(change(weight))
    return copy


def even_rows(matrix: Tensor) -> Tensor:
    """Rows of one norm, the root mean square of the old ones."""
    size = matrix.square().sum(1).mean().sqrt()
    rows: Tensor = nn.functional.normalize(matrix, dim=1) * size
    return rows


def whitened(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are equal; its size stays."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    even: Tensor = left @ right * values.square().mean().sqrt()
    return even


class Mapped(Objective):
    """Another objective on features times a matrix.

    Args:
        matrices: ``[2, F, K]`` for position 0 and for later ones.
        objective: of what comes out.
    """

    def __init__(self, matrices: Tensor, objective: Objective) -> None:
        super().__init__()
        self.matrices, self.objective = matrices, objective

    def forward(self, generated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The distance of each row ``[B]``."""
        distance: Tensor = self.objective(self._mapped(generated), self._mapped(target), mask)
        return distance

    def _mapped(self, features: Tensor) -> Tensor:
        first, later = self.matrices
        return torch.cat([features[:, :1] @ first, features[:, 1:] @ later], dim=1)


@torch.no_grad()
def without_largest(transformer: TruncatedTransformer) -> Tensor:
    """``[2, F, F]`` leaves out the feature with the largest absolute value over random tokens."""
    features = transformer.features_of(random_ids(transformer))
    weights = torch.ones(2, features.shape[-1])
    weights[:, features.abs().amax((0, 1)).argmax()] = 0.0
    return torch.diag_embed(weights)


@torch.no_grad()
def one_over_std(transformer: TruncatedTransformer) -> Tensor:
    """``[2, F, F]`` divides each feature by its std over random tokens."""
    features = transformer.features_of(random_ids(transformer, rows=256))
    later = features[:, 1:].flatten(0, 1)
    std = torch.stack([features[:, 0].std(0), later.std(0)])
    return torch.diag_embed(1 / std.clamp_min(1e-6))


def through_probe(transformer: TruncatedTransformer) -> Tensor:
    """``[2, F, D]`` the linear probe: after it the Jacobian is nearly the identity."""
    probe = LinearProbe.fit(transformer)
    return probe.matrix / probe.std[..., None]


class Preconditioned(torch.optim.SGD):
    """SGD whose gradient ``[..., D]`` is multiplied by a matrix.

    Args:
        values: the parameter.
        matrix: ``[D, D]``.
    """

    def __init__(self, values: Any, matrix: Tensor) -> None:
        super().__init__(values, lr=1.0)
        self.matrix = matrix

    def step(self, closure: Any = None) -> Any:
        """One step by the multiplied gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.grad @ self.matrix
        return super().step(closure)


def inverse_curvature(transformer: TruncatedTransformer) -> Tensor:
    """``[D, D]`` the inverse of the mean J'J over random tokens: Gauss-Newton's step."""
    ids = random_ids(transformer, rows=64, length=8)
    found = jacobians(transformer, ids, 4).double()
    curvature = (found.mT @ found).mean(0)
    curvature.diagonal().add_(1e-3 * curvature.diagonal().mean())
    return curvature.inverse().float()


@dataclass(frozen=True)
class Intervention:
    """A change to a model or to the recipe.

    Attributes:
        name: in rows.
        model: from a model and the one at the other end of its training to another model.
        recipe: from the truncated model to the recipe's changed parts.
        decoder: which reads the tokens.
        longer: how many times as many iterations.
    """

    name: str
    model: Callable[[PreTrainedModel, PreTrainedModel], PreTrainedModel] | None = None
    recipe: Callable[[TruncatedTransformer], dict[str, object]] | None = None
    decoder: str = "pinv"
    longer: int = 1


def _exchange(name: str, pattern: str) -> Intervention:
    return Intervention(name, lambda model, other: exchanged(model, other, pattern))


def _change(name: str, change: Callable[[Tensor], Tensor]) -> Intervention:
    return Intervention(name, lambda model, _: with_embedding(model, change))


def _of_other_size(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    size = other.get_input_embeddings().weight.std() / model.get_input_embeddings().weight.std()  # type: ignore[operator]
    return with_embedding(model, lambda matrix: matrix * size)


def _blocks_of_other_size(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    given = dict(other.named_parameters())
    return scaled(model, lambda name, matrix: given[name].norm() / matrix.norm())


def _adam(values: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(values, lr=1.0)  # type: ignore[arg-type]


def _preconditioned(model: TruncatedTransformer) -> dict[str, object]:
    matrix = inverse_curvature(model)
    return {"optimizer": lambda values: Preconditioned(values, matrix)}


INTERVENTIONS = (
    Intervention("none"),
    _exchange("blocks exchanged", BLOCKS),
    Intervention("blocks of the other size", _blocks_of_other_size),
    Intervention("blocks times 0.35", lambda model, _: scaled(model, lambda *_: 0.35)),
    _exchange("embedding exchanged", EMBEDDING),
    _change("embedding whitened", whitened),
    Intervention(
        "starts near the prompt",
        recipe=lambda model: {"initializer": PromptInitializer(noise=model.embedding.std)},
    ),
    Intervention(
        "starts like an embedding", recipe=lambda _: {"initializer": MeanInitializer(1.0)}
    ),
    Intervention(
        "largest channel left out",
        recipe=lambda model: {"objective": Mapped(without_largest(model), L1())},
    ),
    _exchange("MLP exchanged", MLP),
    _exchange("attention exchanged", ATTENTION),
    Intervention("steps by the inverse Jacobian", recipe=lambda model: _preconditioned(model)),
    Intervention("embedding of the other size", _of_other_size),
    Intervention("read by the nearest embedding", decoder="nearest"),
    _exchange("norms exchanged", NORMS),
    _change("embedding rows of one norm", even_rows),
    Intervention(
        "features through the probe",
        recipe=lambda model: {"objective": Mapped(through_probe(model), L1())},
    ),
    Intervention(
        "features in std", recipe=lambda model: {"objective": Mapped(one_over_std(model), L1())}
    ),
    Intervention("positions weigh the same", recipe=lambda _: {"objective": L1(relative=True)}),
    Intervention("Adam", recipe=lambda _: {"optimizer": _adam}),
    Intervention(
        "Adam, through the probe, starts like an embedding, nearest",
        recipe=lambda model: {
            "optimizer": _adam,
            "initializer": MeanInitializer(1.0),
            "objective": Mapped(through_probe(model), L1()),
        },
        decoder="nearest",
    ),
    Intervention(
        "inverse Jacobian, starts near the prompt",
        recipe=lambda model: {
            **_preconditioned(model),
            "initializer": PromptInitializer(noise=model.embedding.std),
        },
    ),
    Intervention("ten times the iterations", longer=10),
)
"""In the order in which they run: a stage that is stopped has done those that moved most first."""
BLOCK_CHANGES = ("blocks exchanged", "blocks of the other size", "blocks times 0.35")
"""Those of the blocks' parameters, which are made on the pretrained model, too."""


def changed(base: Recipe, intervention: Intervention, model: TruncatedTransformer) -> Recipe:
    """The recipe with what the intervention changes of it."""
    more = {} if intervention.recipe is None else intervention.recipe(model)
    iterations = intervention.longer * base.iterations
    return replace(base, **more, iterations=iterations)  # type: ignore[arg-type]
