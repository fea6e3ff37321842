"""The page: it fetches nothing, escapes everything, and sums up what its rows hold."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd

from lightning_inversion.report.canvas import RenderedFigure
from lightning_inversion.report.load import load_results
from lightning_inversion.report.page import findings, fitting, render_page
from lightning_inversion.report.recovery_page import recovery_page
from lightning_inversion.report.tables import summarize
from tests.report.rows import WORDS, predicted, row, write_run


def page_of(folder: Path, *figures: RenderedFigure, title: str = "", max_prompts: int = 20) -> str:
    loaded = load_results([folder])
    return render_page(loaded, summarize(loaded), figures, title, max_prompts)


def findings_of(folder: Path) -> list[str]:
    loaded = load_results([folder])
    return findings(loaded, summarize(loaded))


class _Page(HTMLParser):
    """Every tag and address of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_fetches_nothing_and_escapes_everything(tmp_path: Path) -> None:
    bad = '<script>alert("x")</script>\n\u202e|& \ud800'
    more = {"prompt": bad, "recovered": bad, "model": bad, "objective": bad, "exact": False}
    rows = [row(0, recovered_tokens=[bad] * 6, **more), row(1, depth=2), row(2, error=bad)]
    write_run(tmp_path / "<b>\u202e", rows)
    text = page_of(tmp_path, title=bad)
    parsed = _Page(text)
    assert "script" not in parsed.tags
    assert "b" not in parsed.tags
    assert '<script>alert("x")</script>↵' in parsed.text
    assert "\u202e" not in text
    text.encode()  # half a surrogate pair is marked, too
    assert parsed.addresses == []
    assert "default-src 'none'" in text


def test_a_figure_is_part_of_the_page_and_scrolls_at_its_own_size(runs: Path) -> None:
    text = page_of(runs, RenderedFigure("depth", "By depth", b"", b"<svg/>"))
    assert len(re.findall(r'<div class="scroll"[^>]*><picture><img src="data:', text)) == 1
    assert "figure img { display: block; max-width: none;" in text


def test_the_page_marks_tokens_and_limits_prompts(tmp_path: Path) -> None:
    rows = [row(i, right=0.5) for i in range(30)]
    write_run(tmp_path, rows)
    text = page_of(tmp_path, title="Mine", max_prompts=10)
    assert "<title>Mine</title>" in text
    verified = sum(made["verified_tokens"] for made in rows[:10])
    assert text.count('class="tok v"') == verified + 1  # and one in the legend
    assert text.count('class="tok w"') == 60 - verified + 1
    assert "20 more in the files" in text
    assert 'class="tok' not in page_of(tmp_path, max_prompts=0)


def test_a_prompt_is_shown_once_by_its_first_seed(tmp_path: Path) -> None:
    for seed in (1, 0):
        write_run(tmp_path / str(seed), [row(0, seed=seed, prompt="p", right=1 - seed)])
    text = page_of(tmp_path)
    assert text.count("<li value=") == 1
    assert '<span class="score">6/6</span>' in text


def test_the_pieces_of_a_character_have_the_least_certain_mark(tmp_path: Path) -> None:
    pieces = {"recovered_tokens": ["é", "", " a"], "recovered_ids": [1, 2, 3], "ids": [1, 9, 3]}
    verified = {"token_verified": [True, False, True], "top_k_ids": [], "known_tokens": 0}
    write_run(tmp_path, [row(0, **pieces, **verified)])
    text = page_of(tmp_path)
    assert '<span class="tok w">é</span><span class="tok v"> a</span>' in text


def test_the_summary_counts_verified_tokens_and_reports_a_wrong_one(tmp_path: Path) -> None:
    write_run(tmp_path / "good", [row(0), row(1)])
    (_, _, verified) = findings_of(tmp_path)
    assert verified == "12 of 12 tokens are verified by running them; none of these is wrong."
    wrong = row(2)
    wrong["recovered_ids"] = [(token + 1) % len(WORDS) for token in wrong["ids"]]
    write_run(tmp_path / "bad", [wrong])
    assert "6 of these are wrong" in findings_of(tmp_path)[2]


