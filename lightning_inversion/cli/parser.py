"""Wrong input on the command line: one sentence that names the option and the way out."""

import re
from argparse import ArgumentParser as PlainParser
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from lightning_inversion.cli.options import SHORT, check_names, unknown
from lightning_inversion.errors import InputError
from lightning_inversion.untrusted import (
    MOST_LEVELS,
    HostileError,
    RepeatedKeyError,
    check_yaml,
    read_file,
    read_yaml,
)

MOST_ENTRIES = 2000
"""Values in one list: jsonargparse takes a quarter of a minute for so many, a minute for twice."""


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of descriptions and examples."""


class OneSentenceParser(ArgumentParser):
    """Raises an `InputError` of one sentence for wrong input; abbreviations are wrong input.

    Attributes:
        passes_on: whether options of another command are kept in ``passed_on``, not refused.
    """

    passes_on = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._typed: list[str] = []
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": _Formatter, **kwargs})

    def parse_args(  # type: ignore[override]
        self, args: Any = None, *more: Any, **how: Any
    ) -> Namespace:
        self._typed = list(args or ())
        _check_values(self._typed)
        options: Namespace = super().parse_args(args, *more, **how)
        return options

    def parse_command(self, args: list[str]) -> Namespace:
        """Parse the options of a command; those of another one become ``passed_on``.

        Raises:
            InputError: they are wrong.
        """
        if not self.passes_on:
            return self.parse_args(args)
        ours: list[str] = []
        others: list[str] = []
        taker = ours  # of the words before the first option
        for word in args:
            if word.startswith("-"):
                known = word.partition("=")[0] in self._option_string_actions
                taker = ours if known else others
            taker.append(word)
        check_names(self._command, others, options_of(self))
        options = self.parse_args(ours)
        options.passed_on = others
        return options

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a file of options, once it is known that it ends and is not too large."""
        try:
            text = read_file(Path(path))
            check_yaml(text, MOST_ENTRIES)
            holds_options = _holds_options(text)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"--config {str(path)!r} cannot be read: {reason}; give a file of YAML."
            ) from error
        if not holds_options:
            raise InputError(f"--config {str(path)!r} holds no options; give a file of YAML.")
        options: Namespace = super().parse_path(path, *args, **kwargs)
        return options

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an `InputError` of one sentence."""
        ours = input_error_behind(ex)
        absent = self._unrecognized(str(ours) if ours else " ".join(message.split()))
        sentence = str(ours) if ours else one_sentence(message, options_of(self))
        raise (absent or InputError(self._as_typed(sentence))) from ex

    def _as_typed(self, sentence: str) -> str:
        """The sentence with an option named as it was typed, not by its last part alone."""
        own = re.match(r"--(\w+):", sentence)
        if own is None or f"--{own[1]}" in options_of(self):
            return sentence
        typed = (word.partition("=")[0] for word in self._typed)
        option = next((word for word in typed if word.endswith(f".{own[1]}")), None)
        return sentence if option is None else f"{option}:{sentence[own.end() :]}"

    def _unrecognized(self, message: str) -> InputError | None:
        """For an option that the command, or a class that it was given, does not have."""
        if found := re.search(r"unrecognized arguments: ([^\s=]+)", message):
            if not found[1].startswith("-"):
                word = next(one for one in self._typed if one.split()[:1] == [found[1]])
                return InputError(
                    f"{word!r} belongs to no option; see lightning-inversion {self._command} "
                    "--help."
                )
            known = options_of(self)
            short = [name for name, long in SHORT.items() if long in known]
            return unknown(found[1], [*short, *known], self._command)
        if found := re.search(r"Option '(\w+)' is not accepted", message):
            typed = (word.partition("=")[0] for word in self._typed)
            option = next((word for word in typed if word.endswith(f".{found[1]}")), None)
            if option is not None:
                part = option.rpartition(".")[0]
                see = f"see lightning-inversion {self._command} {part}.help"
                return InputError(f"unknown option {option}; {see} for those of the class.")
        return None

    @property
    def _command(self) -> str:
        """The name of the command, the last word of its program's that is no placeholder."""
        words = [word for word in str(self.prog).split() if not word.startswith("[")]
        return " ".join(words[1:])


def _holds_options(text: bytes) -> bool:
    """Whether YAML may be keys and values, none of them twice; other faults are found later.

    Raises:
        RepeatedKeyError: a key stands twice.
    """
    try:
        held = read_yaml(text)
    except RepeatedKeyError:
        raise
    except ValueError:
        return True
    return held is None or isinstance(held, dict)


