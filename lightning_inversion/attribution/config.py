"""The options of an attribution, their checks, and the command line that repeats them."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from lightning_inversion.errors import InputError

Method = Literal["auto", "gradient", "occlusion", "combined", "integrated", "lrp"]
Scalar = Literal["logprob", "logit", "prob", "sum_logits"]
Reduce = Literal["l1", "abs_sum", "l2", "sum"]
Distance = Literal["drop", "l1_logits", "l1_probs", "l1_features", "relative_features"]
Normalise = Literal["max", "minmax"]
Scale = Literal["linear", "sqrt", "rank"]
Palette = Literal["heat", "original"]

FEATURE_DISTANCES = ("l1_features", "relative_features")


@dataclass(frozen=True)
class Choices:
    """What is attributed, and by which method.

    Args:
        method: gradient x input, occlusion, combined, integrated gradients, or layer-wise relevance
            propagation (lrp); auto is combined for texts of up to `occlusion_limit` tokens and
            gradient above.
        scalar: the output that is attributed: the log-probability, logit or probability of the
            target token, or the sum of all logits (the source's choice), which is not a function of
            the prediction.
        reduce: how gradient * embedding [D] becomes one score per token: l1 (sum of absolute
            values), abs_sum (absolute value of the sum), l2 (norm), or sum (signed). The default is
            sum with `depth`, for integrated gradients and for lrp, l1 otherwise.
        distance: how occlusion compares outputs: the signed drop of the scalar, the L1 distance of
            all logits (the source's choice) or of all probabilities; with `depth`, the L1 distance
            of the features, or their L2 distance relative to the clean features' norm. The default
            is drop, or relative_features with `depth`.
        replacement: what an occluded token becomes, and where integrated gradients start: pad, eos,
            unk or bos (where the tokenizer lacks it, the next of them, with a note), zero for a
            zero vector, or the text of one token.
        weight: combined is weight * occlusion + (1 - weight) * gradient, each divided by its
            maximum.
        steps: points on the path of integrated gradients.
        token: the target token, as text or as id:NUMBER. The default is the predicted token.
        against: a second token, as text or as id:NUMBER, whose scalar is subtracted from the
            target's: why the target and not this one.
        every_token: attribute every next token, and the one after the text; this gives a map.
        depth: attribute the features after this many blocks, instead of a token.
        probes: random directions of the features along which gradients are taken, with `depth`.
        seed: of those directions.
        occlusion_limit: tokens up to which auto also occludes.
        batch_size: rows in one forward. The default depends on length and device; the scores do not
            depend on it.

    Raises:
        InputError: an option contradicts another, or is out of its range.
    """

    method: Method = "auto"
    scalar: Scalar = "logprob"
    reduce: Reduce | None = None
    distance: Distance | None = None
    replacement: str = "pad"
    weight: float = 0.5
    steps: int = 32
    token: str | None = None
    against: str | None = None
    every_token: bool = False
    depth: int | None = None
    probes: int = 16
    seed: int = 0
    occlusion_limit: int = 256
    batch_size: int | None = None

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.depth is None:
            self._check_token_target()
        else:
            self._check_feature_target()

    @property
    def occlusion_distance(self) -> Distance:
        """`distance`, or its default."""
        return self.distance or ("drop" if self.depth is None else "relative_features")

    @property
    def reduction(self) -> Reduce:
        """`reduce`, or its default.

        Only signed sums add up to the rise of integrated gradients or to the relevance of a logit,
        and only they estimate the norm of a Jacobian along random directions (see
        `FeatureMeasure`).
        """
        summed = self.depth is not None or self.method in ("integrated", "lrp")
        return self.reduce or ("sum" if summed else "l1")

    def method_for(self, length: int) -> Method:
        """The method for a text of `length` tokens; never auto."""
        if self.method != "auto":
            return self.method
        return "combined" if length <= self.occlusion_limit else "gradient"

    def _check_ranges(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"--weight must be from 0 to 1, and is {self.weight}.")
        smallest = {"steps": 1, "probes": 1, "occlusion_limit": 0, "depth": 0, "batch_size": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name} must be at least {least}, and is {value}.")

    def _check_token_target(self) -> None:
        if self.distance in FEATURE_DISTANCES:
            raise InputError(
                f"--distance {self.distance} compares features and needs --depth; "
                "choose drop, l1_logits or l1_probs."
            )
        if self.every_token and self.token is not None:
            raise InputError(
                "--every_token takes each next token of the text as its target; leave --token out."
            )
        for name in ("token", "against"):
            if getattr(self, name) is not None and not self._depends_on_target():
                raise InputError(
                    f"--{name} changes nothing here, because neither --scalar {self.scalar} nor "
                    f"--distance {self.occlusion_distance} depends on one token; leave it out, or "
                    "choose --scalar logprob."
                )
        if self.against is not None and self.scalar == "sum_logits":
            raise InputError(
                "--against compares two tokens, and --scalar sum_logits is the same for both; "
                "choose --scalar logit or logprob."
            )

    def _depends_on_target(self) -> bool:
        if self.scalar == "sum_logits":
            return False
        return self.method != "occlusion" or self.occlusion_distance == "drop"

    def _check_feature_target(self) -> None:
        for name in ("token", "against"):
            if getattr(self, name) is not None:
                raise InputError(f"--{name} and --depth are two targets; leave one of them out.")
        if self.method == "integrated":
            raise InputError(
                "--method integrated needs one number to integrate, and --depth gives a vector; "
                "choose gradient, occlusion or combined."
            )
        if self.distance is not None and self.distance not in FEATURE_DISTANCES:
            raise InputError(
                f"--distance {self.distance} compares predictions, and --depth has none; "
                f"choose {' or '.join(FEATURE_DISTANCES)}."
            )
        if self.scalar != Choices.scalar:
            raise InputError(
                f"--scalar {self.scalar} needs a prediction, and --depth has none; leave it out."
            )


@dataclass(frozen=True)
class Display:
    """How scores are shown. The raw scores are kept.

    Args:
        normalise: max divides by the largest absolute score; minmax also moves the smallest to 0
            (the source's choice).
        scale: linear; sqrt lifts small scores; rank shows only their order.
        leave_out_last: do not colour the last token, which usually dominates, and do not let it set
            the scale.
        leave_out_first: the same of the first token, on which models often rest attention that is
            needed nowhere.
        palette: heat: from the page's own colour to red, and to blue below 0; original: the
            source's colours.
    """

    normalise: Normalise = "max"
    scale: Scale = "linear"
    leave_out_last: bool = False
    leave_out_first: bool = False
    palette: Palette = "heat"


PRESETS: dict[str, tuple[Choices, Display]] = {
    # The source, section 'Model Interpretability': |gradient * embedding| of the summed logits,
    # added up; L1 distance of the whole output; a PAD token; an equal linear combination.
    "original": (
        Choices(scalar="sum_logits", reduce="l1", distance="l1_logits", replacement="pad"),
        Display(normalise="minmax", palette="original"),
    ),
}
_FREE = ("method", "every_token", "steps", "occlusion_limit", "batch_size")
"""Options that a preset leaves as they are: the source does not fix them."""


def with_preset(name: str | None, choices: Choices, display: Display) -> tuple[Choices, Display]:
    """`choices` and `display` with what the preset `name` sets.

    Raises:
        InputError: there is no such preset, or an option contradicts it.
    """
    if name is None:
        return choices, display
    if name not in PRESETS:
        raise InputError(f"--preset {name!r} is unknown; choose {' or '.join(PRESETS)}.")
    preset_choices, preset_display = PRESETS[name]
    for given, preset in ((choices, preset_choices), (display, preset_display)):
        for option in fields(given):
            value, wanted = getattr(given, option.name), getattr(preset, option.name)
            if option.name not in _FREE and value not in (option.default, wanted):
                raise InputError(
                    f"--{option.name} {value} contradicts --preset {name}, which has {wanted}; "
                    "leave one of them out."
                )
    free = {option: getattr(choices, option) for option in _FREE}
    return replace(preset_choices, **free), preset_display


def differing(ours: Choices | Display, base: Choices | Display) -> dict[str, Any]:
    """The fields of `ours` whose values differ from those of `base`."""
    return {name: value for name, value in asdict(ours).items() if value != getattr(base, name)}


LONGEST_IN_COMMAND = 500
"""Characters of a text that a command line still contains."""
TEXT_FILE = "text.txt"
"""The file from which the command line of a longer text reads it."""
_HIDDEN = ("Cc", "Cf", "Zl", "Zp")
"""Unicode categories that a shell or a page does not show."""


def command_line(
    text: str,
    choices: Choices,
    display: Display,
    preset: str | None,
    model_options: Mapping[str, Any],
) -> str:
    """The command line that gives the same result; a long text is read from `TEXT_FILE`.

    Args:
        text: what is attributed.
        choices: with what the preset sets.
        display: with what the preset sets.
        preset: its name.
        model_options: options of `TransformerSpec` and their values.
    """
    base, base_display = with_preset(preset, Choices(), Display())
    options = {
        **model_options,
        **({} if preset is None else {"preset": preset}),
        **differing(choices, base),
        **differing(display, base_display),
    }
    words = ["lightning-inversion", "attribute"]
    for option, value in options.items():
        # With '=', a value may begin with a dash.
        words.append(f"--{option}={str(value).lower() if isinstance(value, bool) else value}")
    command = " ".join(_quoted(word) for word in words)
    # A text that is a dash would be read from stdin, and no argument can contain a NUL.
    if len(text) > LONGEST_IN_COMMAND or "\0" in text or text == "-":
        return f"{command} - < {TEXT_FILE}"
    return f"{command} {'-- ' if text.startswith('-') else ''}{_quoted(text)}"


def _quoted(word: str) -> str:
    """`word` for a shell; one with hidden characters as $'...', with their code points."""
    if not any(unicodedata.category(character) in _HIDDEN for character in word):
        return shlex.quote(word)
    return f"$'{''.join(_shell_escape(character) for character in word)}'"


def _shell_escape(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character == "\n":
        return "\\n"
    if unicodedata.category(character) in _HIDDEN:
        return f"\\U{ord(character):08X}"
    return character
