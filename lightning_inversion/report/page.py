"""Results as one page of HTML: no script, nothing fetched, everything escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_inversion import __version__
from lightning_inversion.files import visible
from lightning_inversion.report.labels import LONGEST, labels_of, model_names, shortened
from lightning_inversion.report.load import (
    CONDITIONAL,
    DUPLICATE,
    FALSE,
    GIVEN,
    GROUP,
    IN_TOP_K,
    READ,
    RIGHT,
    UNKNOWN,
    VERIFIED,
    WRONG,
    Loaded,
)
from lightning_inversion.report.tables import MEASURES, as_text, in_percent

if TYPE_CHECKING:
    from lightning_inversion.report.canvas import RenderedFigure

_PAGE, _LETTER, _AROUND, _AROUND_MEAN = 1088.0, 7.6, 13, 25
"""Widths in pixels: of the page, a letter of its table, and what is around a cell."""
_IN_DETAIL = (
    *("in top k", "seeds", "iterations (median)", "candidates (median)"),
    *("seconds (median)", "seconds (batch, median)"),
)
"""Columns that give way to the settings where the page has no room."""
MAX_PROMPTS = 400
"""Prompts on a page; more would be slow to scroll."""
MEANING = {
    GIVEN: "given beforehand",
    VERIFIED: "verified: running it reproduces the target",
    DUPLICATE: "verified, but another token has the same embedding",
    RIGHT: "right, not verified",
    CONDITIONAL: "reproduces the target, after a token that is not verified",
    GROUP: "reproduces the target, as other tokens do",
    READ: "read off its row, not run",
    UNKNOWN: "not verified, the prompt is not known",
    IN_TOP_K: "wrong, the right one among the best",
    WRONG: "wrong",
    FALSE: "verified and wrong: a fault of the method",
}
"""What the mark of a token means, the least certain last."""


class ShownPrompt(NamedTuple):
    """A recovered prompt: its number from 1, pieces with a mark each, score and the true prompt."""

    number: int
    tokens: list[tuple[str, str]]
    score: str
    prompt: str
    """'' where its text was recovered exactly, or is not known."""


class Section(NamedTuple):
    """The prompts of one experiment."""

    title: str
    summary: str
    prompts: list[ShownPrompt]
    left_out: int


def render_page(
    loaded: Loaded,
    table: pd.DataFrame,
    figures: Sequence[RenderedFigure],
    title: str = "",
    max_prompts: int = 20,
    template: str = "report.html",
    csv: str = "",
    **more: Any,
) -> str:
    """The whole page.

    Args:
        loaded: the results.
        table: their summary.
        figures: drawn of them.
        title: '' for one that names the model.
        max_prompts: recovered prompts shown for each experiment.
        template: report.html, or one that extends it.
        csv: the file beside the page that has every column; '' for none.
        more: variables of that template.
    """
    text = as_text(table)
    columns = fitting(text)
    bars = table[[*MEASURES]].astype(object).where(table[[*MEASURES]].notna(), None)
    used = set("".join(loaded.results["marks"]))
    return (
        environment()
        .get_template(template)
        .render(
            title=visible(title) or _title(loaded.settings),
            findings=findings(loaded, table),
            lines=[
                [
                    (name, shortened(cell), bars[name][line] if name in bars else None)
                    for name, cell in row.items()
                ]
                for line, row in text[columns].iterrows()
            ],
            head=columns,
            left_out=len([*text]) - len(columns),
            csv=csv,
            figures=figures,
            sections=_sections(loaded, max_prompts),
            legend=[(mark, meaning) for mark, meaning in MEANING.items() if mark in used],
            files=[visible(str(path)) for path in loaded.files],
            unfinished=[(visible(str(path)), state) for path, state in loaded.unfinished],
            skipped=[(visible(str(path)), visible(reason)) for path, reason in loaded.skipped],
            version=__version__,
            **more,
        )
    )


@cache
def environment() -> Environment:
    """The templates of this folder; what they are given is escaped."""
    return Environment(
        loader=PackageLoader("lightning_inversion.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def fitting(text: pd.DataFrame) -> list[str]:
    """The first columns of a table, as far as they fit the page; what is measured goes first."""
    left, kept = _PAGE, []
    for name in sorted(text, key=lambda name: _IN_DETAIL.count(name)):
        cell = min(LONGEST, max(map(len, text[name]), default=0))
        words = max(map(len, name.split()))
        left -= _LETTER * max(cell, words) + (_AROUND_MEAN if name in MEASURES else _AROUND)
        if left < 0:
            break
        kept.append(name)
    return [name for name in text if name in kept]


def findings(loaded: Loaded, table: pd.DataFrame) -> list[str]:
    """A summary in a few sentences."""
    results = loaded.results
    prompts, runs = results["key"].nunique(), results["run"].nunique()
    sentences = [
        f"{_count(len(results), 'result')} of {_count(prompts, 'prompt')}, in "
        f"{_count(runs, 'run')} with {_count(len(table), 'setting')}."
    ]
    right = table["tokens right"].dropna()
    if len(right):
        labels = labels_of(loaded.settings)
        least, most = in_percent(right.min()), in_percent(right.max())
        share = (
            f"Between {least} ({labels[right.idxmin()]}) and {most} ({labels[right.idxmax()]}) of "
            "the tokens are recovered"
            if least != most
            else f"{most} of the tokens are recovered{_where(len(right), len(table))}"
        )
        exact = results["exact"].dropna()
        sentences.append(f"{share}; {exact.sum():.0f} of {len(exact)} prompts are exact.")
    if lost := int(results["lost_text"].sum()):
        sentences.append(
            f"In {_count(lost, 'exact result')} the text is not the prompt's: the tokenizer loses "
            "text."
        )
    unknown = int(results["token_accuracy"].isna().sum())
    if unknown:
        sentences.append(
            f"The prompt is not known in {unknown} of {len(results)} results; these count only in "
            "the tokens verified."
        )
    marks = "".join(results["marks"])
    verified = sum(marks.count(mark) for mark in (VERIFIED, DUPLICATE, FALSE))
    if verified:
        false = marks.count(FALSE)
        sentences.append(
            f"{verified} of {len(marks) - marks.count(GIVEN)} tokens are verified by running them; "
            f"{false or 'none'} of these {'is' if false < 2 else 'are'} wrong."
        )
    return sentences


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _where(measured: int, settings: int) -> str:
    """Where the same share is recovered, if there is more than one setting."""
    if settings == 1:
        return ""
    if measured == settings:
        return f" in all {settings} settings"
    return f" in the {measured} of {settings} settings whose prompts are known"


def _title(settings: pd.DataFrame) -> str:
    names = [*model_names(settings["model"].astype(str)).values()]
    return f"What is recovered from {names[0] if len(names) == 1 else f'{len(names)} models'}"


def _sections(loaded: Loaded, max_prompts: int) -> list[Section]:
    labels = labels_of(loaded.settings)
    most = min(max_prompts, max(1, MAX_PROMPTS // len(labels)))
    if not most:
        return []
    # Each prompt once, by its first seed; the others are in the table.
    ordered = loaded.results.sort_values(["index", "seed"], kind="stable")
    first = ordered.drop_duplicates(["experiment", "index", "key"])
    sections = []
    for experiment, label in labels.items():
        own = first[first["experiment"] == experiment]
        right = loaded.results.loc[loaded.results["experiment"] == experiment, "token_accuracy"]
        sections.append(
            Section(
                label or "The prompts",
                f"{in_percent(right.mean())} of the tokens right" if right.notna().any() else "",
                [_shown(row) for row in own.head(most).itertuples()],
                max(0, len(own) - most),
            )
        )
    return sections


def _shown(row: Any) -> ShownPrompt:
    right = sum(row.marks.count(mark) for mark in (VERIFIED, DUPLICATE, RIGHT))
    score = f"{right}/{len(row.marks) - row.marks.count(GIVEN)}" if row.marks else ""
    differs = row.prompt is not None and (row.exact != 1 or row.lost_text)
    return ShownPrompt(row.index + 1, _pieces(row), score, visible(row.prompt) if differs else "")


def _pieces(row: Any) -> list[tuple[str, str]]:
    """Pieces of text with a mark each; the whole text as one where the row has no tokens."""
    if len(row.tokens) != len(row.marks) or not row.marks:
        mark = VERIFIED if row.verified else RIGHT if row.exact == 1 else UNKNOWN
        return [(visible(row.recovered), mark)]
    return characters_whole(zip(row.tokens, row.marks, strict=True))


def characters_whole(tokens: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Texts and marks of tokens; a character of several has the mark of the least certain."""
    pieces: list[tuple[str, str]] = []
    for text, mark in tokens:
        if not text and pieces:
            before, last = pieces.pop()
            pieces.append((before, max(last, mark, key=[*MEANING].index)))
        else:
            pieces.append((visible(text), mark))
    return pieces
