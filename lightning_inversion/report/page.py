"""Results as one page of HTML: no script, nothing fetched, everything escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_inversion import __version__
from lightning_inversion.files import visible
from lightning_inversion.report.curves import label_of
from lightning_inversion.report.load import (
    FALSE,
    IN_TOP_K,
    RIGHT,
    TWIN,
    UNKNOWN,
    VERIFIED,
    WRONG,
    Reading,
    Result,
)
from lightning_inversion.report.statistics import Group, Mean, grouped, in_percent, varying
from lightning_inversion.report.tables import Line, cell_text, without_empty

if TYPE_CHECKING:
    from lightning_inversion.report.figures import Figure

MOST_TEXTS = 400
"""Texts on a page; more would only be slow to scroll."""
MEANING = {
    VERIFIED: "verified by running it",
    TWIN: "verified, but another token has the same embedding",
    RIGHT: "right, not verified",
    IN_TOP_K: "wrong, the right one among the best",
    WRONG: "wrong",
    UNKNOWN: "not verified, the prompt is not known",
    FALSE: "verified and wrong: a fault of the method",
}


@dataclass(frozen=True)
class Token:
    """A piece of a text and what is known of it."""

    text: str
    mark: str


@dataclass(frozen=True)
class Text:
    """A recovered text.

    Attributes:
        number: of the prompt, from 1.
        tokens: its pieces.
        prompt: what it should have been; '' where it is that, or nobody knows.
        said: how much is right.
    """

    number: int
    tokens: list[Token]
    prompt: str
    said: str


@dataclass(frozen=True)
class Section:
    """The texts of one setting."""

    title: str
    summary: str
    texts: list[Text]
    left_out: int


def page(
    reading: Reading,
    lines: Sequence[Line],
    figures: Sequence[Figure],
    title: str = "",
    texts: int = 20,
    template: str = "report.html",
    **more: Any,
) -> str:
    """The whole page.

    Args:
        reading: the results.
        lines: of the table.
        figures: drawn of them.
        title: '' for one made of the results.
        texts: recovered texts shown for each setting.
        template: report.html, or one that extends it.
        more: what that one asks for beside.
    """
    environment = Environment(
        loader=PackageLoader("lightning_inversion.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = grouped(reading.results)
    lines = without_empty(lines)
    used = {mark for result in reading.results for mark in result.marks}
    return environment.get_template(template).render(
        title=title or _title(groups),
        findings=findings(reading.results),
        head=list(lines[0]),
        lines=[[_cell(line[key]) for key in line] for line in lines],
        figures=figures,
        sections=_sections(groups, texts),
        legend=[(mark, meaning) for mark, meaning in MEANING.items() if mark in used],
        reading=reading,
        version=__version__,
        groups=groups,
        **more,
    )


def findings(results: Sequence[Result]) -> list[str]:
    """What the results come to, in a few sentences."""
    groups = grouped(results)
    said = [
        f"{len(results)} results of {len({r.prompt or r.index for r in results})} prompts, "
        f"in {len({r.run for r in results})} runs with {len(groups)} settings."
    ]
    measured = [(mean.value, group) for group in groups if (mean := group.mean("token_accuracy"))]
    if measured:
        apart = varying(groups)
        (low, worst), (high, best) = (f(measured, key=lambda m: m[0]) for f in (min, max))
        least, most = in_percent(low), in_percent(high)
        if least != most:
            span = (
                f"Between {least} ({label_of(worst.settings, apart)}) and {most} "
                f"({label_of(best.settings, apart)}) of the tokens are read"
            )
        else:
            span = f"{most} of the tokens are read{_in_all(len(measured), len(groups))}"
        exact = [result.exact for result in results if result.exact is not None]
        said.append(f"{span}; {sum(exact)} of {len(exact)} texts are exact.")
    marks = "".join(result.marks for result in results)
    verified = sum(marks.count(mark) for mark in (VERIFIED, TWIN, FALSE))
    if verified:
        false = marks.count(FALSE)
        said.append(
            f"{verified} of {len(marks)} tokens are verified by running them; "
            f"{false or 'none'} of these {'is' if false < 2 else 'are'} wrong."
        )
    return said


def _in_all(measured: int, settings: int) -> str:
    """Where the same is read, if there is more than one setting to say it of."""
    if settings == 1:
        return ""
    if measured == settings:
        return f" in all {settings} settings"
    return f" in the {measured} of {settings} settings whose prompts are known"


def _title(groups: Sequence[Group]) -> str:
    models = list(dict.fromkeys(str(group.settings.get("model")) for group in groups))
    name = PurePath(models[0]).name if PurePath(models[0]).is_absolute() else models[0]
    named = name if len(models) == 1 else f"{len(models)} models"
    return f"What is read from {named}"


def _cell(value: Any) -> dict[str, Any]:
    """A cell of the table: what it says, and how far its bar goes."""
    return {"text": cell_text(value), "bar": value.value if isinstance(value, Mean) else None}


def _sections(groups: Sequence[Group], texts: int) -> list[Section]:
    apart = varying(groups)
    most = min(texts, max(1, MOST_TEXTS // len(groups))) if texts else 0
    sections = []
    for group in groups:
        # Each prompt once, by its first seed; the others are in the table.
        first: dict[tuple[int, str | None], Result] = {}
        for result in sorted(group.results, key=lambda r: (r.index, r.seed or 0)):
            first.setdefault((result.index, result.prompt), result)
        ordered = list(first.values())
        mean = group.mean("token_accuracy")
        sections.append(
            Section(
                label_of(group.settings, apart) or "The texts",
                "" if mean is None else f"{in_percent(mean.value)} of the tokens right",
                [_text(result) for result in ordered[:most]],
                max(0, len(ordered) - most),
            )
        )
    return sections if most else []


def _text(result: Result) -> Text:
    right = sum(mark in (VERIFIED, TWIN, RIGHT) for mark in result.marks)
    said = f"{right}/{len(result.marks)}" if result.marks else cell_text(result.token_accuracy)
    prompt = "" if result.exact or result.prompt is None else visible(result.prompt)
    return Text(result.index + 1, _tokens(result), prompt, said)


def _tokens(result: Result) -> list[Token]:
    """The coloured pieces; the whole text as one where its tokens are not told apart."""
    if len(result.tokens) != len(result.marks) or not result.marks:
        mark = VERIFIED if result.verified else RIGHT if result.exact else UNKNOWN
        return [Token(visible(result.recovered), mark)]
    pieces: list[Token] = []
    for text, mark in zip(result.tokens, result.marks, strict=True):
        if not text and pieces:  # the rest of a character, whose least certain token counts
            last = pieces.pop()
            pieces.append(Token(last.text, max(last.mark, mark, key="ctrukwx".index)))
        else:
            pieces.append(Token(visible(text), mark))
    return pieces
