"""fit, validate and predict: what `LightningCLI` needs for this package, and no more."""

import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_inversion import strategy
from lightning_inversion.callbacks.checkpoint import RunCheckpoint
from lightning_inversion.callbacks.display import RecoveryDisplay
from lightning_inversion.callbacks.learning_rate import LinearLearningRate
from lightning_inversion.callbacks.result_writer import ResultWriter
from lightning_inversion.callbacks.stopping import StoppingCriterion
from lightning_inversion.callbacks.token_decoding import TokenDecoding
from lightning_inversion.cli.ending import ended_by_sigterm
from lightning_inversion.cli.lightning_parser import LightningParser, hide_unused
from lightning_inversion.cli.options import replacing_sources
from lightning_inversion.cli.refusals import wrong_run, wrong_values
from lightning_inversion.cli.resume import (
    HOW_IT_RUNS,
    check_continues,
    deciding,
    differences,
    last_run,
    read_stored_input,
    unfinished_checkpoint,
)
from lightning_inversion.cli.run_folder import own_folder
from lightning_inversion.cli.trainer import (
    DEFAULTS,
    compute_in_precision,
    quiet_lightning,
    share_prompts_out,
)
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.errors import InputError
from lightning_inversion.files import check_writable, is_plain_name
from lightning_inversion.module import InputInversion
from lightning_inversion.recovery.last_position import LastPosition
from lightning_inversion.recovery.reading import Reading
from lightning_inversion.recovery.sipit import SIPIT
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.results import FILE, FITTED, PREDICTED, check_rows
from lightning_inversion.transformer.shared import SharedModels

_log = logging.getLogger(__name__)
_PACKAGE = "lightning_inversion"
_COMPARED = {"validate": ("transformer", "learnable", "objective"), "predict": ("transformer",)}
"""Commands that read a fit's input, and the parts of the model that must be the fit's."""
_SEEDS = 2**32
POLICIES = (TokenRecovery, SIPIT, Reading, LastPosition)
"""What --model.recovery can choose by name: a class must be imported to be found."""
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


