"""The names that tools give to hidden states, and the depth that each means.

The index of a hook counts blocks, or what blocks put out; the depth counts the blocks that the
states have passed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FINAL = -1
"""Stands for the depth of all blocks, after the final norm."""
_ENTRY = r"[\[._/-]?(\d+)\]?"
_NUMBER = r"(?:(?:blocks?|layers?|l)[._/-]?)?(\d+)[._/-]"
_OUTPUT = r"(?:[./](?:nns_)?output(?:[\[._]0\]?)?)?"
_INPUT = r"[./](?:nns_)?input(?:[\[._]0\]?)*"
_PATH = r"(?:(?:base_model|language_model|model|transformer|decoder|gpt_neox|backbone)[./])*"
_BLOCK = _PATH + r"(?:h|layers|blocks|block)[./\[](\d+)\]?"
_PATTERNS: tuple[tuple[str, int, str], ...] = (
    (_NUMBER + r"(?:hook_)?resid_pre", 0, "from hook names"),
    (_NUMBER + r"(?:hook_)?resid_post", 1, "from hook names"),
    (r"(?:hook_)?resid_pre" + _ENTRY, 0, "from hook names"),
    (r"(?:hook_)?resid_post" + _ENTRY, 1, "from hook names"),
    (r"layer[._](\d+)[._](?:repr|comp)[._]block_input\S*", 0, "from names of pyvene"),
    (r"layer[._](\d+)[._](?:repr|comp)[._]block_output\S*", 1, "from names of pyvene"),
    (_BLOCK + _INPUT, 0, "from module names"),
    (_BLOCK + _OUTPUT, 1, "from module names"),
    (r"layers?_outputs?" + _ENTRY, 1, "from module names"),
    (r"layers?_inputs?" + _ENTRY, 0, "from module names"),
    (r"l_out-(\d+)", 1, "from llama.cpp's names"),
    (r"hidden_states?" + _ENTRY, 0, "from names of hidden_states"),
    (r"depth" + _ENTRY, 0, "from names"),
)
"""A name, how many blocks more than its number the states have passed, and how that is called."""
_PROMPT = (
    r"prompts?|texts?|sentences?|samples?|examples?|requests?|seq(?:uence)?s?|items?|docs?|rows?|"
    r"batch|ids?|p"
)
_SUFFIX = re.compile(
    r"(?:[./_-]+(?:hidden(?:_states?)?|states?|act(?:ivation)?s?|features?|tensor|data))?"
    rf"(?:[./_\[-]+(?:(?:{_PROMPT})[._-]?)?\d+\]?)?$"
)
"""What may come after a depth in a name: a word for states, the number of a prompt."""
_NUMBERED = re.compile(r"^(.*?)(\d+)$")
_OF_PROMPTS = re.compile(rf"(?:^|[./_-])(?:{_PROMPT})[ ./_-]*$", re.IGNORECASE)
_FINAL_NAMES = (
    r"ln_final\.hook_normalized", r"last_hidden_state", r"result_norm",
    _PATH + r"(?:norm|ln_f|final_layer_?norm|final_norm)" + _OUTPUT,
)  # fmt: skip
_COUNTED = re.compile(r"(?:^|[./_-])(?:layers?|blocks?|resid(?:ual)?|L)" + _ENTRY + r"$")
_OTHER_HOOK = re.compile(
    r"\bhook_\w+|\b(?:resid_mid|mlp_out|attn_out)\b|\.(?:attn|mlp|self_attn|self_attention)\b"
    rf"|(?:^|[./_-]){_BLOCK}[./][a-z]"
)
_ANY_LAYER = re.compile(r"(?:^|[./_ -])(?:layers?|blocks?)[./_\[-]?(\d+)")
_PATH_OF_NUMBERS = re.compile(r"\d+(?:\.\d+)+")


@dataclass(frozen=True)
class NamedDepth:
    """What a name tells.

    Attributes:
        depth: or ``FINAL``.
        prompt: the rest of the name, which tells prompts apart.
        source: what kind of name it is, in words.
    """

    depth: int
    prompt: str
    source: str


def depth_of_name(name: str) -> NamedDepth | None:
    """The depth that a tensor's name tells at its end, but for a prompt's number; else None."""
    for stem, suffix in stems_of(name):
        for pattern, more, source in _PATTERNS:
            found = re.search(rf"(?:^|[./_-])(?:{pattern})$", stem)
            # In blocks.3.resid_post[1] the number of the block comes before.
            if found and not _COUNTED.search(rest := _rest(stem, found)):
                return NamedDepth(int(found[1]) + more, rest + suffix, source)
    for pattern in _FINAL_NAMES:
        if found := re.search(rf"(?:^|[./_-])(?:{pattern})$", name):
            return NamedDepth(FINAL, _rest(name, found), "from names")
    return None


def depths_of_counted(
    names: Sequence[str], depths: Sequence[int] | None, blocks: Callable[[], int]
) -> dict[str, NamedDepth] | str | None:
    """The depths of tensors called layer_0, layer_1 and so on, which count in one way or another.

    Where all of a model's are there, their number decides.

    Args:
        names: in the order of their numbers.
        depths: of each, where they are told.
        blocks: the model's number of blocks.

    Returns:
        None where the names are others, or all of one number; why they cannot be read.
    """
    if all(re.fullmatch(r"-\d+", name) for name in names):
        ends = {name: blocks() + 1 + int(name) for name in names}
        return {name: NamedDepth(FINAL if end == blocks() else end, "", "from negative numbers")
                for name, end in ends.items()}  # fmt: skip
    found = {name: counted for name in names if (counted := _counted(name)) is not None}
    if len(found) < len(names) or len({number for number, _ in found.values()}) < 2:
        return None
    groups: dict[str, list[str]] = {}
    for name, (_, prompt) in found.items():
        groups.setdefault(prompt, []).append(name)
    named = {}
    for prompt, own in groups.items():
        numbers = [found[name][0] for name in own]
        if depths is not None and len(depths) == len(own):
            meant = list(depths)
        elif numbers == list(range(blocks() + 1)):
            meant = [*numbers[:-1], FINAL]
        elif numbers == list(range(1, blocks() + 1)):
            meant = numbers
        elif numbers == list(range(blocks())):
            meant = [number + 1 for number in numbers]
        else:
            return (
                f"holds {', '.join(own[:3])}, whose numbers may count blocks or what they put out; "
                "name the depth of each with --data.layout.depths, in their order."
            )
        for name, depth in zip(own, meant, strict=True):
            named[name] = NamedDepth(depth, prompt, "from numbered layers")
    return named


def counted_number(name: str) -> int | None:
    """The number in a name such as layer_8, which counts blocks or what they put out."""
    found = _counted(name)
    return None if found is None else found[0]


def tells_depth(name: Any) -> bool:
    """Whether a name tells the depth, or the number of a layer or block."""
    return depth_of_name(str(name)) is not None or counted_number(str(name)) is not None


def numbers_alone(names: Sequence[str]) -> list[int] | None:
    """The numbers of two names or more that differ in nothing else; None for those of prompts."""
    parts = [match.groups() for name in names if (match := _NUMBERED.search(name))]
    words = {word for word, _ in parts}
    if len(parts) < max(2, len(names)) or len(words) > 1 or _OF_PROMPTS.search(words.pop()):
        return None
    return [int(number) for _, number in parts]


def is_other_hook(name: str) -> bool:
    """Whether a name is that of a part of a block, whose output is no hidden state."""
    return _OTHER_HOOK.search(name) is not None


def are_of_several_layers(names: Sequence[str]) -> bool:
    """Whether names tell layers apart in a way that is not read."""
    numbers = {found[1] for name in names if (found := _ANY_LAYER.search(name))}
    paths = len(names) > 1 and all(map(_PATH_OF_NUMBERS.fullmatch, names))
    return len(numbers) > 1 or paths


def stems_of(name: str) -> list[tuple[str, str]]:
    """The name, and the name without what may come after a depth or block, with that."""
    found = _SUFFIX.search(name)
    start = len(name) if found is None else found.start()
    return [(name, ""), *([(name[:start], name[start:])] if start < len(name) else [])]


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names by the numbers in them."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def _counted(name: str) -> tuple[int, str] | None:
    """The number of a layer or block, and the rest of the name."""
    for stem, suffix in stems_of(name):
        if found := _COUNTED.search(stem):
            return int(found[1]), _rest(stem, found) + suffix
    return None


def _rest(name: str, found: re.Match[str]) -> str:
    return name[: found.start()].strip("./_-[]")
