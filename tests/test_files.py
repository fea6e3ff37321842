"""Claims that end with their process, and text that is safe to print."""

import subprocess
import sys
from pathlib import Path

from lightning_inversion.files import claimed, one_line, visible

CLAIMS_AND_WAITS = """\
import sys, time
from pathlib import Path
from lightning_inversion.files import claimed
with claimed(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "claim"
    with claimed(path) as ours:
        assert ours
        with claimed(path) as theirs:
            assert not theirs
        with claimed(path) as theirs:  # a refusal takes nothing from who has it
            assert not theirs
    with claimed(path) as ours:
        assert ours


def test_a_killed_process_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIMS_AND_WAITS, str(path)], stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"True\n"
    with claimed(path) as ours:
        assert not ours
    other.kill()
    other.wait()
    other.stdout.close()
    with claimed(path) as ours:
        assert ours


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible("a\nb\t\x1b\u202e\u200b") == "a↵\nb⇥\t␛⟨U+202E⟩⟨U+200B⟩"
    assert visible("👩\u200d👧") == "👩\u200d👧"
    assert one_line(" a\n") == "·a↵"
