"""The folder of a run, in which no other run writes meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_inversion import strategy
from lightning_inversion.errors import InputError
from lightning_inversion.files import claimed


@contextmanager
def own_folder(trainer: Trainer, is_new: bool) -> Iterator[None]:
    """Keep other commands out of a run's folder while the block runs; the first process does it.

    Lightning numbers a run by the folders that are there. Two runs that start together would have
    one number, and each would take the other's rows for its own.

    Args:
        trainer: of the run.
        is_new: whether the run is to have a folder of a number that no other has.

    Raises:
        InputError: another command runs in the folder.
    """
    root = trainer.default_root_dir
    if strategy.rank_of(trainer) or "://" in root:
        yield
        return
    while is_new and not _made(_folder(trainer)):
        trainer.logger = TensorBoardLogger(root)
    with claimed(_folder(trainer) / ".running") as ours:
        if not ours:
            raise InputError(
                f"another command is running in {str(_folder(trainer))!r}; wait for it, or give "
                "this run another --name."
            )
        yield


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.log_dir or trainer.default_root_dir)


def _made(folder: Path) -> bool:
    """Make a folder; False where it is there already."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True
