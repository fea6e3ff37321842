"""Wrong input on the command line: one sentence that names the option and the way out."""

import difflib
import re
import sys
from argparse import ArgumentParser, HelpFormatter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from lightning_inversion.errors import InputError


class OneSentenceParser(LightningArgumentParser):
    """Says what is wrong in one sentence and exits with code 2; help shows our options first."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence without usage and exit."""
        ours = input_error_behind(ex)
        if ours is not None:
            sentence = str(ours)
        elif "unrecognized arguments" in message:
            sentence = self._unrecognized(" ".join(message.split()))
        else:
            sentence = one_sentence(message)
        sys.stderr.write(f"lightning-inversion: {sentence}\n")
        raise SystemExit(2)

    def _unrecognized(self, message: str) -> str:
        """What may have been meant, or where the options are listed."""
        word = re.search(r"unrecognized arguments: ([^\s=]+)", message)
        near = difflib.get_close_matches(word[1], options_of(self), 1, 0.8) if word else []
        commands = [
            name for action in self._actions if isinstance(action.choices, Mapping)
            for name in action.choices
        ]  # fmt: skip
        named = commands if len(commands) == 1 else []
        command = " ".join([self.prog.replace(" [options]", ""), *named])
        way_out = f"did you mean {near[0]}?" if near else f"see {command} --help."
        return f"{message}; {way_out}"

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Lightning's four hundred lines on the Trainer stand last."""
        self._action_groups = sorted(
            self._action_groups, key=lambda group: "every aspect of training" in str(group.title)
        )
        return super().format_help(formatter)


def options_of(parser: ArgumentParser) -> list[str]:
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


@contextmanager
def wrong_values(option: str = "") -> Iterator[None]:
    """What a library says of the values of options is wrong input, in one sentence.

    Args:
        option: to which the values belong, if it is known.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, MisconfigurationException) as error:
        ours = input_error_behind(error)
        if ours is not None:
            raise ours from error
        if isinstance(error, UnicodeDecodeError):
            raise InputError(
                "--config names a file that is not UTF-8 text; give a file of YAML."
            ) from error
        text = " ".join(str(error).split())
        key = re.search(r"\b(accelerator|devices|num_nodes|precision|strategy)=", text)
        name = f"--trainer.{key[1]}" if key else option
        raise InputError(
            f"{name}: {text.rstrip('.')}; choose another value.".removeprefix(": ")
        ) from error


_KINDS = {
    "<class 'int'>": "a whole number", "<class 'float'>": "a number",
    "<class 'bool'>": "true or false", "<class 'str'>": "a text", "<class 'NoneType'>": "null",
    "<class 'list'>": "a list", "<class 'dict'>": "a mapping", "list[str]": "a list of texts",
    "list[int]": "a list of whole numbers", "list[float]": "a list of numbers",
}  # fmt: skip
"""Types as jsonargparse prints them, in words."""


def one_sentence(message: str) -> str:
    """jsonargparse's message in one line; for a wrong name or type, what there is to choose."""
    text = re.sub(r"\s+", " ", message).strip()
    wanted = re.search(r'Parser key "([\w.]+)":.*<class \'(lightning_inversion[\w.]+)\'>', text)
    given = re.search(r"Given value: (.*)$", text)
    if wanted and given:
        key, path = wanted.groups()
        module, name = path.rsplit(".", 1)
        names = ", ".join(subclass_names(getattr(import_module(module), name)))
        return f"--{key} {given[1]} is no {name}; choose one of {names}, or give a class_path."
    missing = re.search(r"the following arguments are required: (.*)$", text)
    if missing:
        options = ", ".join(f"--{name.lstrip('-')}" for name in missing[1].split(", "))
        return f"{options} must be given; see --help."
    wrong = re.search(
        r'Parser key "([\w.]+)":.*?(?:Subtypes: [\[(](.*)[\])] Errors:|Expected an? (.*?)\. Got)'
        r".*?(?:Given|Got)? value: (.*)$",
        text,
    )
    if wrong:
        key, several, one, value = wrong.groups()
        choices = in_words(several or one)
        if choices:
            return f"--{key}: {value} {choices}."
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
        return f"is unknown; choose one of {', '.join(words)}"
    return f"is not {' or '.join(words)}"


def subclass_names(base: type) -> list[str]:
    """Short names of the classes that can be chosen where ``base`` is asked for."""
    children: list[type] = base.__subclasses__()
    names = [child.__name__ for child in children if not child.__name__.startswith("_")]
    return sorted({*names, *(name for child in children for name in subclass_names(child))})
