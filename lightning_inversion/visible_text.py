"""Any text as something to look at: nothing in it is invisible, nothing rearranges the rest."""

import unicodedata


def visible(text: str) -> str:
    """`text` with a mark for each character that has no shape or would rearrange the rest.

    A line break is marked and kept; joiners and variation selectors, which belong to an emoji or a
    script, stay.
    """
    return "".join(_visible(character) for character in text)


def one_line(text: str) -> str:
    """As `visible`, in one line, spaces marked too: for tables and lists of tokens."""
    return visible(text).replace("\n", "").replace(" ", "·")


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥\t"
    if character in "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}":
        return character
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not (
        0xE0020 <= ord(character) <= 0xE007F  # the tags of flags
    ):
        return f"⟨U+{ord(character):04X}⟩"
    return character
