"""Whole command lines on what nobody meant to be read: one kind of input for each function.

A kind takes a source of random numbers and a `Place`, writes files into the place's folder, and
returns a `Case`. The same seed gives the same case. `tests/benchmarks/fuzz.py` runs them.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests import hostile
from tests.tiny import save_tiny, tiny_model
from tests.tiny_gguf import save_tiny_gguf

Run = Callable[[list[str]], int]
PROMPTS = ["The sky is blue.", "A quick brown fox"]
ON = ["--model=model", "--trainer.accelerator=cpu"]
"""Options of the commands that run under a Trainer."""


@dataclass(frozen=True)
class Place:
    """Where a case is run.

    Attributes:
        base: a folder of right files, which no case changes: see `prepare`.
        folder: of the case, empty but for `model` and `prompts.txt`; the working directory.
    """

    base: Path
    folder: Path

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the case."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def copy(self, name: str, to: str = "") -> Path:
        """A file or folder of the base, copied into the case's."""
        source, target = self.base / name, self.folder / (to or name)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
        return target


@dataclass(frozen=True)
class Case:
    """A command line, and what must hold.

    Attributes:
        args: of the command.
        accept: whether it must end with exit code 0.
        check: raises AssertionError where the command ended with exit code 0 and its result is
            wrong; called with what it printed.
    """

    args: list[str]
    accept: bool = False
    check: Callable[[str], None] = lambda printed: None