def _check_values(words: Sequence[str]) -> None:
    """Refuse a value of a command line that would exhaust the stack, or take for ever.

    Raises:
        InputError: names its option.
    """
    option = ""
    for word in words:
        name, _, value = str(word).rpartition("=")
        option = word if word.startswith("-") and not name else name or option
        many = value.count(",") >= MOST_ENTRIES
        if many or value.count("[") + value.count("{") > MOST_LEVELS or {"&", "*"} <= set(value):
            try:
                check_yaml(value, MOST_ENTRIES)
            except HostileError as error:
                way_out = "put them in a file" if "prompts" in option else "correct it"
                raise InputError(f"{option or 'A value'}: {error}; {way_out}.") from error
            except ValueError:  # a text that is no YAML
                continue


def options_of(parser: PlainParser) -> list[str]:
    """The options of a parser and of its commands, as they are written."""
    options = list(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action.choices, Mapping):
            options += [name for sub in action.choices.values() for name in options_of(sub)]
    return options


def input_error_behind(error: BaseException | None) -> InputError | None:
    """The sentence of ours that a library has wrapped in errors of its own, if there is one."""
    seen: list[BaseException | None] = [None]
    while error not in seen:
        if isinstance(error, InputError):
            return error
        seen.append(error)
        assert error is not None
        error = error.__cause__ or error.__context__
    return None


_KINDS = {
    "<class 'int'>": "a whole number", "<class 'float'>": "a number",
    "<class 'bool'>": "true or false", "<class 'str'>": "a text", "<class 'NoneType'>": "null",
    "<class 'list'>": "a list", "<class 'dict'>": "a mapping", "list[str]": "a list of texts",
    "list[int]": "a list of whole numbers", "list[float]": "a list of numbers",
}  # fmt: skip
"""Types as jsonargparse prints them, in words."""


def one_sentence(message: str, known: Sequence[str] = ()) -> str:
    """jsonargparse's message in one line; for a wrong name or type, what there is to choose.

    Args:
        message: of jsonargparse.
        known: the options; a name that is none of them is an argument.
    """
    text = re.sub(r"\s+", " ", message).strip()
    wanted = re.search(r'Parser key "([\w.]+)":.*<class \'(lightning_inversion[\w.]+)\'>', text)
    given = re.search(r"Given value: (.*)$", text)
    if wanted and given:
        key, path = wanted.groups()
        module, name = path.rsplit(".", 1)
        classes = subclass_names(getattr(import_module(module), name))
        choices = ", ".join(classes)
        return f"--{key}: unknown {name} {given[1]!r}; choose from {choices}, or give a class_path."
    missing = re.search(r"the following arguments are required: (.*)$", text)
    if missing:
        names = [name.lstrip("-") for name in missing[1].split(", ")]
        shown = [f"--{name}" if f"--{name}" in known else name.upper() for name in names]
        return f"{', '.join(shown)} must be given; see --help."
    wrong = re.search(
        r'Parser key "([\w.]+)"(?: element \d+)?:.*?'
        r"(?:Subtypes: [\[(](.*)[\])] Errors:|Expected an? (.*?)\. Got)"
        r".*?(?:Given|Got)? value: (.*)$",
        text,
    )
    if wrong:
        key, several, one, value = wrong.groups()
        fault = in_words(several or one)
        if fault:
            return f"--{key}: {value} {fault}."
    return re.sub(r'^Parser key "([\w.]+)": ', r"--\1: ", text)


def in_words(types: str) -> str | None:
    """What a value of none of these types is; None where there are no words for one of them."""
    if "typing.Callable" in types:
        return "is no class that can be found; give the path of one, as torch.optim.Adam"
    parts = re.findall(r"typing\.Literal\[.*?\]|<class '.*?'>|[\w.]+(?:\[[^\]]*\])?", types)
    words: list[str] = []
    literal = False
    for part in parts:
        if part.startswith("typing.Literal"):
            literal = True
            words += re.findall(r"'(.*?)'", part)
        elif part in _KINDS:
            words.append(_KINDS[part])
        else:
            return None
    if literal and not set(words) & (set(_KINDS.values()) - {"null"}):
        return f"is unknown; choose from {', '.join(words)}"
    return f"is not {' or '.join(words)}"


def subclass_names(base: type) -> list[str]:
    """Short names of the classes that can be chosen where ``base`` is asked for."""
    children: list[type] = base.__subclasses__()
    names = [child.__name__ for child in children if not child.__name__.startswith("_")]
    return sorted({*names, *(name for child in children for name in subclass_names(child))})
