"""The entry point: its commands, its exit codes, and where its messages go."""

import logging
import subprocess
import sys

import pytest

from lightning_inversion import __main__ as entry
from lightning_inversion.__main__ import COMMANDS
from lightning_inversion.__main__ import main as run
from lightning_inversion.cli.ending import exit_of, messages_on_stderr
from lightning_inversion.errors import InputError, ProcessLostError


def test_an_unknown_command_is_answered_by_the_known_ones(monkeypatch, capsys) -> None:
    monkeypatch.setattr(entry, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert run(["fitt"]) == 2
    assert capsys.readouterr().err == (
        "lightning-inversion: unknown command 'fitt'; did you mean fit? choose from fit, validate, "
        "predict, capture, attribute, sweep, report, audit, cache.\n"
    )


def test_the_name_of_a_call_is_answered_by_its_command(capsys) -> None:
    assert run(["recover"]) == 2
    assert "unknown command 'recover'; did you mean predict?" in capsys.readouterr().err


def test_options_that_must_be_given_are_named_as_they_are_written(capsys) -> None:
    assert run(["capture", f"--prompts={__file__}"]) == 2
    assert "--out must be given" in capsys.readouterr().err


def test_a_file_that_fails_in_the_run_is_one_sentence_and_code_1(monkeypatch, capsys) -> None:
    def fails(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "rows.jsonl")

    monkeypatch.setattr("lightning_inversion.cli.lightning.InversionCLI", fails)
    assert run(["fit"]) == 1
    message = capsys.readouterr().err
    assert message == (
        "lightning-inversion: 'rows.jsonl' failed: Permission denied; the run has ended.\n"
    )


def test_help_and_version_need_no_torch() -> None:
    shown = {
        ("--version",): "lightning-inversion 0.",
        ("--help",): "usage: lightning-inversion COMMAND",
        ("sweep", "--help"): "--processes",
        ("audit", "--help"): "--processes",
        ("cache", "--help"): "LIGHTNING_INVERSION_CACHE",
        ("report", "--help"): "--title",
        ("fit", "--help"): "--model.iterations",
        ("validate", "--depth=2", "-h"): "--ckpt_path",
        ("predict", "--help"): "--model.recovery.budget",
        ("capture", "--help"): "--store",
        ("attribute", "--help"): "--against",
    }
    code = (
        "import contextlib, io, sys\nfrom lightning_inversion.__main__ import main\n"
        f"for arguments, part in {shown}.items():\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        assert main([*arguments]) == 0\n"
        "    assert part in out.getvalue(), arguments\n"
        "    heavy = {'torch', 'lightning', 'transformers'} & sys.modules.keys()\n"
        "    assert not heavy, (arguments, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command: str, capsys) -> None:
    assert run([command, "--help", "all"]) == 0
    assert f"lightning-inversion {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_abbreviation(command: str, capsys) -> None:
    """All of them have an option that begins with --m or --t, --n or --p; none has one of these."""
    assert run([command, "--mode=x", "--titl=x", "--prompt=x", "--data.prompt=['a']"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("lightning-inversion: ")
    assert message.count("\n") == 1, message


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (InputError("--x is wrong."), (2, "--x is wrong.")),
        (ProcessLostError("process 1 ended"), (1, "process 1 ended; the run has ended.")),
        (OSError(28, "No space left on device"),
         (1, "nothing more can be written (No space left on device); make room and resume.")),
        (KeyboardInterrupt(), (1, "interrupted.")),
        (OSError("no file is to blame"), None),
        (ValueError("a fault of the program"), None),
    ],
    ids=repr,
)  # fmt: skip
def test_how_a_command_ends(error: BaseException, ending: tuple[int, str] | None) -> None:
    assert exit_of(error) == ending


def test_messages_go_to_stderr_from_the_command_line_alone(capsys) -> None:
    log = logging.getLogger("lightning_inversion.part")
    log.info("unseen")
    with messages_on_stderr():
        log.info("seen")
    log.info("unseen")
    assert capsys.readouterr().err == "seen\n"
