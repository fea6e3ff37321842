"""More kinds of hostile input: layouts of tensors, archives, folders, caches, and what surrounds a
model or a run. See `tests/hostile_cases.py` for the others; `KINDS` here has them all.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests import hostile, hostile_cases
from tests.hostile_cases import ON, Case, Place, _as_transformers, _capture_with, _recovered


class Runs:
    """A pickle that leaves a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def _predict(targets: str, *more: str) -> list[str]:
    return ["predict", f"--targets={targets}", "--depth=2", *more, *ON]


def layouts(draw: random.Random, place: Place) -> Case:
    """Hidden states as other tools lay them out, with options that may not fit them."""
    states = list(load_file(place.base / "plain.safetensors").values())
    one = draw.choice(states)
    longest = max(len(state) for state in states)
    padded = torch.stack([torch.nn.functional.pad(s, (0, 0, 0, longest - len(s))) for s in states])
    mask = torch.tensor([[n < len(s) for n in range(longest)] for s in states])
    held: Any = draw.choice([
        one, one[None], padded, [*states], (one, one, one, one, one), torch.stack([one] * 5),
        {"hidden_states": padded, "attention_mask": mask}, {"blocks.1.hook_resid_post": one},
        {"hidden_states": padded, "attention_mask": draw.choice([
            mask[:, :2], mask.float() * float("nan"), ~mask, mask.long() * 2, mask[..., None]])},
        {"hidden_states": torch.stack([one] * 2, 1), "token_ids": torch.arange(len(one)) - 3},
        {"blocks.1.hook_resid_post": one, "blocks.1.hook_resid_mid": one * 2},
        {"transformer.h.1.output[0]": one, "transformer.h.99.output[0]": one},
        {"l_out-1": one, "l_out--1": one, "l_out-10000000000000000000": one},
        {"past_key_values.0.key": padded, "past_key_values.0.value": padded},
        one.bfloat16().view(torch.int16), one.half().view(torch.uint8), one.to_sparse(),
        one.expand(3, *one.shape).transpose(0, 2), one.new_zeros(0, 32), one.new_zeros(4, 0),
        one.new_zeros(()), [], {}, (), [[]], [[[one]]], {"a": {"b": {"c": one}}}, one * 1e-45,
        torch.cat([one] * 60), one.new_full(one.shape, -0.0), torch.quantize_per_tensor(
            one, 0.1, 0, torch.qint8), [one, one[:, :31]], {"0": one, "00": one}, one.conj(),
    ])  # fmt: skip
    options = {
        "layout.axes": ["features", "positions,features", "prompts,layers,positions,features",
                        '["features","features"]', '["x"]', "[]"],
        "layout.depths": ["[2]", "[1,2]", "[-1]", "[99]", "[]", "2"],
        "layout.lengths": ["[4,4]", "[0]", "[10000000000000000000]", "[1]"],
        "layout.padding": ["left", "right", "both"],
        "layout.dtype": ["bfloat16", "float16", "float8_e4m3fn", "int8"],
        "known_prefix": ["The", "[1,2]", "[-1]", "[999999999999999999999]", "''", "null"],
        "first_position": ["0", "1", "-1", "1000000000000", "128"],
        "scale": ["0", "-1", "nan", "inf", "1e-300", "1e300"], "centred": ["true", "x"],
        "noise": ["-1", "nan", "1e300", "0.1"], "diagnose": ["false"],
        "noise_kind": ["laplace", "x"], "largest": ["0.5", "1e-9", "0", "nan", "2"],
    }  # fmt: skip
    chosen = draw.sample(sorted(options), draw.choice([0, 0, 1, 1, 2]))
    more = [f"--data.{name}={draw.choice(options[name])}" for name in chosen]
    if draw.random() < 0.15:
        more.append(f"--model.transformer.output={draw.choice(['keys_values', 'keys', 'x'])}")
    data = io.BytesIO()
    torch.save(held, data)
    place.write("t.pt", data.getvalue())
    return Case(_predict("t.pt", *more))


