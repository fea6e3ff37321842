"""Training the ladder with Lightning, on a CPU: each model resumes where it was stopped."""

from __future__ import annotations

import json
import logging
import math
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from torch import Tensor

from lightning_inversion.files import Record, claimed, readable_time
from lightning_inversion.ladder.plan import Plan, Rung
from lightning_inversion.transformer.small import bpe_tokenizer, small_config
from lightning_inversion.transformer.untrained import untrained_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_WARMUP, _LAST_RATE = 0.05, 0.1
"""The learning rate rises over this share of the steps, then falls to this share by a cosine."""
_LAST, _TRAINING = "last.ckpt", "training.json"
_EVERY = 50
"""Steps between two checkpoints to resume from."""


def model_folder(root: Path, rung: Rung, share: float) -> Path:
    """Where a rung's model lies after a share of its training, as ``--model`` takes it."""
    return root / rung.name / f"{100 * share:g}"


def untrained(rung: Rung, plan: Plan) -> PreTrainedModel:
    """A rung's model before training; its weights follow from its seed."""
    config = small_config(rung.shape, rung.width, rung.blocks, rung.vocabulary, 2 * plan.length)
    return untrained_model(config, rung.seed, torch.float32, "sdpa")


def cost(rung: Rung, plan: Plan) -> float:
    """Floating-point operations of a rung's training: 6 x parameters x tokens."""
    return 6.0 * sum(p.numel() for p in untrained(rung, plan).parameters()) * plan.tokens


