"""Recovered prompts as one page of HTML, or as an element of a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_inversion.files import one_line, visible
from lightning_inversion.report.labels import model_name
from lightning_inversion.report.load import CONDITIONAL, GIVEN, GROUP, READ, UNKNOWN, VERIFIED
from lightning_inversion.report.page import MEANING, characters_whole, environment

_MARKS = {
    "verified": VERIFIED, "conditional": CONDITIONAL, "group": GROUP, "read": READ,
    "unresolved": UNKNOWN,
}  # fmt: skip
_MEANING = {**MEANING, UNKNOWN: "not verified"}
_HASH = 12
"""Digits of a hash that are shown."""

Prompt = dict[str, Any]
"""What ``Recovered.to_dict`` gives."""


class _Token(NamedTuple):
    """A token in the table: its mark, and a cell for each column."""

    mark: str
    cells: list[str]


class _Shown(NamedTuple):
    """A prompt as the page shows it."""

    given: str
    pieces: list[tuple[str, str, str]]
    """Text, mark and title."""
    tokens: list[_Token]
    score: str


def recovery_page(prompts: Sequence[Prompt]) -> str:
    """A page in one file: no script, nothing fetched, everything escaped.

    Args:
        prompts: of one call, so of one model and one storage.
    """
    return environment().get_template("recovery.html").render(_content(prompts))


def recovery_fragment(prompts: Sequence[Prompt]) -> str:
    """An element for a notebook: the prompts, with the legend."""
    return environment().get_template("recovery_fragment.html").render(_content(prompts))


def _content(prompts: Sequence[Prompt]) -> dict[str, Any]:
    shown = [_shown(prompt) for prompt in prompts]
    used = {mark for prompt in shown for _, mark, _ in prompt.pieces}
    used |= {GIVEN for prompt in shown if prompt.given}
    tokens = [token for prompt in prompts for token in prompt["tokens"]]
    verified = sum(token["state"] == "verified" for token in tokens)
    model = prompts[0]["transformer"]
    where = _where(model)
    return {
        "title": f"Recovered from {model_name(model['model'])}, {where}",
        "finding": f"{verified} of {len(tokens)} tokens are verified by running them.",
        "prompts": shown,
        "head": ("position", "token", "id", "state", "residual", "threshold", "nearest other"),
        "legend": [(mark, meaning) for mark, meaning in _MEANING.items() if mark in used],
        "facts": _facts(prompts[0]),
        "version": prompts[0]["version"],
    }


def _where(model: dict[str, Any]) -> str:
    depths = ", ".join(map(str, model["layers"]))
    norm = " after the final norm" if model["final_norm"] else ""
    return f"depth {depths}{norm}"


def _shown(prompt: Prompt) -> _Shown:
    tokens = [_token(token) for token in prompt["tokens"]]
    texts = [token["text"] for token in prompt["tokens"]]
    given = prompt["given_text"]
    if prompt["text"] is None:
        texts = [f"[{token['id']}]" for token in prompt["tokens"]]
        given = "".join(f"[{token}]" for token in prompt["given"])
    pieces = characters_whole((text, token.mark) for text, token in zip(texts, tokens, strict=True))
    begins = [number for number, text in enumerate(texts) if text or not number]
    titles = [_title(tokens[number].cells) for number in begins]
    verified = sum(token.mark == VERIFIED for token in tokens)
    return _Shown(
        visible(given),
        [(*piece, title) for piece, title in zip(pieces, titles, strict=True)],
        tokens,
        f"{verified}/{len(tokens)}",
    )


def _token(token: dict[str, Any]) -> _Token:
    other = ""
    if token["rival"] is not None:
        other = f"{_name(token['rival_text'], token['rival'])} {_number(token['rival_residual'])}"
    elif token["alternatives"]:
        texts = token["alternative_texts"] or [None] * len(token["alternatives"])
        pairs = zip(texts, token["alternatives"], strict=True)
        other = ", ".join(_name(*pair) for pair in pairs if pair[1] != token["id"])
    cells = [
        str(token["position"]), _name(token["text"], token["id"]), str(token["id"]),
        _state(token), _number(token["residual"]), _number(token["threshold"]), other,
    ]  # fmt: skip
    return _Token(_MARKS[token["state"]], cells)


def _state(token: dict[str, Any]) -> str:
    chance = token["probability"]
    return str(token["state"]) if chance is None else f"{token['state']}, {chance:.0%}"


def _title(cells: list[str]) -> str:
    position, name, id, state, residual, threshold, other = cells
    title = f"{name}  #{position} id {id}: {state}, residual {residual} of {threshold}"
    return f"{title}; nearest other: {other}" if other else title


def _name(text: str | None, token: int) -> str:
    return f"[{token}]" if text is None else one_line(text) or "(continues)"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _facts(prompt: Prompt) -> list[tuple[str, str]]:
    """The hypothesis on which the states rest."""
    model, storage = prompt["transformer"], prompt["storage"]
    stored = storage["dtype"]
    if storage["noise"]:
        stored += f", {storage['noise_kind']} noise with std {storage['noise']:g}"
    if storage["largest"] < 1:
        stored += f", the largest {storage['largest']:g} of each position's features"
    if storage["centred"]:
        stored += ", centred"
    if storage["scale"] != 1:
        stored += f", times {storage['scale']:g}"
    facts = [
        ("model", visible(model_name(str(model["model"])))),
        ("hidden states", f"{_where(model)}; {stored}"),
    ]
    if "weights_sha256" in model:
        facts.append(("weights (SHA-256)", f"{model['weights_sha256'][:_HASH]}..."))
    return facts
