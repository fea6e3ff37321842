"""The learnable input: the one thing that is optimised, its starts and its shifted targets.

``EmbeddingInput`` is the document's *indirect* method (the embedding is the leaf),
``VocabularyInput`` its *direct* method (section 'Direct Input Representation').
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.linear_probe import LinearProbe


def row_noise(
    seed: int, indices: Sequence[int], lengths: Sequence[int], width: int, stream: str
) -> Tensor:
    """Standard normal noise that depends on each prompt alone, never on its batch.

    Args:
        seed: the run's seed.
        indices: number of each row's prompt in the whole data set.
        lengths: tokens in each row.
        width: size of the last axis.
        stream: what the noise is for; different streams are independent.

    Returns:
        ``[B, max(lengths), width]``, zero in the padding.
    """
    noise = torch.zeros(len(lengths), max(lengths), width)
    for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
        noise[row, :length] = torch.randn(
            length, width, generator=row_generator(seed, index, stream)
        )
    return noise


def row_generator(seed: int, index: int, stream: str) -> torch.Generator:
    """A generator for one prompt and one purpose, the same whatever the batch or process."""
    digest = hashlib.sha256(f"{seed}/{index}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Given:
    """What a start may look at.

    Attributes:
        embedding: the model's token embedding.
        features: ``[B, T, F]`` the target's features.
        probe: fits, when asked, the linear guess from features to embeddings.
        values: ``[B, T, C]`` the values of the prompt itself, where it is known.
    """

    embedding: TokenEmbedding
    features: Tensor
    probe: Callable[[], LinearProbe]
    values: Tensor | None


class Initializer(ABC):
    """Where an input begins: standard normal noise -> starting values, both ``[B, T, C]``."""

    @abstractmethod
    def __call__(self, noise: Tensor, given: Given) -> Tensor:
        """Turn noise into a start."""


class NormalInitializer(Initializer):
    """Independent normal values: N(1/2, 1/20) as the document prints it.

    Args:
        mean: mean of each value.
        std: standard deviation of each value. The author's code uses mean 0 and std 1.
    """

    def __init__(self, mean: float = 0.5, std: float = 0.05) -> None:
        self.mean, self.std = mean, std

    def __call__(self, noise: Tensor, given: Given) -> Tensor:
        return self.mean + self.std * noise


class MeanInitializer(Initializer):
    """The mean of the model's embeddings plus noise in units of their std.

    Args:
        std: standard deviations of the embedding to add; 0 starts every position at the mean.
    """

    def __init__(self, std: float = 0.0) -> None:
        if std < 0:
            raise InputError(f"initializer.std must not be negative, and is {std}.")
        self.std = std

    def __call__(self, noise: Tensor, given: Given) -> Tensor:
        _check_width(self, noise, given.embedding)
        return given.embedding.mean + self.std * given.embedding.std * noise


class ProbeInitializer(Initializer):
    """A linear guess of the embeddings from the target's features; see ``LinearProbe``.

    Args:
        std: standard deviations of the embedding to add as noise.
    """

    def __init__(self, std: float = 0.0) -> None:
        if std < 0:
            raise InputError(f"initializer.std must not be negative, and is {std}.")
        self.std = std

    def __call__(self, noise: Tensor, given: Given) -> Tensor:
        _check_width(self, noise, given.embedding)
        positions = torch.arange(noise.shape[1], device=noise.device).expand(noise.shape[:2])
        guess = given.probe()(given.features, positions)
        return guess + self.std * given.embedding.std * noise


class PromptInitializer(Initializer):
    """s * N(0, 1) + t * e: the prompt's own values under noise, to ask how wide its basin is.

    Args:
        noise: s, the size of the noise.
        target: t, the share of the prompt's own values.
    """

    def __init__(self, noise: float = 1.0, target: float = 1.0) -> None:
        self.noise, self.target = noise, target

    def __call__(self, noise: Tensor, given: Given) -> Tensor:
        if given.values is None:
            raise InputError(
                "PromptInitializer needs known prompts; choose NormalInitializer or MeanInitializer "
                "for captured targets."
            )
        return self.noise * noise + self.target * given.values


def _check_width(initializer: Initializer, noise: Tensor, embedding: TokenEmbedding) -> None:
    if noise.shape[-1] != embedding.width:
        raise InputError(
            f"{type(initializer).__name__} starts an EmbeddingInput; choose NormalInitializer or PromptInitializer for "
            "--model.learnable VocabularyInput."
        )


class LearnableInput(nn.Module, ABC):
    """The parameter ``values [B, T, C]`` and its reading as vectors ``[B, T, D]``.

    Args:
        initializer: where the values begin.
    """

    values: nn.Parameter
    held: Tensor

    def __init__(self, initializer: Initializer) -> None:
        super().__init__()
        self.initializer = initializer
        self.allocate((0, 0, 0))

    def allocate(self, shape: Sequence[int]) -> None:
        """Make room for values of ``shape`` [B, T, C], none of them held."""
        device = self.values.device if hasattr(self, "values") else None
        self.values = nn.Parameter(torch.zeros(*shape, device=device))
        self.register_buffer("held", torch.zeros(*shape[:2], dtype=torch.bool, device=device))

    @torch.no_grad()
    def begin(self, noise: Tensor, given: Given) -> None:
        """Initializer afresh from standard normal ``noise`` [B, T, C]."""
        self.allocate(noise.shape)
        self.values.copy_(self.initializer(noise, given))

    @abstractmethod
    def channels(self, embedding: TokenEmbedding) -> int:
        """C, the size of one position's values."""

    @abstractmethod
    def encode(self, ids: Tensor, embedding: TokenEmbedding) -> Tensor:
        """The values ``[..., C]`` that stand for tokens ``[...]``."""

    @abstractmethod
    def embed(self, values: Tensor, embedding: TokenEmbedding) -> Tensor:
        """Values ``[..., C]`` -> the vectors ``[..., D]`` that the transformer reads."""

    def forward(self, embedding: TokenEmbedding) -> Tensor:
        """The input as it stands, ``[B, T, D]``."""
        return self.embed(self.values, embedding)

    @torch.no_grad()
    def restore_held(self, before: Tensor) -> None:
        """Put held positions back to ``before`` [B, T, C]: momentum must not move them."""
        self.values.copy_(torch.where(self.held[..., None], before, self.values))


