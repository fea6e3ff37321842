"""The command line: fit, validate and predict of Lightning; attribute and capture beside it."""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_inversion import strategy
from lightning_inversion.attribution.command import add_attribute_arguments, run_attribute
from lightning_inversion.callbacks.learning_rate import LinearLearningRate
from lightning_inversion.callbacks.display import RecoveryDisplay
from lightning_inversion.callbacks.results import Results
from lightning_inversion.callbacks.stopping import StoppingCriterion
from lightning_inversion.callbacks.token_decoding import TokenDecoding
from lightning_inversion.cli.parser import OneSentenceParser, wrong_values
from lightning_inversion.cli.resume import (
    ENDED,
    FITTED,
    PREDICTED,
    differences,
    newest_run,
    read_settings,
    read_stored_input,
    unfinished_checkpoint,
)
from lightning_inversion.data.capture import add_capture_arguments, run_capture
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.errors import InputError, ProcessLostError
from lightning_inversion.files import FULL, check_writable, ended_by
from lightning_inversion.module import InputInversion
from lightning_inversion.recovery.sipit import SIPIT
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.results import FILE, read_rows
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.shared import SharedModels

_PACKAGE = "lightning_inversion"
_COMPARED = {"validate": ("transformer", "learnable", "objective"), "predict": ("transformer",)}
"""Commands that read a fit's input, and the parts of the model that must be the fit's."""
_SEEDS = 2**32
POLICIES = (TokenRecovery, SIPIT)
"""What --model.recovery can choose by name."""
# Written out, so that --print_config shows the recommended recipe and config.yaml records it; a
# test holds its parts equal to those that InputInversion() builds.
RECOMMENDED: dict[str, Any] = {
    "model.learnable": {
        "class_path": f"{_PACKAGE}.inputs.EmbeddingInput",
        "init_args": {"initializer": {"class_path": f"{_PACKAGE}.inputs.ProbeInitializer"}},
    },
    "model.objective": {"class_path": f"{_PACKAGE}.objectives.Standardized"},
    "model.optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1.0}},
    "model.schedule": {"class_path": f"{_PACKAGE}.schedules.VerifiedPrefix"},
    "model.recovery": {"class_path": f"{_PACKAGE}.recovery.token_recovery.TokenRecovery"},
    "learning_rate.in_embedding_std": True,
    "stopping.stop": False,  # a row ends when its tokens are verified
}