def prepare(base: Path, run: Run) -> None:
    """Fill the base folder, the working directory, with right files of every kind."""
    save_tiny(base / "model")
    (base / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    tiny_model("llama").save_pretrained(base / "shards", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / "model" / name, base / "shards" / name)
    save_tiny_gguf(base / "tiny.gguf")
    options = ["--prompts=prompts.txt", "--model=model"]
    cpu = "--trainer.accelerator=cpu"
    for args in (
        ["capture", *options, "--depth=2", "--out=targets.safetensors", "--keep_prompts=true"],
        ["capture", *options, "--depth=2", "--out=plain.safetensors"],
        ["predict", "--targets=targets.safetensors", "--depth=2", *ON],
        ["fit", *options, "--model.iterations=20", cpu],
        ["sweep", "predict", *options, "--over=depth=1,2", "--name=swept", cpu],
        ["capture", "--prompts=prompts.txt", "--model=tiny.gguf", "--out=of_gguf.safetensors"],
    ):
        assert run(args) == 0, args


# -- texts ------------------------------------------------------------------------------------


def prompt_files(draw: random.Random, place: Place) -> Case:
    """Texts in a file, as lines or as JSON lines; or the file damaged, or of another kind."""
    texts = [hostile.text(draw) for _ in range(draw.randint(1, 4))]
    lines = draw.random() < 0.5
    if lines:
        name, end = draw.choice(["p.jsonl", "p.JSONL", "p.ndjson"]), draw.choice(["\n", "\r\n"])
        records = [{"id": 7, "prompt": one} if draw.random() < 0.3 else {"prompt": one}
                   for one in texts]  # fmt: skip
        ascii_only = draw.random() < 0.5
        written = end.join(json.dumps(one, ensure_ascii=ascii_only) for one in records) + end
    else:
        name, end = draw.choice(["p.txt", "p", "p.md", "p.text"]), draw.choice(["\n", "\r\n"])
        texts = [one.lstrip("\ufeff") or "x" for one in texts]
        written = end.join(texts) + draw.choice(["", end])
    content = draw.choice(["", "\ufeff"]).encode() + written.encode()
    args = ["capture", f"--prompts={name}", "--model=model", "--out=o.safetensors"]
    if draw.random() < 0.55:
        place.write(name, content)
        return Case([*args, "--keep_prompts=true"], True, lambda _: _has_prompts(place, texts))
    if draw.random() < 0.2:
        hostile.in_place_of(draw, place.folder / name)
        return Case(args)
    if lines and draw.random() < 0.5:
        content = b"\n".join(hostile.json_text(draw, one) for one in records)
    else:
        content = hostile.contents(draw, content)
    if draw.random() < 0.2:
        name = draw.choice(["p.json", "p.csv", "p.yaml", "p.txt.gz", "p.parquet", "p.JSON"])
        args[1] = f"--prompts={name}"
    place.write(name, content)
    return Case(args)


def _has_prompts(place: Place, texts: list[str]) -> None:
    with safe_open(place.folder / "o.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["manifest"])["prompts"] == texts


def texts_typed(draw: random.Random, place: Place) -> Case:
    """A text on the command line, and a token that an option names."""
    text = hostile.text(draw) if draw.random() < 0.7 else str(draw.choice(hostile.VALUES))
    args = ["attribute", text, "--model=model", "--json=a.json", "--out=a.html"]
    plain = bool(text) and not text.startswith("-") and text.isprintable()
    if draw.random() < 0.3:
        args.append(f"--{draw.choice(['token', 'against'])}={draw.choice(hostile.VALUES)}")
        plain = False
    return Case(args, plain and len(text) < 200, lambda _: _shows_text(place, text))


def _shows_text(place: Place, text: str) -> None:
    result = json.loads((place.folder / "a.json").read_text())
    assert "".join(result["tokens"]) == text
    _check_page(place.folder / "a.html")


def _check_page(path: Path) -> None:
    page = path.read_text("utf-8")
    assert "<script>alert" not in page
    assert not {"\x1b", "\0", "\x07", "\u202e"} & set(page)


def names(draw: random.Random, place: Place) -> Case:
    """Files, folders and titles with names that steer a terminal or a page."""
    name = str(draw.choice([one for one in hostile.VALUES + hostile.ARTICLES if str(one)]))
    name = name.replace("/", "_")[:100]
    kind = draw.randrange(5)
    usable = name.isprintable() and not name.startswith("-") and name not in ("~", "..", "[]", "{}")
    if kind == 0:
        place.copy("lightning_logs/version_0", "run")
        args = ["report", "run", f"--title={name}", f"--label={name}", "--out=out"]
        return Case(args, usable, lambda _: _check_page(place.folder / "out" / "report.html"))
    try:
        if kind == 1:
            place.copy("lightning_logs/version_0", name)
        elif kind == 2:
            place.write(f"{name}.txt", b"The sky")
        elif kind == 3:
            place.copy("model", f"m{name}")
    except (OSError, ValueError):
        return Case(["report", name, "--out=out"])
    if kind == 1:
        args = ["report", f"./{name}", "--out=out"]
        return Case(args, False, lambda _: _check_page(place.folder / "out" / "report.html"))
    if kind == 2:
        return Case(["capture", f"--prompts={name}.txt", "--model=model", "--out=o.safetensors"])
    if kind == 3:
        model = f"--model=./m{name}"
        if draw.random() < 0.5:
            return Case(["fit", "--prompts=prompts.txt", model, "--trainer.accelerator=cpu"])
        return Case(["attribute", "The sky", model, "--out=a.html"],
                    check=lambda _: _check_page(place.folder / "a.html"))  # fmt: skip
    return Case(["capture", "--prompts=prompts.txt", "--model=model", f"--out={name}"])


# -- captured files ---------------------------------------------------------------------------


def _recovered(place: Place) -> None:
    """No token of the two prompts is verified wrongly, and each row is whole."""
    rows = [json.loads(line) for line in _lines(place.folder, "results.jsonl")]
    truth = [json.loads(line)["ids"] for line in _lines(place.base / "lightning_logs/version_0",
                                                        "results.jsonl")]  # fmt: skip
    for row in rows:
        if row["error"] is None and len(rows) == len(truth):
            right = truth[row["index"]]
            for token, verified, own in zip(
                row["recovered_ids"], row["token_verified"], right, strict=False
            ):
                assert not verified or token == own, (row["index"], token, own)


def _lines(folder: Path, name: str) -> list[str]:
    (path,) = folder.rglob(name)
    return path.read_text("utf-8").splitlines()


def captured_files(draw: random.Random, place: Place) -> Case:
    """A safetensors file of targets: its header lies, its bytes are damaged, or NaN."""
    content = (place.base / "targets.safetensors").read_bytes()
    place.write("t.safetensors", hostile.safetensors(draw, content))
    return Case(["predict", "--targets=t.safetensors", "--depth=2", *ON],
                check=lambda _: _recovered(place))  # fmt: skip


def manifests(draw: random.Random, place: Place) -> Case:
    """Targets with a manifest that is changed or damaged, inside of the file or beside it."""
    path = place.base / "targets.safetensors"
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["manifest"])
    content = hostile.json_text(draw, manifest)
    if draw.random() < 0.5:
        save_file(load_file(path), place.folder / "t.safetensors")
        place.write("t.safetensors.manifest.json", content)
    else:
        text = {"manifest": content.decode("utf-8", "replace")}
        save_file(load_file(path), place.folder / "t.safetensors", text)
    return Case(["predict", "--targets=t.safetensors", "--depth=2", *ON],
                check=lambda _: _recovered(place))  # fmt: skip


def other_tensors(draw: random.Random, place: Place) -> Case:
    """Hidden states as .npy, .npz, .pt or a folder of them: of any shape and type, or damaged."""
    states = list(load_file(place.base / "plain.safetensors").values())
    state = draw.choice(states)
    how = draw.randrange(9)
    changed: Any = state
    if how == 0:
        changed = state.new_full(state.shape, draw.choice([float("nan"), float("inf"), 3e38]))
    elif how == 1:
        changed = state.to(draw.choice([torch.int64, torch.bool, torch.complex64, torch.float64]))
    elif how == 2:
        changed = state.reshape(draw.choice([(-1,), (1, 1, *state.shape), (*state.shape, 1)]))
    elif how == 3:
        changed = state[: draw.choice([0, 1, 2]), : draw.choice([0, 1, 31])]
    elif how == 4:
        changed = [state, [state.T], {"a": state, "blocks.1.hook_resid_post": state}]
    elif how == 5:
        changed = {str(draw.choice(hostile.VALUES)): one for one in states}
    elif how == 6:
        changed = torch.stack([state] * 5)
    name = draw.choice(["t.npy", "t.npz", "t.pt", "t.pth", "d/0.npy", "d/a.pt"])
    data = io.BytesIO()
    plain = changed if isinstance(changed, torch.Tensor) else state
    try:
        if name.endswith("npy"):
            np.save(data, plain.numpy(), allow_pickle=True)
        elif name.endswith("npz"):
            arrays = {key: plain.numpy() for key in draw.choice([["a"], ["0", "1"], ["blocks.1"]])}
            np.savez(data, **arrays)
        else:
            torch.save(changed, data)
    except (TypeError, ValueError):
        torch.save(plain, data)
    content = data.getvalue()
    if how > 6:
        content = hostile.contents(draw, content)
    place.write(name, content)
    return Case(["predict", f"--targets={name.split('/')[0]}", "--depth=2", *ON])


# -- what runs leave --------------------------------------------------------------------------


def result_rows(draw: random.Random, place: Place) -> Case:
    """A report of good rows and of one that is changed or damaged."""
    good = _lines(place.base / "lightning_logs" / draw.choice(["version_0", "version_1"]),
                  "results.jsonl")  # fmt: skip
    record = json.loads(draw.choice(good))
    bad = hostile.json_text(draw, record).replace(b"\n", b" ")
    rows = [one.encode() for one in good]
    rows.insert(draw.randrange(len(rows) + 1), bad)
    place.write("runs/a/results.jsonl", b"\n".join(rows) + b"\n")
    return Case(["report", "runs", "--out=out"], True,
                lambda _: _check_page(place.folder / "out" / "report.html"))  # fmt: skip


def checkpoints(draw: random.Random, place: Place) -> Case:
    """A checkpoint of a fit that is changed or damaged: validated, or resumed."""
    run = place.folder / "lightning_logs" / "version_0"
    place.copy("lightning_logs/version_1", "lightning_logs/version_0")
    path = run / "checkpoints" / "last.ckpt"
    if draw.random() < 0.1:
        hostile.in_place_of(draw, path)
    elif draw.random() < 0.3:
        path.write_bytes(hostile.contents(draw, path.read_bytes()))
    else:
        stored = torch.load(path, weights_only=True)
        for _ in range(draw.choice([1, 1, 2])):
            stored = _changed_state(draw, stored)
        torch.save(stored, path)
    if draw.random() < 0.3:
        (run / "results.jsonl").unlink()
    if draw.random() < 0.1:
        name = draw.choice(["config.yaml", "results.jsonl"])
        place.write(f"lightning_logs/version_0/{name}", draw.choice(hostile.WHOLE_FILES))
    options = ["--prompts=prompts.txt", "--model.iterations=20", *ON]
    at = draw.choice(["last", str(path)])
    return Case([draw.choice(["fit", "validate", "predict"]), *options, f"--ckpt_path={at}"])


def _changed_state(draw: random.Random, state: Any) -> Any:
    """A checkpoint with another value somewhere."""
    places: list[tuple[Any, Any]] = []
    pending = [state]
    while pending:
        holder = pending.pop()
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        places += [(holder, key) for key in keys]
        pending += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    holder, key = draw.choice(places)
    value = holder[key]
    if isinstance(value, torch.Tensor) and draw.random() < 0.7:
        holder[key] = draw.choice([
            value.flatten()[:0], value.double(), value.unsqueeze(0), torch.zeros(3),
            value * float("nan"), torch.full(value.shape, 10**9), value.to(torch.complex64),
        ])  # fmt: skip
    elif draw.random() < 0.3:
        del holder[key]
    else:
        holder[key] = hostile.value(draw)
    return state


def cache_entries(draw: random.Random, place: Place) -> Case:
    """What was measured once for a model, damaged: made again, with the same rows."""
    cache = place.folder / "cache"
    shutil.copytree(place.base / "cache", cache)
    gguf = draw.random() < 0.4
    kind = "tiny-*/*" if gguf else "*"
    entries = sorted(one for one in cache.rglob(kind) if one.is_file())
    path = draw.choice(entries)
    how = draw.random()
    if how < 0.3:
        hostile.in_place_of(draw, path)
    elif how < 0.4:
        shutil.rmtree(path.parent)
        path.parent.write_bytes(b"")
    elif path.suffix == ".safetensors":
        path.write_bytes(hostile.safetensors(draw, path.read_bytes()))
    else:
        path.write_bytes(hostile.contents(draw, path.read_bytes()))
    if gguf:
        args = ["capture", "--prompts=prompts.txt", "--model=tiny.gguf", "--out=o.safetensors"]
        return Case(args, True, lambda _: _same_tensors(place))
    return Case(["predict", "--prompts=prompts.txt", "--depth=2", *ON], True,
                lambda _: _recovered(place))  # fmt: skip


def _same_tensors(place: Place) -> None:
    found, right = (load_file(folder / name) for folder, name in (
        (place.folder, "o.safetensors"), (place.base, "of_gguf.safetensors")))  # fmt: skip
    assert all(torch.equal(found[key], right[key]) for key in right)


# -- plans and options ------------------------------------------------------------------------


def _yaml(draw: random.Random, right: Any) -> bytes:
    if draw.random() < 0.2:
        return draw.choice(hostile.WHOLE_FILES)
    changed = hostile.json_value(draw, right, draw.choice([1, 1, 2]))
    text = yaml.safe_dump(json.loads(json.dumps(changed)), allow_unicode=draw.random() < 0.5)
    return text.encode(errors="surrogatepass") if draw.random() < 0.8 else hostile.contents(
        draw, text.encode(errors="surrogatepass")
    )  # fmt: skip


def configs(draw: random.Random, place: Place) -> Case:
    """A config of a fit that is changed or damaged; the sweep checks it and runs nothing."""
    right = yaml.safe_load((place.base / "lightning_logs/version_1/config.yaml").read_text())
    if draw.random() < 0.5:
        right = {section: right[section] for section in draw.sample(sorted(right), 3)}
        right["data"] = {"file": "prompts.txt"}
    place.write("c.yaml", _yaml(draw, right))
    return Case(["sweep", "--config=c.yaml", "--over=depth=1,2", "--dry-run",
                 "--trainer.accelerator=cpu"])  # fmt: skip


def audit_plans(draw: random.Random, place: Place) -> Case:
    """A plan of an audit."""
    right = {
        "channels": {"untouched": {}, "noise": {"noise": 0.1}, "cut": {"features": "0:16"}},
        "fit": {"channels": ["untouched"], "options": {"model.iterations": 5}},
        "predict": {"channels": None, "options": {"model.recovery.budget": 64}},
    }
    place.write("plan.yaml", _yaml(draw, right))
    return Case(["audit", "--prompts=prompts.txt", "--depth=1", "--config=plan.yaml", "--dry-run",
                 *ON])  # fmt: skip


def sweep_files(draw: random.Random, place: Place) -> Case:
    """The file of a sweep that another process joins."""
    right = json.loads((place.base / "lightning_logs/swept/sweep.json").read_text())
    place.write("swept/sweep.json", hostile.json_text(draw, right))
    if draw.random() < 0.1:
        hostile.in_place_of(draw, place.folder / "swept" / "sweep.json")
    return Case(["sweep", "--join=swept", "--dry-run"])


OPTIONS = {
    "capture": """store noise noise_kind largest seed special_tokens keep_prompts
        tokens_per_batch overwrite model revision depth layers features final_norm weights
        weights_seed dtype attention positions causal repeat_first embedding embedding_seed mlp
        prompts out device_map""",
    "attribute": """token against model dtype method of layer preset json out prompts processes
        revision weights attention unknown top_k replacement""",
    "report": "out label title max_prompts figure_size font_size",
    "sweep": """over seeds name processes join config prompts depth model data.prompts data.repeat
        model.iterations data.targets data.layout data.known_prefix data.first_position data.scale
        data.noise data.noise_kind data.largest data.tokens_per_batch data.batch_size
        model.optimizer model.objective
        model.schedule model.learnable model.decoder model.recovery model.allowed_tokens
        learning_rate.start learning_rate.end decoding.every decoding.top_k stopping.perturbation
        stopping.threshold results.top_k checkpoint.every trainer.devices trainer.logger
        trainer.precision trainer.max_steps trainer.default_root_dir trainer.callbacks
        trainer.strategy seed_everything ckpt_path model.transformer.layers results.file
        model.transformer.features model.recovery.budget""",
    "audit": "prompts depth model config processes model.recovery.budget trainer.devices",
}


def options(draw: random.Random, place: Place) -> Case:
    """An option of a command with another value, or by another name."""
    command = draw.choice(["capture", "attribute", "report", "sweep", "sweep", "audit"])
    name = draw.choice(OPTIONS[command].split())
    if draw.random() < 0.1:
        name = hostile.contents(draw, name.encode()).decode("utf-8", "ignore").replace("\0", "")
    number = draw.random() < 0.3
    value = str(draw.choice([0, -1, 1, 2, 1.5, 10**9, 10**30, 1e300, "nan"])) if number else (
        draw.choice([json.dumps, str])(hostile.value(draw)))  # fmt: skip
    if name == "seeds" and value == "10000":
        value = "10001"
    given = [f"--{name}={value}"] if draw.random() < 0.8 else [f"--{name}", value]
    place.copy("lightning_logs/version_0", "run")
    rest = {
        "capture": ["--prompts=prompts.txt", "--model=model", "--out=o.safetensors"],
        "attribute": ["The sky", "--model=model", "--out=a.html"],
        "report": ["run", "--out=out"],
        "sweep": ["--prompts=prompts.txt", "--over=depth=1,2", "--dry-run", *ON],
        "audit": ["--prompts=prompts.txt", "--depth=1", "--dry-run", *ON],
    }[command]
    rest = [one for one in rest if not one.startswith(f"--{name}=")]
    return Case([command, *rest, *given])


# -- models -----------------------------------------------------------------------------------


def _capture_with(model: str) -> list[str]:
    return ["capture", "--prompts=prompts.txt", f"--model={model}", "--out=o.safetensors"]


def _finite(place: Place) -> None:
    for tensor in load_file(place.folder / "o.safetensors").values():
        assert tensor.isfinite().all()


def _as_transformers(place: Place) -> None:
    """What was captured of a folder is what transformers itself computes from it."""
    found = load_file(place.folder / "o.safetensors")
    with safe_open(place.folder / "o.safetensors", framework="pt") as file:
        depth = json.loads(file.metadata()["manifest"])["transformer"]["depth"]
    folder = place.folder / "m"
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder), dtype=torch.float32,
        attn_implementation="sdpa",
        ignore_mismatched_sizes=True,  # of the head, or of blocks that are not read
    ).eval()  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for index, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        # The last of transformers' is after the norm, which ours is not.
        if depth < len(states) - 1:
            torch.testing.assert_close(found[str(index)], states[depth][0], atol=1e-3, rtol=1e-3)


