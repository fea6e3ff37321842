"""Continuous stand-ins for the next token, moved by the gradient, as a proposer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_inversion.errors import InputError
from lightning_inversion.proposers.nearest_to_input import NEARNESS
from lightning_inversion.proposers.open_positions import OpenPositions
from lightning_inversion.proposers.proposals import Proposals, Proposer


class GradientProxy(Proposer):
    """Tokens near an embedding that descends towards the target's features.

    Where the first rounds of candidates have failed, one proxy starts at the corrected linear guess
    and moves a few steps of Adam in each round, on the cosine distance of standardised features. If
    it finds nothing, several start together: half of them at the wrong candidates whose features
    came closest to the target, from where a hard token is found twice as often as from a random
    one, and half at random tokens. Prefixes are kept and proxies lie side by side, so that a step
    runs one token for each.

    Args:
        waits: rounds at a position that must have failed before the first proxy starts.
        steps: steps in each round.
        learning_rate: in std of the embedding.
        rounds_alone: rounds after which the first proxy is joined by the others.
        restart: rounds after which proxies that found nothing start again.
        proxies: how many start together.
        nearness: weight of the squared distance to the nearest proxy, in std of the embedding, in
            the log-likelihood.
    """

    def __init__(
        self,
        waits: int = 4,
        steps: int = 5,
        learning_rate: float = 0.6,
        rounds_alone: int = 2,
        restart: int = 6,
        proxies: int = 8,
        nearness: float = NEARNESS,
    ) -> None:
        whole = (waits, steps, rounds_alone, restart, proxies)
        if min(whole) < 1 or min(learning_rate, nearness) <= 0:
            given = ", ".join(map(str, (*whole, learning_rate, nearness)))
            raise InputError(
                "--model.recovery: waits, steps, rounds_alone, restart and proxies must be at "
                f"least 1, learning_rate and nearness positive; they are {given}."
            )
        self.waits, self.steps, self.learning_rate = waits, steps, learning_rate
        self.rounds_alone, self.restart = rounds_alone, restart
        self.proxies, self.nearness = proxies, nearness

    def begin(self, search: OpenPositions) -> Proposals:
        return DescendingProxies(search, self)


class DescendingProxies(Proposals):
    """The proxies of a batch.

    Attributes:
        proxies: ``[B, P, D]`` the vectors of each row's proxies.
    """

    def __init__(self, search: OpenPositions, settings: GradientProxy) -> None:
        super().__init__(search, settings.name)
        self._settings = settings
        rows, device = len(search.target), search.target.device
        shape = (rows, settings.proxies, search.transformer.embedding.width)
        self.proxies, self._mean, self._square = (
            torch.zeros(shape, device=device) for _ in range(3)
        )
        self._taken = torch.zeros(rows, dtype=torch.long, device=device)
        self._random = torch.Generator().manual_seed(0)

    def update(self, rows: Tensor) -> None:
        """Start the proxies of a new position, and move those of an old one by some steps."""
        for members, count in self._by_count(rows):
            rounds = self.search.rounds[members]
            self._start_first(members[rounds <= self._settings.waits])
            joined = rounds - self._settings.waits - self._settings.rounds_alone
            again = (joined >= 0) & (joined % self._settings.restart == 0)
            self._start_all(members[again])
            moving = members[rounds > 0]
            if len(moving):
                for _ in range(self._settings.steps):
                    self._step(moving, count)

    def scores(self, rows: Tensor) -> Tensor:
        """Log-likelihood by the distance to the nearest proxy."""
        scores = torch.empty(len(rows), self.search.tried.shape[1], device=rows.device)
        single = self._single(rows)
        for members, count in ((single, 1), (~single, self._settings.proxies)):
            if members.any():
                scores[members] = self._nearness(rows[members], count)
        return scores

    def _single(self, rows: Tensor) -> Tensor:
        return self.search.rounds[rows] < self._settings.waits + self._settings.rounds_alone

    def _by_count(self, rows: Tensor) -> list[tuple[Tensor, int]]:
        """Rows with one proxy, and rows with all of them."""
        single = self._single(rows)
        groups = ((rows[single], 1), (rows[~single], self._settings.proxies))
        return [(members, count) for members, count in groups if len(members)]

    def _nearness(self, rows: Tensor, count: int) -> Tensor:
        embedding, tried = self.search.transformer.embedding, self.search.tried[rows]
        nearest = torch.full(tried.shape, -torch.inf, device=rows.device)
        for proxy in self.proxies[rows, :count].unbind(1):
            near = embedding.nearness(proxy).masked_fill_(tried, -1e9)
            # Each proxy's nearest untried token is as good as another's: one that has come to rest
            # beside a wrong token must not hide what the others are near to.
            nearest = torch.maximum(nearest, near - near.amax(1, keepdim=True))
        return nearest * (2 * self._settings.nearness / embedding.std**2)

    def _start_first(self, rows: Tensor) -> None:
        """The first proxy starts at the guess."""
        if len(rows):
            self.proxies[rows, 0] = self.search.guess(rows)
            self._reset(rows)

    def _start_all(self, rows: Tensor) -> None:
        """Half of the proxies start where a candidate came close, half at random tokens."""
        if not len(rows):
            return
        embedding, proxies = self.search.transformer.embedding, self._settings.proxies
        near = self.search.closest(rows, (proxies + 1) // 2)
        size = (len(rows), proxies - near.shape[1])
        random = torch.randint(embedding.vocabulary_size, size, generator=self._random)
        self.proxies[rows] = torch.cat([near, embedding(random.to(rows.device))], dim=1)
        self._reset(rows)

    def _reset(self, rows: Tensor) -> None:
        self._mean[rows] = self._square[rows] = 0.0
        self._taken[rows] = 0

    def _step(self, rows: Tensor, count: int) -> None:
        """One step of Adam for the first ``count`` proxies of each row."""
        search, probe = self.search, self.search.probe
        positions = search.positions(rows)
        target = probe.standardize(search.target_at(rows), positions)[:, None]
        with torch.enable_grad():
            leaf = self.proxies[rows, :count].requires_grad_()
            features = search.prefix.candidates(rows, leaf)
            standard = probe.standardize(features, positions[:, None].expand(-1, count))
            distance = 1 - cosine_similarity(standard, target, dim=-1)
            (gradient,) = torch.autograd.grad(distance.sum(), leaf)
        self._taken[rows] += 1
        taken = self._taken[rows][:, None, None]
        mean = self._mean[rows, :count].lerp(gradient, 0.1)
        square = self._square[rows, :count].lerp(gradient.square(), 0.001)
        self._mean[rows, :count], self._square[rows, :count] = mean, square
        direction = (mean / (1 - 0.9**taken)) / ((square / (1 - 0.999**taken)).sqrt() + 1e-12)
        rate = self._settings.learning_rate * search.transformer.embedding.std
        self.proxies[rows, :count] -= rate * direction
