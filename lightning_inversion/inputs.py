"""The learnable input: the one thing that is optimised, its initializers and its perturbed targets.

``EmbeddingInput`` is the source's *indirect* method (the embedding is the leaf),
``VocabularyInput`` its *direct* method (section 'Direct Input Representation').
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
class InitializerInputs:
    """What an initializer may use.

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
    """Where an input begins: standard normal noise -> initial values, both ``[B, T, C]``."""

    @abstractmethod
    def __call__(self, noise: Tensor, given: InitializerInputs) -> Tensor:
        """Initial values from noise."""


class NormalInitializer(Initializer):
    """Independent normal values: N(1/2, 1/20) as the source prints it.

    Args:
        mean: mean of each value.
        std: standard deviation of each value. The author's code uses mean 0 and std 1.
    """

    def __init__(self, mean: float = 0.5, std: float = 0.05) -> None:
        self.mean, self.std = mean, std

    def __call__(self, noise: Tensor, given: InitializerInputs) -> Tensor:
        return self.mean + self.std * noise


class MeanInitializer(Initializer):
    """The mean of the model's embeddings plus noise in units of their std.

    Args:
        std: noise to add, in std of the embedding; 0 starts every position at the mean.
    """

    def __init__(self, std: float = 0.0) -> None:
        if std < 0:
            raise InputError(f"initializer.std must not be negative, and is {std}.")
        self.std = std

    def __call__(self, noise: Tensor, given: InitializerInputs) -> Tensor:
        _check_width(self, noise, given.embedding)
        return given.embedding.mean + self.std * given.embedding.std * noise


class ProbeInitializer(Initializer):
    """The linear probe's guess of the embeddings from the target; see ``LinearProbe``.

    Args:
        std: noise to add, in std of the embedding.
    """

    def __init__(self, std: float = 0.0) -> None:
        if std < 0:
            raise InputError(f"initializer.std must not be negative, and is {std}.")
        self.std = std

    def __call__(self, noise: Tensor, given: InitializerInputs) -> Tensor:
        _check_width(self, noise, given.embedding)
        positions = torch.arange(noise.shape[1], device=noise.device).expand(noise.shape[:2])
        guess = given.probe()(given.features, positions)
        return guess + self.std * given.embedding.std * noise


class PromptInitializer(Initializer):
    """s * N(0, 1) + t * e: the prompt's own values under noise, to measure how wide its basin of
    attraction is.

    Args:
        noise: s, the size of the noise.
        target: t, the share of the prompt's own values.
    """

    def __init__(self, noise: float = 1.0, target: float = 1.0) -> None:
        self.noise, self.target = noise, target

    def __call__(self, noise: Tensor, given: InitializerInputs) -> Tensor:
        if given.values is None:
            raise InputError(
                "PromptInitializer needs known prompts; choose NormalInitializer or "
                "MeanInitializer for captured targets."
            )
        return self.noise * noise + self.target * given.values


def _check_width(initializer: Initializer, noise: Tensor, embedding: TokenEmbedding) -> None:
    if noise.shape[-1] != embedding.width:
        raise InputError(
            f"{type(initializer).__name__} is for an EmbeddingInput; choose NormalInitializer or "
            "PromptInitializer for --model.learnable VocabularyInput."
        )


class LearnableInput(ABC):
    """What is optimised: values ``[B, T, C]``, and how they become vectors ``[B, T, D]``.

    Args:
        initializer: where the values begin.
    """

    def __init__(self, initializer: Initializer) -> None:
        self.initializer = initializer

    @abstractmethod
    def value_size(self, embedding: TokenEmbedding) -> int:
        """C, the size of one position's values."""

    @abstractmethod
    def encode(self, ids: Tensor, embedding: TokenEmbedding) -> Tensor:
        """The values ``[..., C]`` that stand for tokens ``[...]``."""

    @abstractmethod
    def embed(self, values: Tensor, embedding: TokenEmbedding) -> Tensor:
        """Values ``[..., C]`` -> the vectors ``[..., D]`` that the transformer takes."""


class EmbeddingInput(LearnableInput):
    """Embeddings ``[B, T, D]`` are optimised: the source's indirect method.

    Args:
        initializer: where the embeddings begin.
    """

    def __init__(self, initializer: Initializer | None = None) -> None:
        super().__init__(initializer or ProbeInitializer())

    def value_size(self, embedding: TokenEmbedding) -> int:
        return embedding.width

    def encode(self, ids: Tensor, embedding: TokenEmbedding) -> Tensor:
        vectors: Tensor = embedding(ids)
        return vectors

    def embed(self, values: Tensor, embedding: TokenEmbedding) -> Tensor:
        return values


class VocabularyInput(LearnableInput):
    """A vector over the vocabulary for each position, ``[B, T, V]``: the source's direct method.

    Args:
        initializer: where the vectors begin.
        target: how a token is written as a vector: `one_hot` (`one_hot_value` at the token, 0
            elsewhere) or `pinv` (W+ E(a)).
        one_hot_value: the value of a one-hot vector at its token; the source uses 10.
    """

    def __init__(
        self,
        initializer: Initializer | None = None,
        target: Literal["one_hot", "pinv"] = "one_hot",
        one_hot_value: float = 10.0,
    ) -> None:
        super().__init__(initializer or NormalInitializer())
        self.target, self.one_hot_value = target, one_hot_value

    def value_size(self, embedding: TokenEmbedding) -> int:
        return embedding.vocabulary_size

    def encode(self, ids: Tensor, embedding: TokenEmbedding) -> Tensor:
        if self.target == "pinv":
            return embedding.unmix(embedding(ids))
        one_hot = torch.zeros(*ids.shape, embedding.vocabulary_size, device=ids.device)
        return one_hot.scatter_(-1, ids[..., None], self.one_hot_value)

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
    """a' = a + N(0, std), on the learnable input's own values (the source's choice).

    Args:
        std: standard deviation of the shift; the source's is 1/20.
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
        nearest = torch.stack([nearest_other(int(one), embedding) for one in token]).to(ids)
        return learnable.encode(ids.scatter(1, position, nearest[:, None]), embedding)


def nearest_other(token: int, embedding: TokenEmbedding) -> Tensor:
    """The id of the token with the nearest other embedding; duplicates of it do not count.

    The nearest by scores come first. Their differences are then taken one by one, because the
    rounding of scores is larger than the distance of rows that are nearly alike.
    """
    own = embedding(torch.tensor([token], device=embedding.matrix.device))
    scores = embedding.nearness(own)[0]
    scores[embedding.first_duplicate == embedding.first_duplicate[token]] = -torch.inf
    near = scores.topk(min(64, len(scores) - 1)).indices
    return near[(embedding(near) - own).norm(dim=1).argmin()]
