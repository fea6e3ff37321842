"""Several processes: the rows of one, bit for bit, whatever is killed, lost or full."""

import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.started_run import StartedRun, wait_until_gone

pytestmark = pytest.mark.integration
WORDS = ("the", "sky", "is", "blue", "or", "red", "depending", "on", "time", "of", "day", "bus")
CHANGING = {"seconds", "token_seconds"}


class Run(StartedRun):
    """A run of the tiny model in a folder of its own."""

    def __init__(self, folder: Path, root: Path, predict: bool = False) -> None:
        rng = random.Random(0)
        self.prompts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 10))) for _ in range(24)]
        self.prompts.insert(3, "")  # a bad one, which must not stop the others
        own = [] if predict else [
            "--model.learnable.initializer=NormalInitializer", "--model.iterations=200",
            "--model.schedule.candidates=2", "--model.schedule.max_candidates=2",
            "--checkpoint.every=10",
        ]  # fmt: skip
        arguments = [
            "predict" if predict else "fit",
            f"--model.transformer.model={folder}", "--model.transformer.depth=3",
            f"--data.prompts={json.dumps(self.prompts)}", "--data.tokens_per_batch=10",
            f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu", *own,
        ]  # fmt: skip
        root.mkdir(exist_ok=True)
        results = root / "lightning_logs" / "version_0" / "results.jsonl"
        super().__init__(arguments, results, root / "messages.txt")

    def by(
        self, processes: int, *more: str, limit: Callable[[], None] | None = None
    ) -> subprocess.Popen[bytes]:
        return self.start(f"--trainer.devices={processes}", *more, limit=limit)

    def rows_of(self, process: subprocess.Popen[bytes]) -> list[dict]:
        rows = [json.loads(line) for line in self.finish(process).splitlines()]
        assert [row["index"] for row in rows] == list(range(len(self.prompts)))
        return [{key: value for key, value in row.items() if key not in CHANGING} for row in rows]


def children_of(process: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in children.split()]


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The rows of one process that nothing disturbed."""
    run = Run(tiny_folder, tmp_path_factory.mktemp("alone"))
    return run.rows_of(run.by(1))


def test_two_processes_leave_the_rows_of_one(
    alone: list[dict], tiny_folder: Path, tmp_path: Path
) -> None:
    run = Run(tiny_folder, tmp_path)
    rows = run.rows_of(run.by(2))
    assert rows == alone
    assert [row["index"] for row in rows if row["error"]] == [3]
    assert "prompt 4 is empty" in run.messages.read_text()
    assert " left" in run.messages.read_text()


def test_killed_three_times_and_resumed_by_other_numbers_of_processes(
    alone: list[dict], tiny_folder: Path, tmp_path: Path
) -> None:
    run = Run(tiny_folder, tmp_path)
    moments = random.Random(1)
    kept: list[bytes] = []
    for attempt, processes in enumerate((4, 2, 3)):
        killed = run.by(processes, *(["--ckpt_path=last"] if attempt else []))
        run.wait_for(len(kept) + 1, killed)
        time.sleep(moments.uniform(0, 0.5))  # of the 2 to 4 that a row takes
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        time.sleep(2)  # the others notice
        lines = run.lines()
        assert lines[: len(kept)] == kept
        kept = lines
    assert len(kept) < len(run.prompts)
    assert run.rows_of(run.by(1, "--ckpt_path=last")) == alone


def test_exact_recovery_by_two_processes_killed_and_resumed_by_one(
    tiny_folder: Path, tmp_path: Path
) -> None:
    alone = Run(tiny_folder, tmp_path / "alone", predict=True)
    expected = alone.rows_of(alone.by(1))
    assert sum(row["verified"] for row in expected) >= len(alone.prompts) - 2
    run = Run(tiny_folder, tmp_path / "killed", predict=True)
    killed = run.by(2)
    run.wait_for(2, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(2)  # the other notices
    kept = run.lines()
    rows = run.rows_of(run.by(1, "--ckpt_path=last"))
    assert rows == expected
    assert {json.loads(line)["index"] for line in kept} <= {row["index"] for row in rows}


def test_more_processes_than_batches(alone: list[dict], tiny_folder: Path, tmp_path: Path) -> None:
    run = Run(tiny_folder, tmp_path)
    rows = run.rows_of(run.by(2, "--data.tokens_per_batch=100000", "--model.iterations=3"))
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in alone]


def test_a_process_that_dies_ends_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    run = Run(tiny_folder, tmp_path)
    process = run.by(2)
    run.wait_for(2, process)
    (child,) = children_of(process)
    os.kill(child, signal.SIGKILL)
    assert process.wait(180) == 1
    messages = run.messages.read_text()
    assert "process 1 ended with exit code -9; the run has ended." in messages
    assert "prompts are finished, in" in messages
    assert "Traceback" not in messages
    assert run.lines()


def test_interrupted_by_the_keyboard(tiny_folder: Path, tmp_path: Path) -> None:
    run = Run(tiny_folder, tmp_path)
    process = run.by(2)
    run.wait_for(2, process)
    (child,) = children_of(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(180) == 1
    messages = run.messages.read_text()
    assert "resume with the same command and --ckpt_path last" in messages
    assert "Traceback" not in messages
    wait_until_gone([child])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("predict", [False, True], ids=["fit", "predict"])
def test_asked_to_end(processes: int, predict: bool, tiny_folder: Path, tmp_path: Path) -> None:
    run = Run(tiny_folder, tmp_path, predict)
    slow = ["--model.recovery=lightning_inversion.recovery.sipit.SIPIT"] if predict else []
    process = run.by(processes, *slow)
    run.wait_for(2, process)
    children = children_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) == 1
    messages = run.messages.read_text()
    assert f"of {len(run.prompts)} prompts are finished, in" in messages
    assert "resume with the same command and --ckpt_path last" in messages
    assert "Traceback" not in messages
    assert len(run.lines()) < len(run.prompts)
    wait_until_gone(children)


def test_a_full_disk(alone: list[dict], tiny_folder: Path, tmp_path: Path) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    is_small = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def limit() -> None:
        if not is_small:  # no right to mount: files may not grow instead
            resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))

    run = Run(tiny_folder, mounted if is_small else tmp_path)
    run.messages = tmp_path / "messages.txt"
    try:
        assert run.by(1, limit=limit).wait(120) == 1
        messages = run.messages.read_text()
        assert "nothing more can be written" in messages
        assert "Traceback" not in messages
        finished = run.lines()
        if is_small:
            subprocess.run(["mount", "-o", "remount,size=64m", str(mounted)], check=True)
        rows = run.rows_of(run.by(1, "--ckpt_path=last"))
        assert rows == alone
        assert all(json.loads(line)["index"] in range(len(rows)) for line in finished)
    finally:
        if is_small:
            subprocess.run(["umount", "-l", str(mounted)], check=True)