def model_configs(draw: random.Random, place: Place) -> Case:
    """A model's configuration that is changed, damaged, or of another architecture."""
    place.copy("model", "m")
    right = json.loads((place.base / "model" / "config.json").read_text())
    if draw.random() < 0.2:
        right["model_type"] = draw.choice(["gpt2", "bert", "t5", "mamba", "x", "llava", "clip", ""])
    elif draw.random() < 0.1:
        right["auto_map"] = {"AutoModelForCausalLM": "code.Code", "AutoConfig": "code.Config"}
        place.write("m/code.py", b"open('ran', 'w')\n")
    place.write("m/config.json", hostile.json_text(draw, right))
    if draw.random() < 0.05:
        hostile.in_place_of(draw, place.folder / "m" / "config.json")
    return Case(_capture_with("m"), check=lambda _: _as_transformers(place))


def tokenizers(draw: random.Random, place: Place) -> Case:
    """A model's tokenizer that is changed, damaged or missing."""
    place.copy("model", "m")
    name = draw.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    path = place.folder / "m" / name
    if draw.random() < 0.15:
        hostile.in_place_of(draw, path)
    else:
        path.write_bytes(hostile.json_text(draw, json.loads(path.read_text())))
    if draw.random() < 0.5:
        return Case(["attribute", "The sky", "--model=m", "--json=a.json"])
    return Case(_capture_with("m"), check=lambda _: _finite(place))


