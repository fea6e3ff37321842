"""What an attribution depends on, in one place: every choice is an option and is in the output."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from lightning_inversion.errors import InputError

Method = Literal["auto", "gradient", "occlusion", "combined", "integrated"]
Scalar = Literal["logprob", "logit", "prob", "sum_logits"]
Reduce = Literal["l1", "abs_sum", "l2", "sum"]
Distance = Literal["drop", "l1_logits", "l1_probs", "l1_features", "relative_features"]
Normalise = Literal["max", "minmax"]
Scale = Literal["linear", "sqrt", "rank"]
Palette = Literal["heat", "document"]

FEATURE_DISTANCES = ("l1_features", "relative_features")


@dataclass(frozen=True)
class Choices:
    """What is attributed to what, and how.

    Args:
        method: gradient x input, occlusion, combined, integrated gradients; auto is combined for
            texts of up to `occlusion_limit` tokens and gradient above.
        scalar: the number whose cause is looked for: the target token's log-probability, logit,
            probability; or the document's sum of all logits, which is no function of the
            prediction.
        reduce: how gradient * embedding [D] becomes one number a token: sum of absolute values,
            absolute sum, L2 norm, or (signed) sum. None for l1; for sum with integrated.
        distance: how occlusion compares outputs: the (signed) drop of the scalar, the L1 distance
            of all logits (the document) or probabilities; with `depth`, the L1 distance of the
            features or the L2 distance relative to their norm. None for drop, or relative_features.
        replacement: what an occluded token becomes, and where integrated gradients start: pad, eos,
            unk or bos (the next of them the tokenizer has, said in the output), zero for a zero
            vector, or the text of one token.
        weight: combined is weight * occlusion + (1 - weight) * gradient, each divided by its
            maximum.
        steps: points of the Gauss-Legendre rule on the path of integrated gradients.
        token: the target token, as text or as id:NUMBER. None for the token the model predicts.
        against: a second token, as text or as id:NUMBER: why the target and not this one (the
            difference of the two scalars).
        every_token: a map: the attribution of each next token of the text, and of the one after it.
        depth: attribute the features after this many blocks, instead of a token.
        probes: random directions of the features whose gradients are taken, with `depth`.
        seed: of those directions.
        occlusion_limit: tokens up to which auto also occludes.
        batch_size: rows in one forward. None chooses by length and device; the numbers do not
            depend on it.

    Raises:
        InputError: one choice contradicts another, or is out of its range.
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
        """The distance that is used."""
        return self.distance or ("drop" if self.depth is None else "relative_features")

    @property
    def reduction(self) -> Reduce:
        """The reduction that is used; only a sum keeps what integrated gradients add up to."""
        return self.reduce or ("sum" if self.method == "integrated" else "l1")

    def method_for(self, length: int) -> Method:
        """The method that is used for a text of `length` tokens."""
        if self.method != "auto":
            return self.method
        return "combined" if length <= self.occlusion_limit else "gradient"

    def _check_ranges(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"--weight must be from 0 to 1, and is {self.weight}.")
        for name, least in (("steps", 1), ("probes", 1), ("occlusion_limit", 0), ("depth", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name} must be at least {least}, and is {value}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(
                f"--batch_size must be at least 1, and is {self.batch_size}; "
                "leave it out to have it chosen."
            )

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
            if getattr(self, name) is not None and not self._looks_at_the_token():
                raise InputError(
                    f"--{name} changes nothing here, because neither --scalar {self.scalar} nor "
                    f"--distance {self.occlusion_distance} looks at one token; leave it out, or "
                    "choose --scalar logprob."
                )
        if self.against is not None and self.scalar == "sum_logits":
            raise InputError(
                "--against compares two tokens, and --scalar sum_logits is the same for both; "
                "choose --scalar logit or logprob."
            )

    def _looks_at_the_token(self) -> bool:
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
                f"--scalar {self.scalar} is of a prediction, and --depth has none; leave it out."
            )


@dataclass(frozen=True)
class Look:
    """How scores are shown. The raw scores stay as they are.

    Args:
        normalise: divide by the largest absolute score; minmax also moves the smallest to 0 (the
            document).
        scale: linear; sqrt shows small scores better; rank shows their order alone.
        leave_out_last: do not let the last token, which usually dominates, set the scale; it is not
            coloured.
        palette: heat: the page's own colour to red, and to blue below 0; document: the document's
            colours.
    """

    normalise: Normalise = "max"
    scale: Scale = "linear"
    leave_out_last: bool = False
    palette: Palette = "heat"


PRESETS: dict[str, tuple[Choices, Look]] = {
    # The section 'Model Interpretability': sum of |gradient * embedding| of the summed logits, L1
    # distance of the whole output, a PAD token, an equal linear combination for short inputs.
    "document": (
        Choices(scalar="sum_logits", reduce="l1", distance="l1_logits", replacement="pad"),
        Look(normalise="minmax", palette="document"),
    ),
}
_FREE = {"method", "every_token", "steps", "occlusion_limit", "batch_size"}


def with_preset(name: str | None, choices: Choices, look: Look) -> tuple[Choices, Look]:
    """`choices` and `look` with what the preset `name` sets.

    A preset fixes what the attribution is, not what is free in its source: the method, the map, and
    what changes no number.

    Raises:
        InputError: there is no such preset, or a choice contradicts it.
    """
    if name is None:
        return choices, look
    if name not in PRESETS:
        raise InputError(f"--preset {name!r} is not one of {', '.join(PRESETS)}.")
    preset_choices, preset_look = PRESETS[name]
    for given, preset in ((choices, preset_choices), (look, preset_look)):
        for option in fields(given):
            value, wanted = getattr(given, option.name), getattr(preset, option.name)
            if option.name not in _FREE and value not in (option.default, wanted):
                raise InputError(
                    f"--{option.name} {value} contradicts --preset {name}, which has {wanted}; "
                    "leave one of them out."
                )
    free = {name: getattr(choices, name) for name in _FREE}
    return replace(preset_choices, **free), preset_look


def different(ours: Choices | Look, base: Choices | Look) -> dict[str, Any]:
    """The fields of `ours` that are not as in `base`: what has to be said of them."""
    return {name: value for name, value in asdict(ours).items() if value != getattr(base, name)}
