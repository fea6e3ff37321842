"""A second device with the numbers of the CPU: what mixes devices fails on it as on a GPU.

    python -m tests.gpu.elsewhere

Tensors on it hold a tensor of the CPU. An operation on tensors of both devices is refused, as CUDA
refuses it: a scalar may lie anywhere, and so may indices of a tensor that is elsewhere. Generators
of the CPU cannot fill its tensors, and NumPy cannot read them. The program recovers prompts there
in several ways, and prints a JSON list: the name of each, the tokens right, and what failed.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
_BETWEEN_DEVICES = {"_to_copy", "copy_", "copy", "_local_scalar_dense", "lift_fresh"}
_BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Elsewhere(Tensor):
    """A tensor on the second device.

    Args:
        own: its numbers, on the CPU.
    """

    own: Tensor

    @staticmethod
    def __new__(cls, own: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            own.size(),
            strides=own.stride(),
            storage_offset=own.storage_offset(),
            dtype=own.dtype,
            device=f"{NAME}:0",
        )
        return made

    def __init__(self, own: Tensor) -> None:
        self.own = own

    def tolist(self) -> Any:
        return self.detach().own.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    def new_tensor(self, data: Any, dtype: Any = None, **more: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, **{"device": self.device, **more})

    def __setitem__(self, key: Any, value: Any) -> None:
        # A number becomes a tensor in C++, which knows nothing of this class.
        super().__setitem__(key, value if isinstance(value, Tensor) else self.new_tensor(value))

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU; its results are elsewhere, but for copies to the CPU."""
    name = operation._schema.name.split("::")[-1]
    if name == "_fused_sdp_choice":
        return 0  # attention by plain operations
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    ours = [one for one in tensors if isinstance(one, Elsewhere)]
    _refuse_mixed(name, args, tensors, kwargs.get("generator"))
    device = kwargs.get("device")
    owned = tree_map(lambda one: one.own if isinstance(one, Elsewhere) else one, (args, kwargs))
    if device is not None:
        owned[1]["device"] = torch.device("cpu")
    found = operation(*owned[0], **owned[1])
    to_cpu = device is not None and torch.device(device).type == "cpu"
    if to_cpu or (name == "copy_" and not isinstance(args[0], Elsewhere)):
        return args[0] if name == "copy_" else found
    in_place = {id(one.own): one for one in ours} if operation._schema.is_mutable else {}

    def placed(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        return in_place[id(one)] if id(one) in in_place else Elsewhere(one)

    return tree_map(placed, found)


def _refuse_mixed(
    name: str, args: Any, tensors: list[Tensor], generator: torch.Generator | None
) -> None:
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu'")
    on_both = len({isinstance(one, Elsewhere) for one in tensors if one.dim()}) > 1
    indexed = name in _BY_INDEX and isinstance(args[0], Elsewhere)
    if on_both and not indexed and name not in _BETWEEN_DEVICES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu in {name}"
        )


def _here_or_there(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes tensors in C++, for either device."""

    def made(*args: Any, device: Any = None, **more: Any) -> Tensor:
        there = device is not None and torch.device(device).type == NAME
        tensor = make(*args, device="cpu" if there else device, **more)
        return Elsewhere(tensor) if there and not isinstance(tensor, Elsewhere) else tensor

    return made


def register() -> None:
    """Make ``torch.device("elsewhere")`` a device of this process, for good."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda one, *args, **kwargs: _run(one, args, kwargs), "PrivateUse1")
    register.kept = library
    for name in ("tensor", "arange", "as_tensor"):
        setattr(torch, name, _here_or_there(getattr(torch, name)))


IDS = [[17, 230, 5, 5, 101, 9], [3, 44, 280, 7, 3, 60]]


def recover_there(
    family: str = "llama",
    channel: Any = None,
    policy: Any = None,
    dtype: torch.dtype | None = None,
    **cut: Any,
) -> int:
    """Recover prompts from a tiny model that is elsewhere; the number of tokens right."""
    from lightning_inversion.recovery.policy import Targets, recover_prompts
    from lightning_inversion.recovery.token_recovery import TokenRecovery
    from lightning_inversion.transformer.language_model import LanguageModel
    from lightning_inversion.transformer.truncated import TruncatedTransformer
    from lightning_inversion.verification.measurements import Measurements
    from tests.tiny import tiny_model

    torch.manual_seed(0)
    model = tiny_model(family).to(device=NAME, dtype=dtype)
    transformer = TruncatedTransformer.from_model(model, **{"depth": 2, **cut})
    language_model = LanguageModel(model, transformer.caches)
    measurements = Measurements.measure(transformer, language_model, channel)
    features = transformer.features_of(torch.tensor(IDS, device=NAME))
    features = features if channel is None else channel(features)
    targets = Targets(features, [len(ids) for ids in IDS])
    prompts = recover_prompts(policy or TokenRecovery(), measurements, targets)
    return sum(
        ours == theirs
        for prompt, ids in zip(prompts, IDS, strict=True)
        for ours, theirs in zip(prompt.ids, ids, strict=False)
    )


def by_calls(call: str) -> int:
    """What the calls of Python give of a model that is elsewhere; the number of tokens right."""
    from lightning_inversion import attribute, capture, invert, recover
    from tests.tiny import tiny_model, tiny_tokenizer

    torch.manual_seed(0)
    model, tokenizer, text = tiny_model("llama").to(NAME), tiny_tokenizer(), "the cat sat on"
    if call == "attribute":
        return len(attribute(model, tokenizer, [text])[0].tokens)
    states = capture(model, tokenizer, [text], depth=2)
    found = {"recover": recover, "invert": invert}[call](model, tokenizer, states, depth=2)
    return len(found[0].tokens) if found[0].text == text else 0


def ways() -> dict[str, Callable[[], int]]:
    """What is run elsewhere, by name."""
    from lightning_inversion.data.storage import Storage
    from lightning_inversion.proposers.gradient_proxy import GradientProxy
    from lightning_inversion.proposers.prior import LanguageModelPrior
    from lightning_inversion.recovery.reading import Reading
    from lightning_inversion.recovery.token_recovery import TokenRecovery

    def few(proposer: Any) -> TokenRecovery:
        return TokenRecovery(proposer=proposer, candidates=2, max_candidates=2, budget=64)

    return {
        "measured": recover_there,
        "kept": recover_there,
        "noise": lambda: recover_there(channel=Storage(noise=0.01)),
        "slice": lambda: recover_there(features="0:16"),
        "keys and values": lambda: recover_there(output="keys_values", depth=1),
        "computed in bfloat16": lambda: recover_there(dtype=torch.bfloat16),
        "without kept prefixes": lambda: recover_there("bloom"),
        "proxies": lambda: recover_there(policy=few(GradientProxy(waits=1))),
        "prior": lambda: recover_there(policy=few(LanguageModelPrior())),
        "reading": lambda: recover_there(policy=Reading()),
        **{call: lambda call=call: by_calls(call) for call in ("recover", "invert", "attribute")},
    }


def main() -> None:
    """Run each way; print what came of it."""
    register()
    outcomes = []
    for name, run in ways().items():
        try:
            outcomes.append({"name": name, "right": run(), "failed": None})
        except Exception:
            outcomes.append({"name": name, "right": 0, "failed": traceback.format_exc()})
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
