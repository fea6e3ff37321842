"""How a process ends that was asked to."""

import subprocess
import sys


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
