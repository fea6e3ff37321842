"""`lightning-inversion attribute`: from a text to a page, JSON, or a coloured line."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from lightning_inversion.attribution.attribute import encode
from lightning_inversion.attribution.config import Choices, Display, with_preset
from lightning_inversion.attribution.many_texts import Request, RowFile, run_texts
from lightning_inversion.attribution.render import score_lines
from lightning_inversion.attribution.replacement import Replacement
from lightning_inversion.attribution.result import AttributionResult
from lightning_inversion.data.texts import (
    ModelLimits,
    read_prompts,
    tokenize_each,
    warn_of_bad,
    writable,
)
from lightning_inversion.errors import InputError
from lightning_inversion.files import check_ending, check_processes, check_writable
from lightning_inversion.transformer.loading import WHAT_IS_LOADED, TransformerSpec
from lightning_inversion.transformer.tokens import named_token

_log = logging.getLogger(__name__)
_MOST_LETTERS = 10_000_000
"""Of a text on stdin, which may never end."""
_STDIO = Path("-")
_ROWS = "rows.jsonl"
"""The file of rows in a folder of pages."""
_LITERAL = {
    "token": "The target token, as text or as id:NUMBER. The default is the predicted token.",
    "against": "A second token, as text or as id:NUMBER, whose scalar is subtracted from the "
    "target's: why the target and not this one.",
}
"""Options of `Choices` that take any text as it is written. For `str | None`, as the class has it,
jsonargparse reads "null" and "# x" as None."""


def add_attribute_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command: files, and those of `Choices`, `Display` and the model."""
    parser.add_argument(
        "text", type=str, nargs="?", help="The text to attribute to; - reads it from stdin."
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help="A file of texts, one a line (or .jsonl, key prompt), instead of one; needs --out or "
        "--json. The row of a text that the model cannot run holds the error.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="Where to write the page of HTML; - for stdout. With --prompts, a folder for an index "
        "and a page of each text.",
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="Where to write JSON; - for stdout. With --prompts, JSON lines, in --out if left out: "
        "the same command resumes a stopped run, or shares a running one.",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="Processes that share the texts of --prompts, with a model and one thread each.",
    )
    parser.add_argument(
        "--tensorboard", type=Path, help="A folder of event files to add the result to."
    )
    parser.add_argument("--preset", type=str, help="original: the source's choices.")
    parser.add_class_arguments(Choices, skip=set(_LITERAL))
    for option, description in _LITERAL.items():
        parser.add_argument(f"--{option}", type=str, help=description)
    parser.add_class_arguments(Display)
    others = {field.name for field in fields(TransformerSpec)} - set(WHAT_IS_LOADED)
    parser.add_class_arguments(TransformerSpec, skip=others)


def run_attribute(options: Namespace) -> int:
    """Run the command; returns the exit code: 0 done, 1 interrupted.

    Args:
        options: from a parser with `add_attribute_arguments`.

    Raises:
        InputError: the options are wrong; before a model is loaded wherever that can be known.
        ProcessLostError: one of several processes died.
    """
    try:
        return _run(options)
    except InputError as error:
        raise InputError(str(error).replace("--model.transformer.", "--")) from error


def _run(options: Namespace) -> int:
    choices, display = with_preset(
        options.preset, _options_of(Choices, options), _options_of(Display, options)
    )
    texts = _texts(options)
    _check_files(options)
    _check_processes(options)
    request = Request(choices, display, options.preset, _spec(options))
    bad = _check_tokens(request, texts, options.prompts)
    texts = [writable(text) for text in texts]
    if options.prompts is not None and options.json != _STDIO:
        return _run_file(request, texts, bad, options)
    model, tokenizer = request.spec.load_causal_lm()
    if options.prompts is None:
        _write_result(request.result(model, tokenizer, texts[0]), options)
        return 0
    for index, text in enumerate(texts):
        row = request.row(model, tokenizer, text, bad.get(index))
        print(json.dumps(row, ensure_ascii=False, allow_nan=False), flush=True)
    return 0


def _run_file(
    request: Request, texts: Sequence[str], bad: Mapping[int, str], options: Namespace
) -> int:
    rows = RowFile(options.json or options.out / _ROWS, texts, request.settings, bad)
    try:
        run_texts(request, rows, options.processes)
        if options.out is not None:
            _log.info("written to %s", rows.results(request.display).write_pages(options.out))
    except KeyboardInterrupt:
        _log.warning(
            "%s texts are finished, in %s; repeat the command to resume", rows.standing, rows.path
        )
        return 1
    return 0


def _options_of(kind: type[Any], options: Namespace) -> Any:
    return kind(**{field.name: options[field.name] for field in fields(kind)})


