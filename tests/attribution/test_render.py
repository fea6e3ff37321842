"""The page, the terminal and TensorBoard: escaped, self-contained, readable, whole characters."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_inversion.attribution.attribute import attribute
from lightning_inversion.attribution.config import Choices, Display
from lightning_inversion.attribution.render import (
    image_strip,
    markdown_table,
    notes_of,
    score_lines,
)
from lightning_inversion.attribution.result import AttributionResult
from lightning_inversion.attribution.shading import (
    DARK_PAGE,
    LIGHT_PAGE,
    Shade,
    contrast,
    strengths,
)

HARD = '<script>alert(1)</script> & "q"\n\tשלום مرحبا 👩‍👧 \u202eend\x00'


@pytest.fixture(scope="module")
def hard(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> AttributionResult:
    return attribute(llama, tokenizer, HARD, name="<b>model</b>")


class Reader(HTMLParser):
    """Collects the elements, and the text of the tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_is_well_formed_and_fetches_and_runs_nothing(hard: AttributionResult) -> None:
    reader = Reader()
    reader.feed(hard.to_html())
    assert reader.open == []
    names = {name for name, _ in reader.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "b>model<"}
    for _, attributes in reader.elements:
        assert not {"src", "href", "onclick"} & set(attributes)
    assert "url(" not in hard.to_html()
    assert "@import" not in hard.to_html()


def test_tokens_cannot_become_markup(hard: AttributionResult) -> None:
    html = hard.to_html()
    assert "<script" not in html
    assert "alert" not in {name for name, _ in _elements(html)}
    assert "<b>model" not in html
    assert "\u202e" not in html
    assert "\x00" not in html


def _elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    reader = Reader()
    reader.feed(html)
    return reader.elements


def test_each_tile_has_the_raw_scores_of_its_tokens(hard: AttributionResult) -> None:
    titles = [
        a["title"] or ""
        for _, a in _elements(hard.to_html())
        if a.get("class") == "t" and "title" in a
    ]
    assert len(titles) == len([text for text in hard.tokens if text])
    lines = "\n".join(titles).splitlines()
    for token, (line, score) in enumerate(zip(lines, hard.token_scores.tolist(), strict=True)):
        assert f"#{token} id {hard.ids[token]}: {score:.4g}" in line


def test_an_emoji_of_several_tokens_is_one_tile_with_a_band_each(hard: AttributionResult) -> None:
    first = hard.tokens.index("👧")
    assert hard.tokens[first + 1 : first + 4] == ("", "", "")
    titles = [a.get("title") or "" for _, a in _elements(hard.to_html())]
    (title,) = [title for title in titles if "👧" in title]
    assert "(4 of 4 tokens)" in title
    assert title.count("\n") == 3


