"""attribute by several processes: the rows of one, bit for bit, whatever is killed."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.started_run import StartedRun, wait_until_gone

pytestmark = pytest.mark.integration
COUNT = re.compile(r"\d+ of \d+")
TEXTS = [f"The wipers on the bus go swish {'swish ' * (index % 5)}{index}" for index in range(24)]


class Run(StartedRun):
    """An attribution of many texts with the tiny model."""

    def __init__(self, folder: Path, root: Path) -> None:
        texts = root / "texts.txt"
        texts.write_text("\n".join(TEXTS), encoding="utf-8")
        rows = root / "rows.jsonl"
        arguments = [
            "attribute", f"--prompts={texts}", f"--model={folder}", f"--json={rows}",
            "--method=integrated", "--steps=200",
        ]  # fmt: skip
        super().__init__(arguments, rows, root / "messages.txt")

    def reported(self) -> list[str]:
        """The messages from the count of texts on; what comes before it is the handler's."""
        lines = self.messages.read_text().splitlines()
        return [
            line[line.index(match[0]) :] if (match := COUNT.search(line)) else line
            for line in lines
        ]

    def by(self, processes: int) -> subprocess.Popen[bytes]:
        return self.start(f"--processes={processes}")


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes that share the texts, without Python's own that watches over them."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    pids = [int(child) for child in children.split()]
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The rows of one process that nothing disturbed."""
    run = Run(tiny_folder, tmp_path_factory.mktemp("alone"))
    rows = run.finish(run.by(1))
    assert [json.loads(row)["text"] for row in rows.splitlines()] == TEXTS
    return rows


def test_two_processes_leave_the_rows_of_one(
    alone: bytes, tiny_folder: Path, tmp_path: Path
) -> None:
    run = Run(tiny_folder, tmp_path)
    assert run.finish(run.by(2)) == alone
    assert run.reported() == [f"{n} of {len(TEXTS)}: written to {run.rows}" for n in range(1, 25)]


def test_killed_and_resumed_by_another_number_of_processes(
    alone: bytes, tiny_folder: Path, tmp_path: Path
) -> None:
    run = Run(tiny_folder, tmp_path)
    killed = run.by(2)
    run.wait_for(3, killed)
    workers = workers_of(killed)
    assert len(workers) == 2
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_until_gone(workers)
    kept = run.lines()
    assert len(kept) < len(TEXTS)
    assert "Traceback" not in run.messages.read_text()
    run.messages.unlink()
    assert run.finish(run.by(3)) == alone
    assert set(kept) < set(alone.split(b"\n"))
    assert len(run.reported()) == len(TEXTS) - len(kept)


def test_a_process_that_dies_ends_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    run = Run(tiny_folder, tmp_path)
    process = run.by(2)
    run.wait_for(2, process)
    first, second = workers_of(process)
    os.kill(first, signal.SIGKILL)
    assert process.wait(30) == 1
    wait_until_gone([second])
    *reported, last = run.reported()
    assert "ended with exit code -9; the run has ended." in last
    assert all("written to" in line for line in reported)
    assert 2 <= len(run.lines()) < len(TEXTS)


def test_interrupted_by_the_keyboard(tiny_folder: Path, tmp_path: Path) -> None:
    run = Run(tiny_folder, tmp_path)
    process = run.by(2)
    run.wait_for(2, process)
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 1
    wait_until_gone(workers)
    *reported, last = run.reported()
    assert last.endswith(f"texts are finished, in {run.rows}; repeat the command to resume")
    assert all("written to" in line for line in reported)
    assert 2 <= len(run.lines()) < len(TEXTS)
