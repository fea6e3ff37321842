"""A result in TensorBoard, which strips coloured text: a markdown table and an image."""

from __future__ import annotations

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_inversion.attribution.result import AttributionResult
from lightning_inversion.attribution.shading import strengths, strip
from lightning_inversion.files import one_line

_BAR = 10


def markdown_table(result: AttributionResult) -> str:
    """A row a token, with its raw score and a bar; above it, what the scores are."""
    shown = strengths(result.token_scores, result.look).nan_to_num(0.0).tolist()
    rows = [
        f"| {position} | {_cell(text)} | {float(score):.6g} | {'█' * round(abs(strength) * _BAR)} |"
        for position, (text, score, strength) in enumerate(
            zip(result.token_texts, result.token_scores, shown, strict=True)
        )
    ]
    return "\n".join(
        [
            f"{_cell(result.target)}: {result.quantity}, {_cell(result.model['model'])}",
            "",
            "| # | token | score | |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )


def image_strip(result: AttributionResult) -> Tensor:
    """[3, H, W] of bytes, a square a token; for a map, a row a prediction."""
    single = len(result.queries) == 1
    return strip(result.token_scores if single else result.scores, result.look)


def log_attribution(
    result: AttributionResult, writer: SummaryWriter, tag: str = "attribution", step: int = 0
) -> None:
    """Write both under `tag`."""
    writer.add_text(tag, markdown_table(result), step)
    writer.add_image(tag, image_strip(result), step)


def _cell(text: str) -> str:
    """`text` as markdown shows it literally, in one cell."""
    plain = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-.!|~$" else c for c in plain)
