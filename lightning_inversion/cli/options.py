"""Options as they are typed: short names, the first page of help, and what is wrong at a glance.

Imports nothing that takes time: all of it answers before torch is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path

from lightning_inversion.errors import InputError

SHORT = {
    "--model": "--model.transformer.model",
    "--depth": "--model.transformer.depth",
    "--prompts": "--data.file",
    "--targets": "--data.targets",
}
"""Options that every command has, and the keys of a config that they set."""
SECTIONS = (
    *("model", "data", "trainer", "learning_rate", "decoding", "stopping", "display"),
    *("results", "checkpoint"),
)
"""The first words of the keys of a config."""
WHOLE_RUN = (
    *("--help", "--config", "--print_config", "--seed_everything", "--ckpt_path"),
    *("--weights_only", "--return_predictions", "--verbose", "--name"),
)
"""Options of fit, validate and predict that are in no section."""
_SOURCES = ("--data.prompts", "--data.file", "--data.targets")
"""Keys of a config that say what is to be recovered; one of them is given."""
_FILES = ("--config", "--prompts", "--data.file", "--targets", "--data.targets", "--join")
_NEAR = 0.7
"""The likeness from which an option may be what was meant."""
_PAGES = Path(__file__).parent / "help"


def first_page(command: str) -> str | None:
    """The help that a command shows unless all of it is asked for; None where it has no page."""
    path = _PAGES / f"{command}.txt"
    return path.read_text("utf-8") if path.exists() else None


def asked_help(words: Sequence[str]) -> str | None:
    """'page' where the first page of help is asked for, 'all' for all of it, else None."""
    for word, after in zip(words, [*words, ""][1:], strict=True):
        if word in ("-h", "--help"):
            return "all" if after == "all" else "page"
    return None


def in_full(words: Sequence[str]) -> list[str]:
    """A command line with the short options written as the keys of a config."""
    full = []
    for word in words:
        option, equals, value = word.partition("=")
        full.append(f"{SHORT.get(option, option)}{equals}{value}")
    return full


def names_typed(words: Sequence[str]) -> dict[str, str]:
    """The short options by the keys that they set, but for keys that were typed in full."""
    typed = {word.partition("=")[0] for word in words}
    return {long: short for short, long in SHORT.items() if long not in typed}


def replacing_sources(words: Sequence[str]) -> list[str]:
    """A command line in full, on which prompts or targets replace those of a config before them."""
    options = [word.partition("=")[0] for word in words]
    configs = [at for at, option in enumerate(options) if option in ("-c", "--config")]
    typed = [at for at, option in enumerate(options) if option in _SOURCES]
    later = [at for at in typed if configs and at > configs[-1]]
    if not later:
        return list(words)
    none = [f"{source}=null" for source in _SOURCES]
    return [*words[: later[0]], *none, *words[later[0] :]]


def own_names(options: Iterable[str], sentence: str) -> dict[str, str]:
    """Keys of a config in a sentence, and the options by which a command sets the same.

    Args:
        options: of the command, which has no config.
        sentence: the error of a part that names its options by their keys.
    """
    own, short = set(options), {long: name for name, long in SHORT.items()}
    names = {}
    for key in set(re.findall(r"--[\w.]+\w", sentence)):
        name = short.get(key, key.replace("--model.transformer.", "--"))
        if key not in own and name in own:
            names[key] = name
    return names


def renamed(sentence: str, names: Mapping[str, str]) -> str:
    """A sentence with options under other names."""
    return re.sub(r"--[\w.]+\w", lambda found: names.get(found[0], found[0]), sentence)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The option that was probably meant by an unknown one, or None.

    Example:
        >>> nearest("--model.depth", ["--model.decoder", "--model.transformer.depth"])
        '--model.transformer.depth'
    """
    options = sorted({option for option in known if option.startswith("--")}, key=len)
    best = max(options, key=lambda option: _likeness(word, option), default="")
    return best if _likeness(word, best) >= _NEAR else None


def _likeness(one: str, other: str) -> float:
    """How alike two options are, from 0 to 1; the last word of each counts half."""
    lasts = [option.lstrip("-").rpartition(".")[2] for option in (one, other)]
    if lasts[0] == lasts[1]:
        return 1.0
    ratios = [SequenceMatcher(None, *pair).ratio() for pair in ((one, other), lasts)]
    return sum(ratios) / 2


def unknown(word: str, known: Iterable[str], command: str) -> InputError:
    """The error for an option that a command does not have."""
    near = nearest(word, known)
    way_out = f"did you mean {near}?" if near else f"see lightning-inversion {command} --help."
    return InputError(f"unknown option {word}; {way_out}")


def check_names(command: str, words: Sequence[str], own: Iterable[str] = ()) -> None:
    """Refuse an option that no key of a config begins like.

    Args:
        command: fit, validate, predict, or one that passes options on to these.
        words: the options of fit, validate or predict; values are skipped.
        own: the command's own options.

    Raises:
        InputError: names the nearest option.
    """
    for word, _ in _options_in(words):
        first = word.lstrip("-").partition(".")[0].rstrip("+")
        if word in WHOLE_RUN or word in SHORT or (first in SECTIONS and "." in word):
            continue
        shown = re.findall(r"--[\w.]+\w", first_page(command) or first_page("fit") or "")
        raise unknown(word, [*SHORT, *WHOLE_RUN, *own, *shown], command)


def check_files(words: Sequence[str]) -> None:
    """Refuse a file that is not there, before anything slow is imported.

    Raises:
        InputError: names the option.
    """
    for option, value in _options_in(words):
        if option in _FILES and value not in ("", "-", "null") and not _exists(value):
            raise InputError(f"{option} {value!r} does not exist; look for a misspelling.")
        if option in ("--model", SHORT["--model"]) and _is_path(value) and not _exists(value):
            raise InputError(
                f"{option} {value!r} does not exist; give a folder, a .gguf file or a hub id."
            )


def _options_in(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option of a command line that begins with two dashes, and its value, '' without one."""
    for word, after in zip(words, [*words, ""][1:], strict=True):
        option, equals, value = word.partition("=")
        if option.startswith("--") and option != "--":
            yield option, value if equals else "" if after.startswith("-") else after


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # what reads it says why it cannot be a file
        return True


def _is_path(name: str) -> bool:
    return name.endswith(".gguf") or name.startswith(("/", "./", "../", "~"))