class InversionCLI(LightningCLI):
    """LightningCLI with this package's callbacks, one seed, and runs that resume in place.

    Args:
        args: the command line without the program's name.
        models: what is in memory already; each run loads its own model without.
    """

    def __init__(self, args: list[str], models: SharedModels | None = None) -> None:
        self._args, self.models = replacing_sources(args), models
        self._stored: set[tuple[int, str | None]] = set()
        super().__init__(
            InputInversion,
            PromptDataModule,
            args=self._args,
            parser_class=LightningParser,
            parser_kwargs={"prog": "lightning-inversion"},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=DEFAULTS,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that was asked for: the parser of each takes a tenth of a second to build."""
        name = self._args[0]
        return {name: super().subcommands()[name]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, whatever the process was started with.

        The command's own parser does it: the parser of all commands validates everything twice.
        """
        name = self._args[0]
        command = self._subcommand_parsers[name]
        with wrong_values("--config", RecursionError):
            options = command.parse_args(args[1:])
            try:
                command.validate(options, skip_unset=False)  # null in a file was passed over
            except TypeError as error:
                command.error(str(error), error)
        # --print_config leaves what it asks for at the parser of all commands.
        asked = vars(parser).pop("print_config", None)
        if asked is not None:
            how = {key: value for key, value in asked.items() if key not in ("key", "subparser")}
            print(asked["subparser"].dump(options, **how), end="")
            raise SystemExit(0)
        self.config = Namespace(subcommand=name)  # type: ignore[no-untyped-call]
        self.config[name] = options
        seed = options.seed_everything
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < _SEEDS:
            raise InputError(
                f"--seed_everything must be between 0 and {_SEEDS - 1}, and is {seed}."
            )

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would read options from a checkpoint, and a fit keeps none."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our callbacks under keys of their own, and each value written once."""
        parser.add_lightning_class_args(LinearLearningRate, "learning_rate")
        parser.add_lightning_class_args(TokenDecoding, "decoding")
        parser.add_lightning_class_args(StoppingCriterion, "stopping")
        parser.add_lightning_class_args(RecoveryDisplay, "display")
        parser.add_lightning_class_args(ResultWriter, "results")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_argument(
            "--name", type=str | None, help="Name of the run: of its folder in lightning_logs."
        )
        parser.usage = f"lightning-inversion {self._args[0]} [--config FILE] [--key value ...]"
        parser.description = None  # Lightning's is of training
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("model.iterations", "data.iterations")
        parser.link_arguments("model.transformer.model", "data.tokenizer")
        for name in ("revision", "depth", "layers", "final_norm", "output"):
            parser.link_arguments(f"model.transformer.{name}", f"data.{name}")
        parser.set_defaults(RECOMMENDED)
        hide_unused(parser, self._args[0])

    def before_instantiate_classes(self) -> None:
        """Turn ``--ckpt_path last`` into the newest run, which ``fit`` and ``predict`` continue."""
        config = self.config[self.subcommand]
        compute_in_precision(config)
        with wrong_values("--trainer", TypeError, RuntimeError):  # this one in a SLURM job
            share_prompts_out(config.trainer)
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
        named = None if config.name is None else self._name_run(root)
        if self.config[self.subcommand].ckpt_path == "last":
            self._find_last(root, named)
        config = self.config[self.subcommand]
        if self.subcommand in _COMPARED and config.ckpt_path is not None:
            self._read_stored_input(Path(config.ckpt_path))

    def _name_run(self, root: Path) -> Path:
        """Let this run go to a folder of the name that is asked for; returns it."""
        config = self.config[self.subcommand]
        name, config.name = str(config.name), None  # its config.yaml serves other runs
        run = root / name
        if not is_plain_name(name) or name.startswith("version_"):
            raise InputError(
                f"--name {name!r} is no name of a run; use letters, digits, and _ . + = , -, "
                "and do not begin with version_."
            )
        if self.subcommand != "validate":
            if config.trainer.logger not in (None, True):
                raise InputError(
                    "--name and --trainer.logger both say where the run goes; leave one of them "
                    "out."
                )
            if (run / FILE).exists() and config.ckpt_path != "last":
                raise InputError(
                    f"--name {name!r} is a run that is there already; give another name, or "
                    "resume it with --ckpt_path last."
                )
            self._write_into(run)
        return run

    def _find_last(self, root: Path, named: Path | None = None) -> None:
        """Name the checkpoint of the newest run with these settings, or continue the run."""
        config = self.config[self.subcommand]
        settings = PREDICTED if self.subcommand == "predict" else FITTED
        run = named or last_run(root, settings, self._differences)
        if not (run / settings).exists():
            raise InputError(f"--ckpt_path last finds no run in {str(run)!r}; leave it out.")
        checkpoint = run / "checkpoints" / "last.ckpt"
        if self.subcommand == "validate" and not checkpoint.exists():
            raise InputError(f"--ckpt_path last finds no checkpoint in {str(run)!r}; name one.")
        # A predict continues from its rows; it has no checkpoint.
        config.ckpt_path = None if self.subcommand == "predict" else str(checkpoint)
        if self.subcommand != "validate":
            check_continues(run, settings, self.settings())
            self._write_into(run)

    def _differences(self, theirs: dict[str, Any]) -> list[str]:
        """In what a run differs from this command; what validates a fit shares its prompts, too."""
        ours = self.settings()
        if self.subcommand != "validate":
            return differences(theirs, ours)
        keys = [("model", part) for part in _COMPARED["validate"]]
        keys += [("data", source) for source in ("prompts", "file", "targets")]
        return [
            name
            for section, key in keys
            for name in differences(
                _part(theirs, section, key), _part(ours, section, key), key, HOW_IT_RUNS
            )
        ]

    def settings(self) -> dict[str, Any]:
        """This command's settings, as a run's folder keeps them."""
        assert self.subcommand is not None
        parser = self._subcommand_parsers[self.subcommand]
        settings = yaml.safe_load(parser.dump(self.config[self.subcommand], skip_none=False))
        assert isinstance(settings, dict)
        return settings

    def _read_stored_input(self, path: Path) -> None:
        """Refuse a checkpoint that this command cannot read, and note its prompts."""
        assert self.subcommand is not None
        parts = _COMPARED[self.subcommand]
        batch = read_stored_input(path, self.settings(), parts)["state"]["batch"]
        self._stored = set(zip(batch["index"], batch["prompts"], strict=True))

    def _write_into(self, run: Path) -> None:
        """Let this run go to the folder of an earlier one."""
        self.config[self.subcommand].trainer.logger = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {
                "save_dir": str(run.parent.parent),
                "name": run.parent.name,
                "version": run.name,
            },
        }
        self.config = self.parser.parse_object(self.config)

    def instantiate_classes(self) -> None:
        """Report what the classes, Lightning's too, refuse as wrong input."""
        with wrong_values("", RuntimeError):  # Lightning's, of two callbacks of one kind
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Find what does not fit together before a folder is made or a model loaded."""
        self.model.check(self.trainer, self.datamodule)
        if self.subcommand != "validate":
            assert self.subcommand is not None
            self.writer.asked = deciding(self.subcommand, self.settings())
        with wrong_values("--model.optimizer", TypeError):
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
        if self._stored and self._stored.isdisjoint(enumerate(self.datamodule.prompts)):
            self._report_unused(config.ckpt_path)
        if self.subcommand == "fit" and config.ckpt_path is not None:
            config.ckpt_path = unfinished_checkpoint(
                Path(config.ckpt_path), self.trainer, self.datamodule.questions
            )

    def _report_unused(self, checkpoint: str) -> None:
        """``validate`` scores the prompts of the checkpoint, whatever the data."""
        if self.subcommand == "predict" and strategy.rank_of(self.trainer) == 0:
            _log.warning(
                "%s holds none of these prompts, and nothing is taken from it.", checkpoint
            )

    def before_fit(self) -> None:
        """Refuse the folder of a run with other prompts, settings or another model."""
        self.check_folder(Path(self.trainer.log_dir or self.trainer.default_root_dir))

    def check_folder(self, folder: Path) -> None:
        """Refuse a folder whose rows are not of this run: they would count as finished.

        Raises:
            InputError: it holds such a row, or a file that cannot be read.
        """
        predicts = self.subcommand == "predict"
        questions = self.datamodule.questions
        check_rows(folder / FILE, self.writer.fingerprints(self.model, questions, predicts))

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; what Lightning or an optimizer cannot work with is wrong input."""
        ckpt_path = self.config_init[subcommand].ckpt_path
        new = self.config[subcommand].trainer.logger in (None, True)
        alone = nullcontext() if subcommand == "validate" else own_folder(self.trainer, new)
        with alone, wrong_run(ckpt_path):
            super()._run_subcommand(subcommand)

    @property
    def writer(self) -> ResultWriter:
        """The callback that writes the rows."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next(one for one in callbacks if isinstance(one, ResultWriter))

    before_predict = before_fit

    def after_fit(self) -> None:
        """Show what was recovered, by a run that had ended before as well."""
        if self.trainer.is_global_zero:
            self.writer.show()

    after_predict = after_fit


def _part(settings: dict[str, Any], section: str, key: str) -> Any:
    """A value of a config; None where it has no such section."""
    found = settings.get(section)
    return found.get(key) if isinstance(found, dict) else None


def run_lightning(args: list[str]) -> None:
    """Run fit, validate or predict.

    Args:
        args: the command line without the program's name.

    Raises:
        InputError: the options are wrong.
    """
    quiet_lightning()
    # Lightning itself looks between the batches of a fit whether there was a SIGTERM.
    with ended_by_sigterm(SIGTERMException):
        InversionCLI(args)
