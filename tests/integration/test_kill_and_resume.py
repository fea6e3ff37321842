"""A run that is killed and resumed leaves the rows of an undisturbed run, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
PROMPTS = ["The sky is blue.", "A quick brown fox", "on the bus", "This is a prompt", "time of day"]
CHANGING = {"seconds"}


def start(folder: Path, root: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "lightning_inversion", "fit",
        f"--model.transformer.model={folder}", "--model.transformer.depth=3",
        f"--data.prompts={json.dumps(PROMPTS)}", "--data.batch_size=2",
        "--model.learnable.start=NormalStart", "--model.iterations=150",
        "--token_by_token.candidates=2", "--token_by_token.most=2",
        "--checkpoint.every=10", f"--trainer.default_root_dir={root}",
        "--trainer.accelerator=cpu", *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root.mkdir(exist_ok=True)
    with (root / "messages.txt").open("ab") as messages:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=messages
        )


def finish(process: subprocess.Popen[bytes], root: Path) -> None:
    assert process.wait() == 0, (root / "messages.txt").read_text()


def rows_of(root: Path) -> list[dict]:
    lines = (root / "lightning_logs" / "version_0" / "results.jsonl").read_text().splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: row["index"])
    return [{key: value for key, value in row.items() if key not in CHANGING} for row in rows]


def wait_for(path: Path, lines: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < lines:
        assert time.monotonic() < deadline, f"{path} did not get {lines} lines"
        time.sleep(0.02)


@pytest.mark.parametrize("rows_before", [0, 2], ids=["in the first batch", "in a later batch"])
def test_the_same_rows(tiny_folder: Path, tmp_path: Path, rows_before: int) -> None:
    finish(start(tiny_folder, tmp_path / "whole"), tmp_path / "whole")

    run = tmp_path / "killed" / "lightning_logs" / "version_0"
    killed = start(tiny_folder, tmp_path / "killed")
    if rows_before:
        wait_for(run / "results.jsonl", rows_before)
    else:
        while not (run / "checkpoints" / "last.ckpt").exists():
            assert killed.poll() is None, (tmp_path / "killed" / "messages.txt").read_text()
            time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    results = run / "results.jsonl"
    assert not results.exists() or results.read_text().count("\n") < len(PROMPTS)

    resumed = start(tiny_folder, tmp_path / "killed", "--ckpt_path=last")
    finish(resumed, tmp_path / "killed")
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
