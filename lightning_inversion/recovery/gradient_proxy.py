"""Continuous stand-ins for the next token, moved by the gradient, as a candidate order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_inversion.errors import InputError
from lightning_inversion.recovery.proposals import Proposer
from lightning_inversion.recovery.search import PrefixSearch


class GradientProxy(Proposer):
    """Tokens near an embedding that descends towards the target's features.

    When a first round of candidates has failed, one proxy starts at the corrected linear guess and
    moves a few steps of Adam in each round, on the cosine distance of standardised features. If it
    finds nothing, many start together: half of them at the wrong candidates whose features came
    closest to the target, from where a hard token is found twice as often as from a random one, and
    half at random tokens, so that no start is only ever the last one's neighbour. Prefixes are kept
    and proxies lie side by side, so a step runs one token for each.

    Args:
        steps: steps in each round.
        learning_rate: in units of the embedding's spread.
        alone: rounds after which the first proxy is joined by the others.
        restart: rounds after which proxies that found nothing start again.
        proxies: how many start together.
        sharpness: weight of the squared distance to the nearest proxy, in units of the embedding's
            spread, in the log-likelihood.
    """

    def __init__(
        self,
        steps: int = 5,
        learning_rate: float = 0.6,
        alone: int = 2,
        restart: int = 6,
        proxies: int = 8,
        sharpness: float = 0.15,
    ) -> None:
        if min(steps, alone, restart, proxies) < 1 or min(learning_rate, sharpness) <= 0:
            raise InputError(
                "--model.recovery: steps, alone, restart and proxies must be at least 1, "
                f"learning_rate and sharpness positive; they are {steps}, {alone}, {restart}, "
                f"{proxies}, {learning_rate} and {sharpness}."
            )
        self.steps, self.learning_rate, self.alone = steps, learning_rate, alone
        self.restart, self.proxies, self.sharpness = restart, proxies, sharpness

    def begin(self, search: PrefixSearch) -> None:
        """Room for the proxies of each text."""
        shape = (search.rows, self.proxies, search.transformer.embedding.width)
        device = search.target.device
        self._proxy, self._mean, self._square = (torch.zeros(shape, device=device) for _ in "pms")
        self._taken = torch.zeros(search.rows, dtype=torch.long, device=device)
        self._random = torch.Generator().manual_seed(0)

    def speaks(self, later: bool) -> bool:
        """Once a first round has shown where to start."""
        return later

    def scores(self, search: PrefixSearch, rows: Tensor) -> Tensor:
        """Of the proxies after this round's steps."""
        alone = search.rounds[rows] <= self.alone
        scores = torch.empty(len(rows), search.tried.shape[1], device=rows.device)
        for members, count in ((alone, 1), (~alone, self.proxies)):
            if members.any():
                scores[members] = self._scores(search, rows[members], count)
        return scores

    def _scores(self, search: PrefixSearch, rows: Tensor, count: int) -> Tensor:
        rounds = search.rounds[rows]
        self._start_alone(search, rows[rounds <= 1])
        joined = rounds - 1 - self.alone
        self._start_together(search, rows[(joined >= 0) & (joined % self.restart == 0)])
        moving = rows[rounds > 0]
        if len(moving):
            for _ in range(self.steps):
                self._step(search, moving, count)
        embedding, tried = search.transformer.embedding, search.tried[rows]
        nearest = torch.full(tried.shape, -torch.inf, device=rows.device)
        for proxy in self._proxy[rows, :count].unbind(1):
            near = (embedding.dot(proxy) - embedding.norms.square() / 2).masked_fill_(tried, -1e9)
            # Each proxy's nearest untried token is as good as another's: one that has come to rest
            # beside a wrong token must not hide what the others are near to.
            nearest = torch.maximum(nearest, near - near.amax(1, keepdim=True))
        return nearest * (2 * self.sharpness / embedding.std**2)

    def _start_alone(self, search: PrefixSearch, rows: Tensor) -> None:
        """The first proxy starts at the guess."""
        if len(rows):
            self._proxy[rows, 0] = search.guess(rows)
            self._forget(rows)

    def _start_together(self, search: PrefixSearch, rows: Tensor) -> None:
        """Half of the proxies start where a candidate came close, half anywhere."""
        if not len(rows):
            return
        embedding = search.transformer.embedding
        near = search.closest(rows, (self.proxies + 1) // 2)
        size = (len(rows), self.proxies - near.shape[1])
        anywhere = torch.randint(embedding.vocabulary_size, size, generator=self._random)
        self._proxy[rows] = torch.cat([near, embedding(anywhere.to(rows.device))], dim=1)
        self._forget(rows)

    def _forget(self, rows: Tensor) -> None:
        self._mean[rows] = self._square[rows] = 0.0
        self._taken[rows] = 0

    def _step(self, search: PrefixSearch, rows: Tensor, count: int) -> None:
        """One step of Adam for the first ``count`` proxies of each row."""
        positions = search.positions(rows)
        target = search.probe.standardize(search.target_at(rows), positions)[:, None]
        with torch.enable_grad():
            leaf = self._proxy[rows, :count].requires_grad_()
            features = search.prefix.candidates(rows, leaf)
            standard = search.probe.standardize(features, positions[:, None].expand(-1, count))
            distance = 1 - cosine_similarity(standard, target, dim=-1)
            (gradient,) = torch.autograd.grad(distance.sum(), leaf)
        self._taken[rows] += 1
        taken = self._taken[rows][:, None, None]
        mean = self._mean[rows, :count].lerp(gradient, 0.1)
        square = self._square[rows, :count].lerp(gradient.square(), 0.001)
        self._mean[rows, :count], self._square[rows, :count] = mean, square
        direction = (mean / (1 - 0.9**taken)) / ((square / (1 - 0.999**taken)).sqrt() + 1e-12)
        rate = self.learning_rate * search.transformer.embedding.std
        self._proxy[rows, :count] -= rate * direction