def test_the_page_holds_all_that_is_needed_to_repeat_it(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    html = attribute(
        llama,
        tokenizer,
        "a b",
        Choices(method="occlusion", scalar="prob"),
        name="pypi:some==1",
    ).to_html()
    for said in ("drop of prob", "replacement", "pypi:some==1", "float32", torch.__version__):
        assert said in html
    assert "lightning-inversion attribute --model=pypi:some==1 --method=occlusion" in html
    assert re.search(r"Predicted next token: .*\d\.\d%", html)


def test_a_map_is_a_table_of_its_lower_half(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    result = attribute(llama, tokenizer, "a bus", Choices(every_token=True))
    T = len(result.ids)
    cells = [a for name, a in _elements(result.to_html()) if name == "td" and "title" in a]
    assert len(cells) == T * (T + 1) // 2


def test_a_page_of_2000_tokens(hard: AttributionResult) -> None:
    count = 2000
    texts = tuple(f" w{token}" for token in range(count))
    scores = torch.linspace(0, 1, count)[None]
    long = replace(hard, ids=(1,) * count, tokens=texts, scores=scores, parts={"gradient": scores})
    html = long.to_html()
    assert len([a for _, a in _elements(html) if a.get("class") == "t" and "title" in a]) == count
    assert len(html) < 1_000_000
    queries, every = hard.queries * count, Choices(every_token=True)
    a_map = replace(long, choices=every, queries=queries, scores=scores.expand(count, -1))
    assert "is in the JSON" in a_map.to_html()


@pytest.mark.parametrize("palette", ["heat", "original"])
@pytest.mark.parametrize("page", [LIGHT_PAGE, DARK_PAGE])
def test_text_contrasts_on_every_shade(palette: str, page: tuple[int, int, int]) -> None:
    for step in range(-100, 101):
        shade = Shade.of(step / 100, palette, page)
        assert contrast(shade.background, shade.ink) >= 4.5


def test_red_is_high_and_the_original_palette_is_that_of_the_source() -> None:
    assert Shade.of(1.0, "original", LIGHT_PAGE).background == (255, 110, 110)
    assert Shade.of(0.0, "original", LIGHT_PAGE).background == (0, 110, 110)
    red, green, blue = Shade.of(1.0, "heat", DARK_PAGE).background
    assert red > 3 * max(green, blue)
    red, _, blue = Shade.of(-1.0, "heat", LIGHT_PAGE).background
    assert blue > red


def test_scales_and_leaving_out_the_last() -> None:
    scores = torch.tensor([1.0, -4.0, 16.0])
    assert strengths(scores, Display()).tolist() == [1 / 16, -0.25, 1.0]
    assert strengths(scores, Display(scale="sqrt")).tolist() == [0.25, -0.5, 1.0]
    assert strengths(scores, Display(scale="rank")).tolist() == pytest.approx([1 / 3, -2 / 3, 1.0])
    assert strengths(scores, Display(normalise="minmax")).tolist() == [0.25, 0.0, 1.0]
    left = strengths(scores, Display(leave_out_last=True))
    assert left[:2].tolist() == [0.25, -1.0]
    assert left[2].isnan()
    left = strengths(scores, Display(leave_out_first=True))
    assert left[0].isnan()
    assert left[1:].tolist() == [-0.25, 1.0]
    assert strengths(torch.zeros(2), Display()).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("first", "noted", "left_out"), [(3.1, True, False), (2.9, False, False), (3.1, False, True)]
)
def test_a_first_token_with_most_of_the_attribution_is_noted(
    first: float, noted: bool, left_out: bool, hard: AttributionResult
) -> None:
    scores = torch.zeros(1, len(hard.ids))
    scores[0, :4] = torch.tensor([first, -1.0, 1.0, 1.0])
    sink = replace(hard, scores=scores, display=Display(leave_out_first=left_out))
    assert ("attention sink" in sink.to_html()) is noted
    assert any("attention sink" in note for note in notes_of(sink, sink.display)) is noted


def test_scores_for_a_program_have_a_line_a_token(hard: AttributionResult) -> None:
    lines = [line.split("\t") for line in score_lines(hard)]
    assert [int(position) for position, _, _ in lines] == [*range(len(hard.ids))]
    assert [float(score) for _, score, _ in lines] == pytest.approx(
        hard.token_scores.tolist(), rel=1e-5
    )


def test_a_notebook_gets_an_element_that_leaves_the_rest_alone(hard: AttributionResult) -> None:
    html = hard._repr_html_()
    style = html[html.index("<style>") : html.index("</style>")]
    assert "body" not in style
    assert "<html" not in html
    assert "<script" not in html


def test_the_terminal_shows_every_piece_and_no_markup(hard: AttributionResult) -> None:
    console = Console(record=True, width=200, force_terminal=True, color_system="truecolor")
    with console.capture() as captured:
        console.print(hard)
    text = captured.get()
    assert "48;2;" in text
    assert "\u202e" not in text
    assert "\x00" not in text
    assert "predicted next token" in re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_tensorboard_gets_a_table_and_a_strip(hard: AttributionResult) -> None:
    table = markdown_table(hard, hard.display)
    assert table.count("\n") == 3 + len(hard.ids)
    assert "<" not in table.replace("&lt;", "")
    image = image_strip(hard, hard.display)
    assert image.shape == (3, 24, 24 * len(hard.ids))
    assert image.dtype == torch.uint8
    scores = torch.tensor([[1.0, torch.nan], [0.0, -1.0]])
    of_map = image_strip(replace(hard, queries=hard.queries * 2, scores=scores), Display())
    assert of_map.shape == (3, 48, 48)
    assert of_map[:, 0, 0].tolist() == list(Shade.of(1, "heat", LIGHT_PAGE).background)
