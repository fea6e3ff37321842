"""Claims, lines that are whole or absent, places that take a file, text that is safe to print."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lightning_inversion.errors import InputError
from lightning_inversion.files import (
    append_records,
    as_os_error,
    check_writable,
    claimed,
    one_line,
    read_records,
    visible,
)

CLAIMS_AND_WAITS = """\
import sys, time
from pathlib import Path
from lightning_inversion.files import claimed
with claimed(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""


def test_a_full_disk_is_an_os_error_to_safetensors_as_well() -> None:
    reported = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OSError, match="No space left") as raised, as_os_error():
        raise SafetensorError(reported)
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match="another"), as_os_error():
        raise ValueError("another")


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


def test_rows_are_whole_or_absent_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_records(path, [{"index": 1, "text": "é"}])
    with path.open("ab") as file:
        file.write(b'{"index": 2, "te')  # killed here
    assert read_records(path) == [{"index": 1, "text": "é"}]
    append_records(path, [{"index": 0}])
    lines = path.read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [1, 0]
    assert [row["index"] for row in read_records(path)] == [0, 1]


@pytest.mark.parametrize("line", [b"{not JSON\n", b'{"text": "no index"}\n', b"\xff\x00\n", b"3\n"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"index": 0}\n' + line + b'{"index": 1}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl', line 2 is no row; remove the line"):
        read_records(path)


@pytest.mark.parametrize("below", [Path("/proc"), Path(__file__)])
def test_a_path_that_takes_no_file_is_refused(below: Path) -> None:
    with pytest.raises(InputError, match=r"--out '.*' cannot (be written|hold files)") as error:
        check_writable(below / "new" / "file", "--out")
    assert "\n" not in str(error.value)


def test_a_path_is_looked_at_and_left_alone(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "file", "--out")
    check_writable(tmp_path, "--out", folder=True)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible("a\nb\t\x1b\u202e\u200b") == "a↵\nb⇥\t␛⟨U+202E⟩⟨U+200B⟩"
    assert visible("👩\u200d👧") == "👩\u200d👧"
    assert one_line(" a\n") == "·a↵"
