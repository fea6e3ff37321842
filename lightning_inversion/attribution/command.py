"""`lightning-inversion attribute`: from a text to a page, JSON, or a coloured line."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lightning_inversion.attribution.attribute import encode, to_stderr
from lightning_inversion.attribution.config import Choices, Look, with_preset
from lightning_inversion.attribution.many_texts import run_texts
from lightning_inversion.attribution.naming import named_token, replacement_for
from lightning_inversion.attribution.request import Request
from lightning_inversion.attribution.result import AttributionResult
from lightning_inversion.attribution.rows import RowFile
from lightning_inversion.data.texts import read_prompts
from lightning_inversion.errors import InputError
from lightning_inversion.files import check_writable
from lightning_inversion.transformer.loading import WHAT_IS_LOADED, TransformerSpec

_IN_AND_OUT = "-"


def add_attribute_arguments(parser: ArgumentParser) -> None:
    """The options of the command, flat: those of the model, `Choices` and `Look`, and files."""
    parser.add_argument(
        "text", type=str | None, nargs="?", help="The text to attribute to; - reads it from stdin."
    )
    parser.add_argument(
        "--texts",
        type=Path | None,
        help="A file of texts, one a line (or .jsonl, key prompt), instead of one; needs --json.",
    )
    parser.add_argument(
        "--out", type=Path | None, help="Where to write the page of HTML; - for stdout."
    )
    parser.add_argument(
        "--json",
        type=Path | None,
        help="Where to write JSON; - for stdout. With --texts JSON lines, and a run goes on.",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="Share the texts of --texts over so many processes, with a model and one thread each.",
    )
    parser.add_argument(
        "--tensorboard", type=Path | None, help="A folder of event files to add the result to."
    )
    parser.add_argument(
        "--preset", type=str | None, help="document: the choices of the document, exactly."
    )
    parser.add_class_arguments(Choices)
    parser.add_class_arguments(Look)
    others = {field.name for field in fields(TransformerSpec)} - set(WHAT_IS_LOADED)
    parser.add_class_arguments(TransformerSpec, skip=others)


def run_attribute(options: Namespace) -> int:
    """Run the command; returns the exit code, 1 if it was interrupted.

    Args:
        options: what a parser with `add_attribute_arguments` parsed.

    Raises:
        InputError: the options are wrong; before a model is loaded wherever that can be known.
        ProcessLostError: one of several processes died.
    """
    choices, look = with_preset(options.preset, _made(Choices, options), _made(Look, options))
    texts = _texts(options)
    _check_files(options)
    _check_processes(options)
    request = Request(choices, look, options.preset, _spec(options))
    _check_tokens(request.spec.load_tokenizer(), texts, choices)
    if options.texts is not None and options.json != Path(_IN_AND_OUT):
        return _run_file(request, texts, options)
    model, tokenizer = request.spec.load_causal_lm()
    for text in texts:
        result = request.result(model, tokenizer, text)
        if options.texts is None:
            _write(result, options)
        else:
            print(result.to_json(indent=None), flush=True)
    return 0


def _run_file(request: Request, texts: list[str], options: Namespace) -> int:
    """Texts to rows, which the same command goes on with."""
    with RowFile.alone(options.json, texts, request.settings) as rows:
        try:
            run_texts(request, rows, options.processes)
        except KeyboardInterrupt:
            to_stderr(
                f"{rows.standing} texts are finished, in {rows.path}; the same command goes on."
            )
            return 1
    return 0


def _made(kind: type[Any], options: Namespace) -> Any:
    return kind(**{field.name: options[field.name] for field in fields(kind)})


def _spec(options: Namespace) -> TransformerSpec:
    try:
        return TransformerSpec(depth=None, **{name: options[name] for name in WHAT_IS_LOADED})
    except InputError as error:
        raise InputError(str(error).replace("--model.transformer.", "--")) from error


def _texts(options: Namespace) -> list[str]:
    if (options.text is None) == (options.texts is None):
        raise InputError(
            "Give one text to attribute to (- for stdin), or --texts with a file of them."
            if options.text is None
            else "A text and --texts are two inputs; leave one of them out."
        )
    if options.texts is not None:
        texts = read_prompts(options.texts, "--texts")
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                raise InputError(
                    f"--texts {str(options.texts)!r}, line {number} is empty; every line needs a "
                    "text."
                )
        return texts
    text = sys.stdin.read().removesuffix("\n") if options.text == _IN_AND_OUT else options.text
    if not text:
        raise InputError("The text is empty: give at least one token to attribute to.")
    return [text]


def _check_files(options: Namespace) -> None:
    if options.texts is not None:
        for option in ("out", "tensorboard"):
            if options[option] is not None:
                raise InputError(f"--{option} shows one text; with --texts give --json alone.")
        if options.json is None:
            raise InputError("--texts needs --json, the file of the rows (- for stdout).")
    if options.out == options.json == Path(_IN_AND_OUT):
        raise InputError("--out and --json cannot both be stdout; give one of them a file.")
    for option in ("out", "json"):
        path = options[option]
        if path is None or path == Path(_IN_AND_OUT):
            continue
        if path.is_dir():
            raise InputError(f"--{option} {str(path)!r} is a folder; give a file in it.")
        check_writable(path, f"--{option}")
    if options.tensorboard is not None:
        check_writable(options.tensorboard, "--tensorboard", folder=True)


def _check_processes(options: Namespace) -> None:
    if options.processes < 1:
        raise InputError(f"--processes must be at least 1, and is {options.processes}.")
    if options.processes == 1:
        return
    if options.texts is None:
        raise InputError(
            "--processes shares out the texts of --texts, and here is one text; leave it out."
        )
    if options.json == Path(_IN_AND_OUT):
        raise InputError(
            "--processes needs a file of rows, which --json - is not; give --json a file."
        )
    if options.device_map is not None:
        raise InputError(
            f"--device_map {options.device_map} spreads the model over the devices, and several "
            "processes would each hold one; leave --processes out, or leave --device_map out."
        )


def _check_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], choices: Choices) -> None:
    """What a tokenizer alone can tell, while no model is loaded."""
    for option in ("token", "against"):
        if (name := getattr(choices, option)) is not None:
            named_token(tokenizer, name, option)
    replacement_for(tokenizer, choices.replacement)
    for text in texts:
        encode(tokenizer, text)


def _write(result: AttributionResult, options: Namespace) -> None:
    """To the places that were asked for, or to the terminal."""
    _put(options.out, result.to_html)
    _put(options.json, result.to_json)
    if options.tensorboard is not None:
        # Slow to import, and seldom needed.
        from torch.utils.tensorboard import SummaryWriter

        from lightning_inversion.attribution.tensorboard import log_attribution

        with SummaryWriter(str(options.tensorboard)) as writer:
            log_attribution(result, writer)
    stdout_taken = Path(_IN_AND_OUT) in (options.out, options.json)
    Console(stderr=stdout_taken).print(result)


def _put(path: Path | None, content: Any) -> None:
    if path is None:
        return
    if path == Path(_IN_AND_OUT):
        sys.stdout.write(content() + "\n")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content(), encoding="utf-8")
    to_stderr(f"written to {path}.")