def test_a_prompt_whose_text_the_tokenizer_loses_is_shown_beside_its_exact_tokens(
    tmp_path: Path,
) -> None:
    rows = [row(0, prompt="The SKY", same_text=False), row(1, prompt="the sea", same_text=True)]
    write_run(tmp_path / "run", rows)
    assert "In 1 exact result the text is not the prompt's" in " ".join(findings_of(tmp_path))
    text = page_of(tmp_path)
    assert '<p class="prompt" dir="auto">The SKY</p>' in text
    assert "the sea" not in text


def test_the_summary_has_the_range_of_the_settings(tmp_path: Path) -> None:
    for depth in (1, 2, 3):
        write_run(tmp_path / str(depth), [row(i, depth=depth) for i in range(2)])
    recovered = findings_of(tmp_path)[1]
    expected = "100% of the tokens are recovered in all 3 settings; 6 of 6 prompts are exact."
    assert recovered == expected
    unknown = dict.fromkeys(("prompt", "ids", "token_accuracy", "exact"))
    write_run(tmp_path / "unknown", [predicted(0, depth=4, **unknown)])
    recovered = findings_of(tmp_path)[1]
    assert "in the 3 of 4 settings whose prompts are known; 6 of 6 prompts" in recovered
    write_run(tmp_path / "bad", [row(0, depth=5, right=0.0)])
    recovered = findings_of(tmp_path)[1]
    assert recovered.startswith("Between 0% (fit, depth 5) and 100% (fit, depth 1) of the tokens")
    assert recovered.endswith("6 of 7 prompts are exact.")


def test_results_of_unknown_prompts_are_counted_apart(tmp_path: Path) -> None:
    unknown = dict.fromkeys(("prompt", "ids", "token_accuracy", "exact"))
    states = ["verified", "conditional", "group", "unresolved", "verified", "verified"]
    verified = [state == "verified" for state in states]
    made = predicted(0, **unknown, token_states=states, token_verified=verified)
    write_run(tmp_path, [made, predicted(1)])
    assert "The prompt is not known in 1 of 2 results" in findings_of(tmp_path)[2]
    loaded = load_results([tmp_path])
    assert [*summarize(loaded)["truth unknown"]] == [1]
    assert loaded.results["marks"][0] == "vcouvv"
    assert 'class="tok c"' in page_of(tmp_path)


def test_the_table_of_a_page_has_the_columns_that_fit() -> None:
    text = pd.DataFrame({name: ["x" * 30] for name in ("depth", "seeds", "a", "b", "c", "d", "e")})
    assert fitting(text) == ["depth", "a", "b", "c"]


def test_a_recovery_shows_each_state() -> None:
    states = ("verified", "conditional", "group", "read", "unresolved")
    tokens = [
        {
            "position": position, "id": position, "text": f" {state}", "state": state,
            "residual": None, "threshold": 0.5, "rival": None, "rival_text": None,
            "rival_residual": None, "alternatives": [9], "alternative_texts": [" other"],
            "probability": 0.75 if state == "read" else None,
        }
        for position, state in enumerate(states)
    ]  # fmt: skip
    prompt = {
        "text": "".join(f" {state}" for state in states), "given": [], "given_text": "",
        "tokens": tokens, "version": "1",
        "transformer": {"model": "a/<b>", "layers": [8], "final_norm": True},
        "storage": {
            "dtype": "float16", "noise": 0.5, "noise_kind": "laplace", "largest": 0.25,
            "centred": True, "scale": 2.0,
        },
    }  # fmt: skip
    page = recovery_page([prompt])
    assert "1 of 5 tokens are verified" in page
    for mark in "vcoeu":
        assert page.count(f'class="tok {mark}"') == 3  # legend, text, table
    assert "read, 75%" in page
    assert (
        "depth 8 after the final norm; float16, laplace noise with std 0.5, the largest 0.25 of "
        "each position&#39;s features, centred, times 2"
    ) in page
    assert "<b>" not in page