def archives(draw: random.Random, place: Place) -> Case:
    """Files of tensors whose container lies: bombs, paths, pickles, lengths, other formats."""
    one = np.ones((4, 32), np.float32)
    how = draw.randrange(10)
    name, data = draw.choice(["t.npz", "t.pt", "t.npy", "t.safetensors", "t.bin", "t"]), b""
    if how < 5:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            names = ["a.npy", "../../a.npy", "/a.npy", "archive/data.pkl", "data.pkl", "a\\b.npy"]
            entry = draw.choice([*names, "é.npy", ".npy", "a.txt", "archive/data/0"])
            array = io.BytesIO()
            if how == 0:  # a bomb: its length is a lie or its zeros are many
                array.write(bytes(draw.choice([10**6, 10**8])))
            elif how == 1:
                pickle.dump(Runs(), array)
            elif how == 2:
                shape = draw.choice(["(10000000000,)", "(-1,)", "(2, 4,", "()", "(0, 32)"])
                header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n"
                array.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
            else:
                np.save(array, draw.choice([one, one.astype("<f2"), one.astype(">f8"), one[:0]]))
            archive.writestr(entry, array.getvalue())
            if how == 4:
                archive.writestr(entry.replace("a", "b"), array.getvalue()[:90])
        data = buffer.getvalue()
    elif how == 5:
        buffer = io.BytesIO()
        np.save(buffer, draw.choice([
            np.array([Runs()], object), np.array(["a"]), np.zeros(3, "M8[s]"),
            np.zeros(3, [("a", "f4")]), one.astype(complex), np.longdouble(one), one.astype(bool),
        ]), allow_pickle=True)  # fmt: skip
        data = buffer.getvalue()
    elif how == 6:
        data = pickle.dumps(draw.choice([Runs(), {"a": one}, [1] * 1000]))
    elif how == 7:
        buffer = io.BytesIO()
        torch.save(draw.choice([Runs(), {"a": Runs()}, torch.nn.Linear(2, 2)]), buffer)
        data = buffer.getvalue()
    else:
        header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
        data = struct.pack("<Q", len(header)) + header.encode()
    if draw.random() < 0.2:
        data = hostile.contents(draw, data)
    folder = draw.random() < 0.25
    place.write(f"d/{name}" if folder else name, data)
    if folder and draw.random() < 0.6:
        hostile.in_place_of(draw, place.folder / "d" / draw.choice(["b.npy", "c.pt", "x", name]))
    return Case(_predict("d" if folder else name))


def cache_folders(draw: random.Random, place: Place) -> Case:
    """A cache with what nobody put there, listed, cleared or used."""
    cache = place.folder / "cache"
    shutil.copytree(place.base / "cache", cache)
    for number in range(draw.randint(1, 3)):
        at = cache / draw.choice(["", "measured", f"new-{number}"])
        at.mkdir(exist_ok=True)
        name = f"{number}" + draw.choice(["x", "-a.safetensors", "\x1b[31m-x.safetensors", ".lock"])
        if draw.random() < 0.5:
            hostile.in_place_of(draw, at / name)
        elif draw.random() < 0.5:
            (at / name).symlink_to(place.base)  # clearing must not follow it
        else:
            about = json.dumps({"about": hostile.json_text(draw, {"model": "x"}).decode("latin-1")})
            save_file({"a": torch.zeros(1)}, at / name, {"about": about})
    if draw.random() < 0.3:
        return Case(["predict", "--prompts=prompts.txt", "--depth=2", *ON], True,
                    lambda _: _recovered(place))  # fmt: skip
    return Case(
        ["cache", *draw.choice([[], ["list"], ["clear"], ["clear", "--models=true"]])], True
    )


