"""The folder of a run is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning import Trainer

from lightning_inversion.__main__ import main as run
from lightning_inversion.cli.run_folder import own_folder
from lightning_inversion.errors import InputError
from lightning_inversion.files import claimed

pytestmark = pytest.mark.usefixtures("shared_parsers")


def trainer(root: Path) -> Trainer:
    return Trainer(
        default_root_dir=root, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def test_runs_that_start_together_have_a_folder_each(tmp_path: Path) -> None:
    first, second = trainer(tmp_path), trainer(tmp_path)
    assert first.log_dir == second.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    with own_folder(first, is_new=True), own_folder(second, is_new=True):
        folders = [first.log_dir, second.log_dir]
    assert folders == [str(tmp_path / "lightning_logs" / f"version_{n}") for n in (0, 1)]


def test_a_run_keeps_others_out_while_it_runs(tmp_path: Path) -> None:
    first, second = trainer(tmp_path), trainer(tmp_path)
    assert first.log_dir == second.log_dir
    with (
        own_folder(first, is_new=True),
        pytest.raises(InputError, match=r"another command is running in .*version_0"),
        own_folder(second, is_new=False),
    ):
        pass
    with own_folder(second, is_new=False):  # it is resumed
        assert second.log_dir == first.log_dir


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_two_commands_of_one_name(
    command: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lightning_logs" / "mine"
    with claimed(folder / ".running"):
        assert run([
            command, f"--model={tiny_folder}", '--data.prompts=["The sky"]', "--name=mine",
            f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu",
        ]) == 2  # fmt: skip
    assert f"another command is running in {str(folder)!r}; wait" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [".running"]
