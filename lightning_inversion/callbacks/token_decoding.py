"""The tokens during a fit: a live table on a terminal, plain lines elsewhere, TensorBoard."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_inversion.callbacks.display import LiveDisplay
from lightning_inversion.decoding import TopTokens, first_of_equals
from lightning_inversion.errors import InputError
from lightning_inversion.metrics import token_accuracy
from lightning_inversion.module import InputInversion
from lightning_inversion.transformer.embedding import TokenEmbedding, best_tokens
from lightning_inversion.transformer.tokens import shown_tokens

_log = logging.getLogger(__name__)

_EARLY = (0, 5, 10, 20)
"""Iterations, from 0, after which a fit with the default schedule often verifies its last token."""

_SQUARE = 12
"""Pixels of a square's side."""
_NEAR_TO_FAR = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))
"""Colours of viridis, which colour-blind readers can distinguish."""


class TokenDecoding(LiveDisplay):
    """Decodes the input every few iterations and shows its best tokens.

    Verified tokens are green, wrong ones dim, others plain: right and not verified yet, or of a
    prompt that is not known. Below the prompts stand the best tokens of the first one, as in the
    source: line j holds the j-th best token of every position.

    Args:
        every: iterations between two decodings.
        top_k: how many tokens of each position are shown.
        prompts: how many prompts of a batch are decoded and shown; the accuracy is theirs. Scoring
            a vocabulary for every position of many prompts would cost more than iterations do.
        show: the terminal display; False leaves only TensorBoard.
        early: decode after a few of the first iterations as well, where fits often end.
    """

    def __init__(
        self,
        every: int = 50,
        top_k: int = 5,
        prompts: int = 8,
        show: bool = True,
        early: bool = True,
    ) -> None:
        if min(every, top_k, prompts) < 1:
            raise InputError(
                "decoding.every, decoding.top_k and decoding.prompts must be at least 1; they are "
                f"{every}, {top_k} and {prompts}."
            )
        super().__init__("iterations", show)
        self.every, self.top_k, self.prompts = every, top_k, prompts
        self.early = _EARLY if early else ()
        self._reported = -1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a bar for the epoch."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batches = f" of {len(data.batches)}" if trainer.world_size == 1 else ""
        self._bar.add_task(
            f"batch {trainer.current_epoch + 1}{batches}", total=trainer.num_training_batches
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decode and show: a few early iterations, then every few."""
        assert isinstance(pl_module, InputInversion)
        self._open(trainer)  # not before: measuring the model shows a bar of its own
        if self._live is not None and self._bar.task_ids:
            self._bar.update(self._bar.task_ids[0], completed=batch_idx + 1)
        if pl_module.state.is_empty:
            return
        if (batch_idx + 1) % self.every == 0 or batch_idx in self.early:
            self._report(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decode and show the batch's final tokens, if its last iteration was not shown."""
        assert isinstance(pl_module, InputInversion)
        if not pl_module.state.is_empty and self._reported != pl_module.step:
            self._open(trainer)
            self._report(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the live display."""
        self._close()

    @rank_zero_only
    def _report(self, trainer: Trainer, module: InputInversion) -> None:
        self._reported = module.step
        if not self.show and trainer.logger is None:
            return  # nobody would see it
        batch = module.state.batch
        shown = min(self.prompts, len(batch.prompts))
        top = module.top_tokens(self.top_k, first=shown)
        shares = {"verified": float((module.state.verified & batch.mask).sum() / batch.mask.sum())}
        if batch.ids is not None:
            right = token_accuracy(top.best, batch.ids[:shown], batch.mask[:shown])
            shares = {"accuracy": float(right.mean()), **shares}
        texts = [self._tokens(module, top, row) for row in range(shown)]
        module.report({f"tokens/{name}": share for name, share in shares.items()})
        if isinstance(trainer.logger, TensorBoardLogger):
            markdown = self._markdown(module, top, [text.plain for text in texts])
            trainer.logger.experiment.add_text("tokens/top_k", markdown, module.step)
            trainer.logger.experiment.add_image(
                "tokens/distance_to_nearest", self._picture(module), module.step
            )
        if not self.show:
            return
        # The tokens are those that the iteration has left, the distance is that of its beginning.
        summary = "before the first iteration: "
        if module.distances is not None:
            distance = float(module.distances.detach().mean())
            iteration = module.state.iteration + 1
            summary = f"iteration {iteration}: distance {distance:.4g} at its start, then "
        if "accuracy" in shares:
            summary += f"token accuracy {shares['accuracy']:.3f}, "
        summary += f"verified {shares['verified']:.3f}"
        if self._live is not None:
            self._live.update(Group(self._bar, summary, self._table(module, top, texts)))
        else:
            _log.info("%s | %r", summary, texts[0].plain)

    def _tokens(self, module: InputInversion, top: TopTokens, row: int) -> Text:
        """The best tokens of one prompt, coloured as in the class docstring."""
        length, ids = module.state.batch.lengths[row], module.state.batch.ids
        wrong = torch.zeros(length) if ids is None else top.best[row] != ids[row]
        text = Text()
        pieces = shown_tokens(module.frozen.tokenizer, top.best[row, :length].tolist())
        for position, piece in enumerate(pieces):
            verified = bool(module.state.verified[row, position])
            style = "green" if verified else "bright_black" if bool(wrong[position]) else ""
            text.append(piece, style)
        return text

    def _table(self, module: InputInversion, top: TopTokens, texts: list[Text]) -> Group:
        prompts = Table(box=None, show_header=False, pad_edge=False)
        for row, text in enumerate(texts):
            prompts.add_row(f"{module.state.batch.index[row] + 1}", text)
        ranks = Table(box=None, show_header=False, pad_edge=False)
        for rank, pieces in enumerate(self._ranks(module, top), start=1):
            ranks.add_row(f"top {rank}", Text("".join(pieces)))
        return Group(
            prompts, Text(f"prompt {module.state.batch.index[0] + 1}", style="bold"), ranks
        )

    @staticmethod
    def _ranks(module: InputInversion, top: TopTokens) -> list[list[str]]:
        """The first prompt's j-th best tokens of every position, for each j."""
        by_rank = top.ids[0, : module.state.batch.lengths[0]].T.tolist()
        return [shown_tokens(module.frozen.tokenizer, ids) for ids in by_rank]

    def _picture(self, module: InputInversion) -> Tensor:
        """The distances of the first prompt's positions to the tokens nearest to them."""
        values = module.state.values.detach()[0, : module.state.batch.lengths[0]]
        vectors = module.learnable.embed(values, module.embedding)
        return nearest_picture(nearest_distances(vectors, module.embedding, self.top_k))

    def _markdown(self, module: InputInversion, top: TopTokens, texts: list[str]) -> str:
        lines = ["| prompt | recovered |", "|---|---|"]
        lines += [
            f"| {module.state.batch.index[row] + 1} | {_in_cell(text)} |"
            for row, text in enumerate(texts)
        ]
        ranks = range(top.ids.shape[-1])
        lines += ["", f"| position | {' | '.join(f'top {rank + 1}' for rank in ranks)} |"]
        lines += ["|---" * (len(ranks) + 1) + "|"]
        for position, pieces in enumerate(zip(*self._ranks(module, top), strict=True)):
            lines.append(f"| {position} | {' | '.join(map(_in_cell, pieces))} |")
        return "\n".join(lines)


def _in_cell(text: str) -> str:
    return "" if not text else "`" + text.replace("|", "\\|").replace("`", "'") + "`"


@torch.no_grad()
def nearest_distances(vectors: Tensor, embedding: TokenEmbedding, k: int) -> Tensor:
    """Distances ``[T, k]`` of vectors ``[T, D]`` to the k nearest tokens, the nearest first.

    In std of the embedding, so that two unrelated tokens are about sqrt(2) apart.
    """
    k = min(k, embedding.vocabulary_size)
    nearest = torch.empty(len(vectors), k, device=vectors.device)
    which = first_of_equals(vectors)
    for rows in torch.split(torch.unique(which), embedding.at_a_time):
        some = vectors[rows].float()
        # Half the squared distance is |e|^2 / 2 + |v|^2 / 2 - v e: the most of what is negative.
        most = best_tokens(embedding.nearness(some), k).values
        nearest[rows] = some.square().sum(-1, keepdim=True) - 2 * most
    unit = embedding.std * math.sqrt(embedding.width)
    return nearest[which].clamp_min(0).sqrt() / unit


def nearest_picture(distances: Tensor) -> Tensor:
    """Distances ``[T, k]`` -> bytes ``[3, H, W]``: a column a position, a row a rank.

    Yellow is the embedding of a token, dark is a distance of 1 and more.
    """
    shares = distances.T.nan_to_num(1).clamp(0, 1).cpu() * (len(_NEAR_TO_FAR) - 1)
    lower = shares.floor().long().clamp_max(len(_NEAR_TO_FAR) - 2)
    colours = torch.tensor(_NEAR_TO_FAR, dtype=torch.float)
    between = (shares - lower)[..., None]
    mixed = colours[lower] * (1 - between) + colours[lower + 1] * between
    squares = mixed.round().byte().permute(2, 0, 1)
    return squares.repeat_interleave(_SQUARE, 1).repeat_interleave(_SQUARE, 2)