def weights(draw: random.Random, place: Place) -> Case:
    """A model's weights: the header lies, bytes are damaged, NaN; an index that lies."""
    if draw.random() < 0.4:
        place.copy("shards", "m")
        if draw.random() < 0.7:
            path = place.folder / "m" / "model.safetensors.index.json"
            path.write_bytes(hostile.json_text(draw, json.loads(path.read_text())))
            return Case(_capture_with("m"), check=lambda _: _as_transformers(place))
        path = draw.choice(sorted((place.folder / "m").glob("*.safetensors")))
    else:
        place.copy("model", "m")
        path = place.folder / "m" / "model.safetensors"
    if draw.random() < 0.2:
        hostile.in_place_of(draw, path)
    else:
        path.write_bytes(hostile.safetensors(draw, path.read_bytes()))
    if draw.random() < 0.2:
        place.write("m/pytorch_model.bin", draw.choice(hostile.WHOLE_FILES))
    if draw.random() < 0.4:
        args = ["predict", "--prompts=prompts.txt", "--model=m", "--trainer.accelerator=cpu"]
        return Case(args, check=lambda _: _recovered(place))
    return Case(_capture_with("m"), check=lambda _: _as_transformers(place))


def gguf_files(draw: random.Random, place: Place) -> Case:
    """A .gguf file that is damaged, for the most part in its header."""
    content = bytearray((place.base / "tiny.gguf").read_bytes())
    if draw.random() < 0.7:
        for _ in range(draw.choice([1, 1, 2, 8])):
            at = draw.choice([draw.randrange(24), draw.randrange(400), draw.randrange(12_000)])
            content[at] = draw.choice([0, 1, 255, 127, draw.randrange(256)])
        changed = bytes(content)
    else:
        changed = hostile.contents(draw, bytes(content))
    place.write("x.gguf", changed)
    return Case(_capture_with("x.gguf"), check=lambda _: _finite(place))


KINDS: dict[Callable[[random.Random, Place], Case], int] = {
    prompt_files: 700, texts_typed: 450, names: 200, captured_files: 450, manifests: 450,
    other_tensors: 250, result_rows: 450, checkpoints: 350, cache_entries: 150, configs: 400,
    audit_plans: 200, sweep_files: 200, options: 450, model_configs: 250, tokenizers: 150,
    weights: 200, gguf_files: 100,
}  # fmt: skip
"""Each kind, and how many cases of it the whole series has."""