def _spec(options: Namespace) -> TransformerSpec:
    return TransformerSpec(depth=None, **{name: options[name] for name in WHAT_IS_LOADED})


def _texts(options: Namespace) -> list[str]:
    if (options.text is None) == (options.prompts is None):
        raise InputError(
            "Give one text to attribute to (- for stdin), or --prompts with a file of them."
            if options.text is None
            else "A text and --prompts are two inputs; leave one of them out."
        )
    if options.prompts is not None:
        return read_prompts(options.prompts, "--prompts")
    if options.text != str(_STDIO):
        return [options.text]
    text = sys.stdin.read(_MOST_LETTERS + 1)
    if len(text) > _MOST_LETTERS:
        raise InputError(f"The text on stdin has over {_MOST_LETTERS} characters; shorten it.")
    return [text.removesuffix("\n")]


def _check_files(options: Namespace) -> None:
    if options.prompts is not None:
        if options.tensorboard is not None:
            raise InputError("--tensorboard shows one text; with --prompts give --out or --json.")
        if options.json is None and options.out is None:
            raise InputError(
                "--prompts needs --out, a folder of pages, or --json, a file of rows (- for "
                "stdout); give one of them."
            )
        if options.out is not None and options.out.suffix == ".html":
            raise InputError(
                f"--out {str(options.out)!r} is one page, and --prompts gives one for each text; "
                "name a folder."
            )
        if options.out == _STDIO or (options.json == _STDIO and options.out is not None):
            raise InputError(
                "--out is a folder of pages with --prompts, and its rows are in a file; leave out "
                "the -."
            )
    if options.out is not None and options.out == options.json != _STDIO:
        raise InputError(f"--out and --json are both {str(options.out)!r}; give two files.")
    if options.out == options.json == _STDIO:
        raise InputError("--out and --json cannot both be stdout; give one of them a file.")
    for option in ("out", "json"):
        path = options[option]
        if path is None or path == _STDIO:
            continue
        pages = option == "out" and options.prompts is not None
        if not pages:
            own = (".html", ".htm") if option == "out" else (".json", ".jsonl")
            check_ending(path, f"--{option}", *own)
        if path.is_dir() and not pages:
            raise InputError(f"--{option} {str(path)!r} is a folder; give a file in it.")
        check_writable(path, f"--{option}", folder=pages)
    if options.tensorboard is not None:
        check_writable(options.tensorboard, "--tensorboard", folder=True)


def _check_processes(options: Namespace) -> None:
    check_processes(options.processes)
    if options.processes == 1:
        return
    if options.prompts is None:
        raise InputError(
            "--processes shares out the texts of --prompts, and here is one text; leave it out."
        )
    if options.json == _STDIO:
        raise InputError(
            "--processes needs a file of rows, which --json - is not; give --json a file."
        )
    if options.device_map is not None:
        raise InputError(
            f"--device_map {options.device_map} spreads the model over the devices, and several "
            "processes would each hold one; leave --processes out, or leave --device_map out."
        )


def _check_tokens(request: Request, texts: Sequence[str], file: Path | None) -> dict[int, str]:
    """Check what needs the model's tokenizer and configuration, and no weights.

    Returns:
        Why texts of the file cannot be run, by their index.
    """
    tokenizer, choices = request.spec.load_tokenizer(), request.choices
    config = request.spec.config()
    limits = ModelLimits.of(config)
    for option, name in (("token", choices.token), ("against", choices.against)):
        if name is not None:
            named_token(tokenizer, name, option, limits.vocabulary)
    Replacement.named(tokenizer, choices.replacement, limits.vocabulary)
    if file is None:
        encode(tokenizer, texts[0], config)
        return {}
    _, bad = tokenize_each(texts, tokenizer, limits, special_tokens=True)
    warn_of_bad(bad, len(texts), f"--prompts {str(file)!r}")
    return bad


def _write_result(result: AttributionResult, options: Namespace) -> None:
    """Write the files that were asked for, and the coloured text to the terminal."""
    _write_text(options.out, result.to_html)
    _write_text(options.json, result.to_json)
    if options.tensorboard is not None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and seldom needed

        with SummaryWriter(str(options.tensorboard)) as writer:
            result.log(writer)
    stdout_taken = _STDIO in (options.out, options.json)
    Console(stderr=stdout_taken).print(result)
    if not stdout_taken and not sys.stdout.isatty():  # without colours the scores are not seen
        print(*score_lines(result), sep="\n")


def _write_text(path: Path | None, content: Callable[[], str]) -> None:
    if path is None:
        return
    if path == _STDIO:
        sys.stdout.write(content() + "\n")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content(), encoding="utf-8")
    _log.info("written to %s", path)