def model_extras(draw: random.Random, place: Place) -> Case:
    """What lies beside a model's weights and configuration, and asks for more than these."""
    place.copy("model", "m")
    folder = place.folder / "m"
    config = json.loads((folder / "config.json").read_text())
    how = draw.randrange(8)
    if how == 0:
        config["quantization_config"] = draw.choice([
            {"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes"}, {"a": 1}, 3,
            {"quant_method": "awq"}, {"quant_method": "compressed-tensors"}, "x",
            {"quant_method": "fp8"},
        ])  # fmt: skip
    elif how == 1:
        name = draw.choice(["num_hidden_layers", "vocab_size", "hidden_size", "head_dim",
                            "num_attention_heads", "intermediate_size", "num_key_value_heads",
                            "max_position_embeddings"])  # fmt: skip
        config[name] = draw.choice([0, -1, 1, 10**5, 10**9, 2**63, 1e300, "4", [4], None, True])
    elif how == 2:
        config |= draw.choice([
            {"layer_types": ["x"] * 4}, {"layer_types": ["full_attention"] * 10**5},
            {"rope_scaling": {"type": "yarn"}}, {"rope_parameters": {"rope_type": "x"}},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 1e300}}, {"torch_dtype": "int8"},
            {"hidden_act": "__import__"}, {"text_config": {"model_type": "gpt2"}},
            {"dtype": "float64"}, {"tie_word_embeddings": True}, {"is_encoder_decoder": True},
            {"sliding_window": -5}, {"attn_implementation": "flash_attention_2"},
            {"_attn_implementation": "x"}, {"num_labels": 10**8}, {"id2label": {"0": "a"}},
            {"pad_token_id": 10**6}, {"bos_token_id": "x"}, {"num_local_experts": 10**9},
        ])  # fmt: skip
    elif how == 3:
        name = draw.choice(["generation_config.json", "special_tokens_map.json", "vocab.json",
                            "added_tokens.json", "adapter_config.json", "chat_template.jinja",
                            "preprocessor_config.json", "merges.txt",
                            "tokenizer.model"])  # fmt: skip
        place.write(
            f"m/{name}", hostile.json_text(draw, {"base_model_name_or_path": "x", "a": [1]})
        )
    elif how == 4:
        (folder / "model.safetensors").unlink()
        place.write("m/pytorch_model.bin", pickle.dumps(Runs()))
        if draw.random() < 0.5:
            torch.save({"model.embed_tokens.weight": Runs()}, folder / "pytorch_model.bin")
    elif how == 5:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        settings |= draw.choice([
            {"model_max_length": draw.choice(hostile.VALUES)}, {"add_bos_token": "x"},
            {"tokenizer_class": draw.choice(["X", "BertTokenizer", "os.system", 3])},
            {"auto_map": {"AutoTokenizer": ["code.T", None]}}, {"padding_side": "x"},
            {"extra_special_tokens": draw.choice(hostile.VALUES)}, {"eos_token": {"a": 1}},
            {"added_tokens_decoder": draw.choice([{"x": 1}, {"10000000000": {"content": "a"}}])},
        ])  # fmt: skip
        place.write("m/code.py", b"open('ran', 'w')\n")
        path.write_bytes(hostile.dumped(settings))
    elif how == 6:
        state = load_file(folder / "model.safetensors")
        name = draw.choice(sorted(state))
        state[name] = draw.choice([
            state[name].double(), state[name] * float("inf"), state[name].to(torch.int8),
            torch.zeros(0), state[name][None], state[name] * 0, state[name] * 1e38,
            state[name].to(torch.float8_e4m3fn),
        ])  # fmt: skip
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        hostile.in_place_of(draw, folder / draw.choice(["x.safetensors", "model.safetensors", "y"]))
    (folder / "config.json").write_bytes(hostile.dumped(config))
    if draw.random() < 0.4:
        args = ["predict", "--prompts=prompts.txt", "--model=m", "--trainer.accelerator=cpu"]
        return Case(args, check=lambda _: _recovered(place))
    return Case(_capture_with("m"), check=lambda _: _as_transformers(place))


def runs(draw: random.Random, place: Place) -> Case:
    """Options of a short fit or predict that is run, not only checked; folders that are odd."""
    option = draw.choice(hostile_cases.OPTIONS["sweep"].split())
    if option in ("over", "seeds", "processes", "join", "config"):
        option = draw.choice(
            ["trainer.num_nodes", "trainer.accelerator", "display.every", "model.seed"]
        )
    value = draw.choice([0, -1, 1, 2, 1.5, 10**9, 10**30, 1e300, "nan", "null", "[]", "{}", "''",
                         "true", "L1", "[1,2]", "x", "../x", "\x1b[31m"])  # fmt: skip
    long = {"model.transformer.depth": "depth"}.get(option, option)
    args = [draw.choice(["fit", "predict"]), "--prompts=prompts.txt", "--model=model", "--depth=2",
            "--model.iterations=3", "--trainer.accelerator=cpu"]  # fmt: skip
    args = [one for one in args if not one.startswith(f"--{long}=")]
    if option == "data.targets":
        args.remove("--prompts=prompts.txt")
    if draw.random() < 0.15:
        hostile.in_place_of(draw, place.folder / "lightning_logs")
    return Case([*args, f"--{option}={value}"])


KINDS: dict[Callable[[random.Random, Place], Case], int] = {
    **hostile_cases.KINDS,
    layouts: 400, archives: 250, cache_folders: 100, model_extras: 300, runs: 300,
}  # fmt: skip
"""Each kind, and how many cases of it the whole series has."""
