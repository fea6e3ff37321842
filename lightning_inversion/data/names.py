"""The names that tools give to hidden states, and the depth that each means.

The index of a hook counts blocks, or what blocks put out; the depth counts the blocks that the
states have passed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
_FINAL_NAMES = (
    r"ln_final\.hook_normalized", r"last_hidden_state", r"result_norm",
    _PATH + r"(?:norm|ln_f|final_layer_?norm|final_norm)" + _OUTPUT,
)  # fmt: skip
_COUNTED = re.compile(r"(?:^|[./_-])(?:layers?|blocks?|resid(?:ual)?|L)" + _ENTRY + r"$")
_OTHER_HOOK = re.compile(
    r"\bhook_\w+|\b(?:resid_mid|mlp_out|attn_out)\b|\.(?:attn|mlp|self_attn|self_attention)\b"
)


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
    """The depth that the end of a tensor's name tells; None where it tells none."""
    for pattern, more, source in _PATTERNS:
        if found := re.search(rf"(?:^|[./_-])(?:{pattern})$", name):
            return NamedDepth(int(found[1]) + more, _rest(name, found), source)
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
        None where the names are others, or there is one alone; why they cannot be read.
    """
    found = {name: match for name in names if (match := _COUNTED.search(name))}
    if len(found) < max(2, len(names)):
        return None
    groups: dict[str, list[str]] = {}
    for name, match in found.items():
        groups.setdefault(_rest(name, match), []).append(name)
    named = {}
    for prompt, own in groups.items():
        numbers = [int(found[name][1]) for name in own]
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
    found = _COUNTED.search(name)
    return None if found is None else int(found[1])


def is_other_hook(name: str) -> bool:
    """Whether a name is that of a part of a block, whose output is no hidden state."""
    return _OTHER_HOOK.search(name) is not None


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names by the numbers in them."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def _rest(name: str, found: re.Match[str]) -> str:
    return name[: found.start()].strip("./_-[]")
