"""How a process ends that was asked to."""

import os
import subprocess
import sys

import pytest


def test_a_process_that_was_asked_to_end_waits_for_no_thread() -> None:
    code = (
        "import os, signal, threading\n"
        "from lightning_inversion.cli.ending import end_process, ended_by_sigterm, exit_code\n"
        "def command():\n"
        "    with ended_by_sigterm():\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        signal.pause()\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "end_process(exit_code('x', command))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 1


@pytest.mark.parametrize(
    ("streams", "encoding"), [(">&- <&- 2>&-", "utf-8"), ("", "ascii"), ("", "latin-1")]
)
def test_a_closed_stream_and_a_small_encoding_are_no_fault(streams: str, encoding: str) -> None:
    code = (
        "import sys\n"
        "from lightning_inversion.cli.ending import open_streams\n"
        "open_streams()\n"
        "print('\\u00e9\\u65e5', sys.stdin.read(), sys.stdout.isatty())\n"
        "print('\\u65e5', file=sys.stderr)\n"
    )
    ended = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {streams}', sys.executable, code],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        input=b"",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith(b"" if streams else b"\\u65e5  False\n")