class LadderTraining(LightningModule):
    """Next-token training of one rung.

    The batch of a step follows from the seed and the step, so that a stopped run resumes exactly.

    Args:
        rung: which model.
        plan: for how long.
        ids: ``[N]`` the text, one verse after another.
    """

    def __init__(self, rung: Rung, plan: Plan, ids: Tensor) -> None:
        super().__init__()
        self.rung, self.plan, self.ids = rung, plan, ids
        self.model = untrained(rung, plan)

    def batch_of(self, step: int) -> Tensor:
        """``[B, T]`` ids of a step."""
        generator = torch.Generator().manual_seed(1_000_003 * self.rung.seed + step)
        length = self.plan.length
        starts = torch.randint(len(self.ids) - length, (self.plan.batch,), generator=generator)
        return self.ids[starts[:, None] + torch.arange(length)]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of the step's own batch; the loader only counts."""
        ids = self.batch_of(self.global_step)
        loss = next_token_loss(self.model, ids)
        self.log("loss", loss, prog_bar=True, logger=False)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW without decay of norms and biases; a warm-up, then a cosine."""
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": 0.1}, {"params": others}
        ]  # fmt: skip
        optimizer = torch.optim.AdamW(
            groups, lr=self.plan.learning_rate_of(self.rung), betas=(0.9, 0.95), weight_decay=0.0
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _share_of_rate(self, step: int) -> float:
        warm = max(1, round(_WARMUP * self.plan.steps))
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, self.plan.steps - warm))
        return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def next_token_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean -log p (nats) of each token of ids ``[B, T]`` after those before it."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class KeepModels(Callback):
    """Keeps the model after the plan's shares of its training, with its loss on held-out text.

    Args:
        root: folder of the ladder.
        tokenizer: is kept beside each model.
        held_out: ``[B, T]`` ids.
    """

    def __init__(self, root: Path, tokenizer: PreTrainedTokenizerBase, held_out: Tensor) -> None:
        self.root, self.tokenizer, self.held_out = root, tokenizer, held_out

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the untrained model."""
        self._keep(trainer.global_step, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the model of this step, where the plan says so."""
        self._keep(trainer.global_step, pl_module)

    @torch.no_grad()
    def _keep(self, step: int, module: LightningModule) -> None:
        assert isinstance(module, LadderTraining)
        share = module.plan.kept_steps.get(step)
        if share is None:
            return
        folder = model_folder(self.root, module.rung, share)
        if folder.exists():
            return
        part = folder.with_name(f".{folder.name}.writing")
        shutil.rmtree(part, ignore_errors=True)
        module.model.save_pretrained(part)
        self.tokenizer.save_pretrained(part)
        loss = next_token_loss(module.model, self.held_out)
        written: Record = {"step": step, "tokens": step * module.plan.batch * module.plan.length}
        (part / _TRAINING).write_text(json.dumps({**written, "loss": float(loss)}), "utf-8")
        part.replace(folder)


def training_of(folder: Path) -> Record:
    """Step, tokens and held-out loss (nats) of a kept model."""
    record: Record = json.loads((folder / _TRAINING).read_text("utf-8"))
    return record


def encoded(tokenizer: PreTrainedTokenizerBase, verses: list[str]) -> Tensor:
    """``[N]`` ids of verses, each after the end of the one before."""
    lists = tokenizer(verses, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in lists for token in (0, *ids)])


class Texts:
    """The plan's text in each vocabulary, encoded when first asked for."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._kept: dict[int, tuple[PreTrainedTokenizerBase, Tensor, Tensor]] = {}

    def of(self, vocabulary: int) -> tuple[PreTrainedTokenizerBase, Tensor, Tensor]:
        """The tokenizer, ids ``[N]`` to train on, and held-out ids ``[32, T]``."""
        if vocabulary not in self._kept:
            tokenizer = bpe_tokenizer(self.plan.trained_on, vocabulary)
            if len(tokenizer) != vocabulary:
                _log.info("the text gives %d tokens, not %d", len(tokenizer), vocabulary)
            length = self.plan.length
            held_out = encoded(tokenizer, self.plan.held_out)[: 32 * length]
            rows = held_out[: len(held_out) // length * length].view(-1, length)
            self._kept[vocabulary] = (tokenizer, encoded(tokenizer, self.plan.trained_on), rows)
        return self._kept[vocabulary]


def train_rung(rung: Rung, plan: Plan, root: Path, texts: Texts) -> None:
    """Train one rung, or what is left of it; all its kept models are there in the end."""
    tokenizer, ids, held_out = texts.of(rung.vocabulary)
    folder = root / rung.name
    last = folder / _LAST
    checkpoint = ModelCheckpoint(
        folder, save_last=True, save_top_k=0, every_n_train_steps=_EVERY,
        enable_version_counter=False,
    )  # fmt: skip
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders and loggers
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=plan.steps, max_epochs=-1, logger=False,
            enable_model_summary=False, default_root_dir=folder,
            callbacks=[
                KeepModels(root, tokenizer, held_out), checkpoint, TQDMProgressBar(refresh_rate=10),
            ],
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(range(plan.steps), batch_size=None)  # type: ignore[arg-type, var-annotated]
        trainer.fit(
            LadderTraining(rung, plan, ids), loader,
            ckpt_path=last if last.exists() else None, weights_only=False,
        )  # fmt: skip
    if trainer.global_step < plan.steps:
        raise KeyboardInterrupt  # Lightning ends a stopped fit quietly
    last.unlink(missing_ok=True)


def is_trained(rung: Rung, plan: Plan, root: Path) -> bool:
    """Whether all of a rung's models are kept."""
    return all(model_folder(root, rung, share).exists() for share in plan.checkpoints)


def train(plan: Plan, root: Path) -> None:
    """Train every rung that is not there yet; the same call resumes.

    Raises:
        InputError: the text is not installed.
    """
    left = [rung for rung in plan.rungs if not is_trained(rung, plan, root)]
    costs = [cost(rung, plan) for rung in left]
    _log.info(
        "%d of %d models to train, %.2g floating-point operations: about %s on a core of 30 GFLOPS",
        len(left), len(plan.rungs), sum(costs), readable_time(sum(costs) / 30e9),
    )  # fmt: skip
    texts = Texts(plan)
    for number, rung in enumerate(left, start=1):
        with claimed(root / rung.name / ".claim") as ours:
            if ours and not is_trained(rung, plan, root):
                _log.info("%d of %d: %s", number, len(left), rung.name)
                train_rung(rung, plan, root, texts)
