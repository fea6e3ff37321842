"""A file of texts: one a line, or JSON lines with a key "prompt"."""

import json
from pathlib import Path

from lightning_inversion.errors import InputError


def read_prompts(path: Path, option: str) -> list[str]:
    """The prompts of a text file (one a line) or a .jsonl file (key "prompt").

    Args:
        path: of the file; blank lines at its end do not count, others are empty prompts.
        option: of the command line that named it, for messages.

    Raises:
        InputError: names the option and the file, and the line where one is at fault.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{option} {str(path)!r} cannot be read: {reason}.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(f"{option} {str(path)!r} holds no text.")
    prompts = []
    for number, line in enumerate(lines, start=1):
        where = f"{option} {str(path)!r}, line {number}"
        prompts.append(_prompt_of(line, where) if path.suffix == ".jsonl" else line)
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f'{where} is not a JSON object with a key "prompt".') from error
    if not isinstance(prompt, str):
        raise InputError(f'{where}: "prompt" is {prompt!r}, not a string; quote it.')
    return prompt
