"""A run that is killed and resumed leaves the rows of an undisturbed run, bit for bit."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.started_run import StartedRun

pytestmark = pytest.mark.integration
PROMPTS = ["The sky is blue.", "A quick brown fox", "on the bus", "This is a prompt", "time of day"]
CHANGING = {"seconds"}


class Run(StartedRun):
    """A fit of the tiny model in a folder of its own."""

    def __init__(self, folder: Path, root: Path) -> None:
        root.mkdir()
        arguments = [
            "fit", f"--model.transformer.model={folder}", "--model.transformer.depth=3",
            f"--data.prompts={json.dumps(PROMPTS)}", "--data.batch_size=2",
            "--model.learnable.initializer=NormalInitializer", "--model.iterations=150",
            "--model.schedule.candidates=2", "--model.schedule.max_candidates=2",
            "--checkpoint.every=10", f"--trainer.default_root_dir={root}",
            "--trainer.accelerator=cpu",
        ]  # fmt: skip
        self.folder = root / "lightning_logs" / "version_0"
        super().__init__(arguments, self.folder / "results.jsonl", root / "messages.txt")

    def rows_of(self, process: subprocess.Popen[bytes]) -> list[dict]:
        rows = map(json.loads, self.finish(process).splitlines())
        return [
            {key: value for key, value in row.items() if key not in CHANGING}
            for row in sorted(rows, key=lambda row: row["index"])
        ]


@pytest.fixture(scope="module")
def expected(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The rows of a run that nothing disturbed."""
    whole = Run(tiny_folder, tmp_path_factory.mktemp("undisturbed") / "whole")
    return whole.rows_of(whole.start())


@pytest.mark.parametrize("rows_before", [0, 2], ids=["in the first batch", "in a later batch"])
def test_the_same_rows(
    expected: list[dict], tiny_folder: Path, tmp_path: Path, rows_before: int
) -> None:
    run = Run(tiny_folder, tmp_path / "killed")
    killed = run.start()
    if rows_before:
        run.wait_for(rows_before, killed)
    else:
        run.wait_until((run.folder / "checkpoints" / "last.ckpt").exists, killed)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert len(run.lines()) < len(PROMPTS)

    assert run.rows_of(run.start("--ckpt_path=last")) == expected