COMPUTED_IN = {
    "bf16-true": "bfloat16", "bf16-mixed": "bfloat16", "bf16": "bfloat16",
    "16-true": "float16", "16-mixed": "float16", "16": "float16",
}  # fmt: skip
"""Lightning's precisions, and what the frozen model computes in."""


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt``: the input and where the run stands, to resume or validate.

    Args:
        every: iterations between two checkpoints.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise InputError(f"checkpoint.every must be at least 1, and is {every}.")
        super().__init__(
            every_n_train_steps=every,
            save_top_k=0,
            save_last=True,
            enable_version_counter=False,
        )
        self._ended = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Not after the last iteration, from which Lightning would not resume, nor of no batch."""
        state = getattr(pl_module, "state", None)
        if not trainer.is_last_batch and state is not None and not state.is_empty:
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the finished input too."""
        self._ended = True
        super().on_train_end(trainer, pl_module)
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._ended = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say whether the batch has ended: from its end no fit goes on."""
        checkpoint[ENDED] = self._ended


class InversionCLI(LightningCLI):
    """LightningCLI with this package's callbacks, one seed, and runs that resume in place.

    Args:
        args: the command line without the program's name.
        models: what is in memory already; each run loads its own model without.
    """

    def __init__(self, args: list[str], models: SharedModels | None = None) -> None:
        self._args, self.models = args, models
        self._stored: set[tuple[int, str | None]] = set()
        super().__init__(
            InputInversion,
            PromptDataModule,
            args=args,
            parser_class=OneSentenceParser,
            parser_kwargs={"prog": "lightning-inversion", "allow_abbrev": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "enable_progress_bar": False,  # TokenDecoding shows one beside the tokens
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "devices": 1,
                "max_epochs": -1,  # an epoch for each batch of prompts
                "log_every_n_steps": 10,
                "inference_mode": False,  # predict follows gradients too
            },
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The Lightning commands that make sense here, and the arguments that are not options.

        Only the one that was asked for, where one was: each takes a tenth of a second to build.
        """
        commands = {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "predict": {"model", "dataloaders", "datamodule"},
        }
        asked = {name: skip for name, skip in commands.items() if name in self._args[:1]}
        return asked or commands

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, whatever the process was started with."""
        with wrong_values():
            self.config = parser.parse_args(args)
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < _SEEDS:
            raise InputError(
                f"--seed_everything must be between 0 and {_SEEDS - 1}, and is {seed}."
            )

    def _parse_ckpt_path(self) -> None:
        """Lightning would look in a checkpoint for options, and a fit keeps none there."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our callbacks under keys of their own, and each value written once."""
        parser.add_lightning_class_args(LinearLearningRate, "learning_rate")
        parser.add_lightning_class_args(TokenDecoding, "decoding")
        parser.add_lightning_class_args(StoppingCriterion, "stopping")
        parser.add_lightning_class_args(RecoveryDisplay, "display")
        parser.add_lightning_class_args(Results, "results")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.usage = "lightning-inversion COMMAND [--config FILE] [--key value ...]"
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("model.iterations", "data.iterations")
        parser.link_arguments("model.transformer.model", "data.tokenizer")
        parser.link_arguments("model.transformer.revision", "data.revision")
        parser.set_defaults(RECOMMENDED)

    def before_instantiate_classes(self) -> None:
        """Turn ``--ckpt_path last`` into the newest fit; ``fit`` goes on in its folder."""
        config = self.config[self.subcommand]
        compute_in_precision(config)
        with wrong_values():
            several = config.trainer.strategy == "auto" and processes(config.trainer) > 1
        if several:
            config.trainer.strategy = strategy.NAME
        root = Path(config.trainer.default_root_dir or ".") / "lightning_logs"
        if self.subcommand == "validate":
            self.save_config_callback = None  # only a fit is a run that can be resumed
            if config.ckpt_path is None:
                raise InputError("validate scores a stored input; name it with --ckpt_path.")
            if config.trainer.logger is None:
                config.trainer.logger = False  # there is nothing to keep
        elif config.trainer.logger in (None, True) and "://" not in str(root):
            check_writable(root.parent, "--trainer.default_root_dir", folder=True)
        if self.subcommand == "predict":
            self.save_config_kwargs["config_filename"] = PREDICTED
            config.return_predictions = False  # they are in the rows
        if config.ckpt_path == "last":
            self._find_last(root)
        config = self.config[self.subcommand]
        if self.subcommand in _COMPARED and config.ckpt_path is not None:
            self._read_stored_input(Path(config.ckpt_path))

    def _find_last(self, root: Path) -> None:
        """Name the checkpoint of the newest run, or go on with it."""
        config = self.config[self.subcommand]
        run = newest_run(root, PREDICTED if self.subcommand == "predict" else FITTED)
        if run is None:
            raise InputError(f"--ckpt_path last finds no run under {str(root)!r}; leave it out.")
        checkpoint = run / "checkpoints" / "last.ckpt"
        config.ckpt_path = str(checkpoint)
        if self.subcommand == "predict":
            config.ckpt_path = None  # the rows that are there are all that it goes on from
            self._continue(run, PREDICTED)
        elif self.subcommand == "fit":
            self._continue(run, FITTED)
        elif not checkpoint.exists():
            raise InputError(f"--ckpt_path last finds no checkpoint in {str(run)!r}; name one.")

    def _settings(self) -> dict[str, Any]:
        """This command's settings, as a run's folder keeps them."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.subcommand]
        assert isinstance(settings, dict)
        return settings

    def _read_stored_input(self, path: Path) -> None:
        """Refuse a checkpoint that this command cannot read, and note its texts."""
        assert self.subcommand is not None
        parts = _COMPARED[self.subcommand]
        batch = read_stored_input(path, self._settings(), parts)["state"]["batch"]
        self._stored = set(zip(batch["index"], batch["prompts"], strict=True))

    def _continue(self, run: Path, settings: str) -> None:
        """Let this run go on in the folder of an earlier one with the same settings."""
        command = self.subcommand
        different = differences(read_settings(run / settings), self._settings())
        if different:
            raise InputError(
                f"--ckpt_path last continues {str(run)!r}, which was made with another "
                f"{different[0]}; use its settings, or leave --ckpt_path out."
            )
        read_rows(run / FILE)  # a broken row is said at once
        self.config[command].trainer.logger = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {
                "save_dir": str(run.parent.parent),
                "name": run.parent.name,
                "version": int(run.name.removeprefix("version_")),
            },
        }
        self.config = self.parser.parse_object(self.config)

    def instantiate_classes(self) -> None:
        """What the classes, Lightning's too, do not take is wrong input."""
        with wrong_values():
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Find what does not fit together before a folder is made or a model loaded."""
        self.model.check(self.trainer, self.datamodule)
        with wrong_values("--model.optimizer"):
            self.model.make_optimizer([torch.zeros(1, requires_grad=True)])
        if isinstance(self.trainer.strategy, strategy.IndependentPrompts):
            self.trainer.strategy.run_by([sys.executable, "-m", _PACKAGE, *self._args])
        if self.subcommand == "validate" and self.trainer.world_size > 1:
            raise InputError(
                "validate scores one checkpoint in one process; set --trainer.devices 1."
            )
        if self.models is not None:
            if self.subcommand == "predict" and self.model.recovery.needs_language_model:
                self.model.use(*self.models.load_with_head(self.model.spec))
            else:
                self.model.use(self.models.load(self.model.spec))
        config = self.config_init[self.subcommand]
        if self._stored and self._stored.isdisjoint(enumerate(self.datamodule.texts)):
            self._say_that_no_text_is_stored(config.ckpt_path)
        if self.subcommand == "fit" and config.ckpt_path is not None:
            config.ckpt_path = unfinished_checkpoint(Path(config.ckpt_path), self.trainer)

    def _say_that_no_text_is_stored(self, checkpoint: str) -> None:
        """``validate`` scores the texts of the checkpoint, whatever the data."""
        if self.subcommand == "predict" and strategy.rank_of(self.trainer) == 0:
            print(f"{checkpoint} holds none of these texts, and nothing is taken from it.",
                  file=sys.stderr)  # fmt: skip

    def after_predict(self) -> None:
        """Show what was recovered."""
        self.after_fit()

    def after_fit(self) -> None:
        """Show what was read, of a run that had ended before as well."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Results) and self.trainer.is_global_zero:
                callback.show(self.trainer)


