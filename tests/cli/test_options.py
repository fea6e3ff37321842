"""Short options, pages of help, and errors that need no import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_inversion import __main__ as entry
from lightning_inversion.__main__ import COMMANDS
from lightning_inversion.__main__ import main as run
from lightning_inversion.cli.options import (
    SECTIONS,
    SHORT,
    WHOLE_RUN,
    first_page,
    in_full,
    nearest,
    own_names,
    renamed,
    replacing_sources,
)
from lightning_inversion.cli.parser import OneSentenceParser, options_of

PAGES = [command for command in COMMANDS if first_page(command) is not None]


def parser_of(command: str) -> OneSentenceParser:
    """The whole parser of a command."""
    from lightning_inversion.cli.lightning import InversionCLI, quiet_lightning

    if COMMANDS[command].module == "cli.lightning":
        quiet_lightning()
        cli = InversionCLI.__new__(InversionCLI)
        parsers: list[OneSentenceParser] = []

        def stop(self: InversionCLI, *_: object) -> None:
            parsers.append(self._subcommand_parsers[command])
            raise InterruptedError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InversionCLI, "parse_arguments", stop)
            with pytest.raises(InterruptedError):
                cli.__init__([command])  # type: ignore[misc]
        return parsers[0]
    module = entry._imported(f"lightning_inversion.{COMMANDS[command].module}")
    parser = OneSentenceParser(prog=command)
    getattr(module, f"add_{command}_arguments")(parser)
    return parser


@pytest.mark.parametrize("command", PAGES)
def test_a_page_is_short_and_its_options_and_defaults_are_the_parsers(command: str) -> None:
    page = first_page(command)
    assert page is not None
    lines = page.splitlines()
    assert len(lines) <= 42
    assert max(map(len, lines)) <= 100
    parser = parser_of(command)
    known = set(options_of(parser))
    if parser.passes_on:  # to the runs of fit and predict
        known |= {*SHORT, *options_of(parser_of("fit"))}
    lightning = COMMANDS[command].module == "cli.lightning"
    defaults = vars(parser.get_defaults().as_flat())
    for option in re.findall(r"(?<!\S)--[\w.-]+", page):
        key = SHORT.get(option, option) if lightning else option
        inner = re.fullmatch(r"--model\.(optimizer|recovery)\.\w+", key)
        assert key in known or inner, option
    for option, default in re.findall(
        r"^  (--[\w.-]+) .*(?:\n {20,}.*)*?\(default (.*?)\)$", page, re.M
    ):
        key = in_full([option])[0] if lightning else option
        if key in known:
            value = defaults[key.removeprefix("--")]
            shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            assert shown == default, option


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_every_option_of_a_run_begins_with_a_word_that_is_known(command: str) -> None:
    first = {option.partition(".")[0] for option in options_of(parser_of(command))}
    known = {*WHOLE_RUN, *(f"--{section}" for section in SECTIONS)}
    assert {option.rstrip("+") for option in first if option.startswith("--")} <= known


def test_what_is_wrong_at_a_glance_needs_no_torch(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    wrong = {
        ("fit", "--prompts", absent): "--prompts",
        ("fit", f"--config={absent}.yaml"): "does not exist",
        ("predict", "--targets", absent): "--targets",
        ("capture", "--prompts", absent, "--out", "x"): "--prompts",
        ("attribute", "a", "--model", f"{absent}.gguf"): "--model",
        ("fit", "--iterations", "3"): "did you mean --model.iterations?",
        ("predict", "--budget", "3"): "did you mean --model.recovery.budget?",
        ("sweep", "--process", "3"): "did you mean --processes?",
        ("audit", "--depths", "3"): "did you mean --depth?",
    }
    code = (
        "import contextlib, io, sys\nfrom lightning_inversion.__main__ import main\n"
        f"for arguments, part in {wrong}.items():\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as err:\n"
        "        assert main([*arguments]) == 2\n"
        "    assert part in err.getvalue(), (arguments, err.getvalue())\n"
        "    heavy = {'torch', 'lightning', 'transformers', 'pandas'} & sys.modules.keys()\n"
        "    assert not heavy, (arguments, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_prompts_replace_those_of_a_config_before_them() -> None:
    none = ["--data.prompts=null", "--data.file=null", "--data.targets=null"]
    for typed in (["--data.file=x"], ["--data.targets", "x"], ["--data.prompts", '["a"]']):
        words = ["fit", "--config=a.yaml", "--model.iterations=3", *typed]
        assert replacing_sources(words) == [*words[:3], *none, *typed]
    for kept in (
        ["fit", "--data.file=x", "--config", "a.yaml"],
        ["fit", "--data.file=x", "--data.targets=y"],
        ["fit", "--config", "a.yaml", "--data.noise", "1"],
    ):
        assert replacing_sources(kept) == kept


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--model.dept", "--model.transformer.depth"),
        ("--depth", "--model.transformer.depth"),
        ("--data.fil", "--data.file"),
        ("--nothing_like_it", None),
    ],
)
def test_the_nearest_option(word: str, meant: str | None) -> None:
    known = ["--model.transformer.depth", "--data.file", "--model.seed", "--model.decoder"]
    assert nearest(word, known) == meant


def test_short_options_are_keys_of_a_config() -> None:
    assert in_full(["--depth=3", "--model", "gpt2", "--seed_everything", "1"]) == [
        "--model.transformer.depth=3", "--model.transformer.model", "gpt2",
        "--seed_everything", "1",
    ]  # fmt: skip


def test_an_error_names_the_options_of_the_command() -> None:
    sentence = "--model.transformer.depth is 9; use --data.file, --scale or --data.repeat."
    names = own_names(["--depth", "--prompts", "--scale"], sentence)
    assert renamed(sentence, names) == ("--depth is 9; use --prompts, --scale or --data.repeat.")


def test_an_error_names_what_was_typed(tiny_folder: Path, tmp_path: Path, capsys) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The sky is blue.\n")
    common = ["--model", str(tiny_folder), "--prompts", str(prompts)]
    root = f"--trainer.default_root_dir={tmp_path}"
    assert run(["fit", *common, root, "--depth=9"]) == 2
    assert "--depth: 9 blocks" in capsys.readouterr().err
    assert run(["sweep", *common, root, "--over=depth=2,9", "--dry-run"]) == 2
    assert "--over depth: 9 blocks" in capsys.readouterr().err
    assert run(["capture", *common, f"--out={tmp_path / 'x'}", "--depth=9"]) == 2
    assert "--depth: 9 blocks" in capsys.readouterr().err
    assert run(["predict", *common, root, "--model.recovery.budgt=9"]) == 2
    assert "unknown option --model.recovery.budgt; see" in capsys.readouterr().err


def test_help_all_of_predict_leaves_out_what_a_fit_has(capsys) -> None:
    assert run(["predict", "--help", "all"]) == 0
    shown = capsys.readouterr().out
    assert "--model.recovery" in shown
    assert "--trainer.devices" in shown
    assert "--model.objective" not in shown
    assert "--learning_rate" not in shown


def test_the_whole_help_holds_no_control_character() -> None:
    assert all(letter.isprintable() or letter == "\n" for letter in parser_of("fit").format_help())