class EmbeddingInput(LearnableInput):
    """Embeddings ``[B, T, D]`` are optimised: the document's indirect method.

    Args:
        initializer: where the embeddings begin.
    """

    def __init__(self, initializer: Initializer | None = None) -> None:
        super().__init__(initializer or ProbeInitializer())

    def channels(self, embedding: TokenEmbedding) -> int:
        return embedding.width

    def encode(self, ids: Tensor, embedding: TokenEmbedding) -> Tensor:
        vectors: Tensor = embedding(ids)
        return vectors

    def embed(self, values: Tensor, embedding: TokenEmbedding) -> Tensor:
        return values


class VocabularyInput(LearnableInput):
    """A vector over the vocabulary for each position, ``[B, T, V]``: the document's direct method.

    Args:
        initializer: where the vectors begin.
        target: how a token is written as a vector: `one_hot` (`scale` at the token, 0 elsewhere)
            or `pinv` (W+ E(a)).
        scale: the value of a one-hot vector at its token; the document uses 10.
    """

    def __init__(
        self,
        initializer: Initializer | None = None,
        target: Literal["one_hot", "pinv"] = "one_hot",
        scale: float = 10.0,
    ) -> None:
        super().__init__(initializer or NormalInitializer())
        self.target, self.scale = target, scale

    def channels(self, embedding: TokenEmbedding) -> int:
        return embedding.vocabulary_size

    def encode(self, ids: Tensor, embedding: TokenEmbedding) -> Tensor:
        if self.target == "pinv":
            return embedding.unmix(embedding(ids))
        one_hot = torch.zeros(*ids.shape, embedding.vocabulary_size, device=ids.device)
        return one_hot.scatter_(-1, ids[..., None], self.scale)

    def embed(self, values: Tensor, embedding: TokenEmbedding) -> Tensor:
        return embedding.mix(values)


class Perturbation(ABC):
    """Makes the shifted input a' of the stopping criterion ||O(a_g) - O(a)|| < ||O(a') - O(a)||."""

    @abstractmethod
    def __call__(
        self, ids: Tensor, noise: Tensor, learnable: LearnableInput, embedding: TokenEmbedding
    ) -> Tensor:
        """The shifted values ``[B, T, C]`` of prompts ``ids [B, T]``; ``noise [B, T, C]``."""


class GaussianPerturbation(Perturbation):
    """a' = a + N(0, std), on the learnable input's own values (the document's choice).

    Args:
        std: standard deviation of the shift; the document's is 1/20.
    """

    def __init__(self, std: float = 0.05) -> None:
        if std <= 0:
            raise InputError(f"stopping.perturbation.std must be positive, and is {std}.")
        self.std = std

    def __call__(
        self, ids: Tensor, noise: Tensor, learnable: LearnableInput, embedding: TokenEmbedding
    ) -> Tensor:
        return learnable.encode(ids, embedding) + self.std * noise


class NeighbourPerturbation(Perturbation):
    """a' = the prompt with one token replaced by the token of the nearest other embedding.

    Harder than a Gaussian shift, whose size is arbitrary beside the distance between tokens. The
    token is the one at the position with the largest noise, so it depends on the prompt alone.
    """

    def __call__(
        self, ids: Tensor, noise: Tensor, learnable: LearnableInput, embedding: TokenEmbedding
    ) -> Tensor:
        position = noise[..., 0].abs().argmax(dim=1, keepdim=True)
        token = ids.gather(1, position)
        distance = torch.cdist(embedding(token).flatten(0, 1), embedding.matrix.float())
        distance[distance <= distance.amin(dim=1, keepdim=True) + 1e-6] = torch.inf
        return learnable.encode(ids.scatter(1, position, distance.argmin(1, True)), embedding)