def compute_in_precision(config: Any) -> None:
    """``--trainer.precision`` says what the frozen model computes in; the input stays float32.

    Lightning would round the input itself, whose steps are smaller than what 16 bits can hold.

    Raises:
        InputError: it is none of them, or --model.transformer.dtype says something else.
    """
    asked = config.trainer.precision
    if asked is None or str(asked) in ("32", "32-true"):
        return
    dtype = COMPUTED_IN.get(str(asked))
    transformer = config.model.transformer
    if dtype is None:
        raise InputError(
            f"--trainer.precision: {asked} is not one of 32-true, {', '.join(COMPUTED_IN)}; "
            "choose one, or leave it out and set --model.transformer.dtype."
        )
    if transformer.dtype not in (TransformerSpec.dtype, dtype):
        raise InputError(
            f"--trainer.precision {asked} contradicts --model.transformer.dtype "
            f"{transformer.dtype}; leave one of them out."
        )
    transformer.dtype, config.trainer.precision = dtype, None


def processes(trainer: Any) -> int:
    """How many processes a trainer's settings ask for, by Lightning's own reading of them."""
    probe = Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return probe.num_devices * probe.num_nodes


def quiet_lightning() -> None:
    """Keep Lightning's tips and advice for training networks from the user's terminal."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for advice in (
        ".*does not have many workers.*",  # the loader yields prepared batches
        ".*Total length of `Iterations` across ranks is zero.*",  # a fit validates nothing
        ".*smaller than the logging interval.*",
        ".*The dirpath has changed from.*",  # validate scores another run's checkpoint
        ".*in eval mode at the start of training.*",  # the frozen model, and it must be
        ".*`training_step` returned `None`.*",  # a batch that did not fit the memory
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
    ):
        warnings.filterwarnings("ignore", message=advice)


def say_once_that_the_disk_is_full(thread: threading.ExceptHookArgs) -> None:
    """TensorBoard's writing thread meets it too; the main thread says it in a sentence."""
    if not isinstance(thread.exc_value, OSError) or thread.exc_value.errno not in FULL:
        threading.__excepthook__(thread)


def run(args: list[str]) -> int:
    """Run one command; returns 0 done, 1 failed, 2 wrong usage.

    Args:
        args: the command line without the program's name.
    """
    quiet_lightning()
    try:
        if args and args[0] in BESIDE_LIGHTNING:
            return beside_lightning(args[0], args[1:])
        InversionCLI(args)
    except InputError as error:
        print(f"lightning-inversion: {error}", file=sys.stderr)
        return 2
    except ProcessLostError as error:
        print(f"lightning-inversion: {error}; the run has ended.", file=sys.stderr)
        return 1
    except OSError as error:
        sentence = ended_by(error)
        if sentence is None:
            raise
        print(f"lightning-inversion: {sentence}", file=sys.stderr)
        return 1
    return 0


def beside_lightning(name: str, args: list[str]) -> int:
    """A command that needs no Trainer; returns its exit code."""
    description, add_arguments, run_command = BESIDE_LIGHTNING[name]
    parser = OneSentenceParser(
        prog=f"lightning-inversion {name}", description=description, allow_abbrev=False
    )
    add_arguments(parser)
    return run_command(parser.parse_args(args))


BESIDE_LIGHTNING: dict[str, tuple[str, Callable[..., None], Callable[..., int]]] = {
    "attribute": (
        "Paint each token of a text by its share in the model's prediction.",
        add_attribute_arguments,
        run_attribute,
    ),
    "capture": (
        "Write the features of prompts to a file, for fit and predict.",
        add_capture_arguments,
        run_capture,
    ),
}
"""What each command does, what adds its options, and what runs it."""
