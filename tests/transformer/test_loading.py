"""From a spec, as a YAML file holds it, to the model."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config

from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.errors import InputError
from lightning_inversion.transformer import TransformerSpec, TruncatedTransformer
from tests.test_fuzz import RAN, Runs
from tests.tiny import (
    BLOCKS,
    CONFIGS,
    FAMILIES,
    each,
    save_tiny,
    shared_tiny_model,
    tiny_model,
    tiny_tokenizer,
)

IDS = torch.tensor([[5, 9, 77, 120, 33], [4, 3, 2, 1, 6]])


@each(FAMILIES)
def test_a_loaded_model_is_the_one_in_memory(family: str, tmp_path: Path) -> None:
    transformer = TransformerSpec(model=str(save_tiny(tmp_path, family)), depth=2).load()
    memory = TruncatedTransformer.from_model(shared_tiny_model(family, "eager"), depth=2)
    torch.testing.assert_close(transformer.features_of(IDS), memory.features_of(IDS))
    assert transformer.fingerprint == memory.fingerprint


def test_only_the_kept_blocks_are_in_memory(tiny_folder: Path) -> None:
    one = TransformerSpec(model=str(tiny_folder), depth=1).load()
    whole = TransformerSpec(model=str(tiny_folder), depth=None).load()
    assert whole.depth == BLOCKS

    def size(transformer: TruncatedTransformer) -> int:
        return sum(parameter.numel() for parameter in transformer.parameters())

    block = sum(p.numel() for p in tiny_model("llama").base_model.layers[0].parameters())
    assert size(whole) - size(one) == (BLOCKS - 1) * block
    norm = 32
    assert size(one) == block + norm  # the embedding is a buffer, the head is not there


def test_loading_is_silent(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    TransformerSpec(model=str(tiny_folder), depth=1).load()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_the_tokenizer_round_trips(tiny_folder: Path) -> None:
    tokenizer = TransformerSpec(model=str(tiny_folder)).load_tokenizer()
    text = "Grüße, the sky is blue — 12 times.\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_whole_model_with_its_head(tiny_folder: Path) -> None:
    model, tokenizer = TransformerSpec(model=str(tiny_folder), depth=1).load_causal_lm()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_model("llama")(IDS).logits)
    assert len(tokenizer) == model.config.vocab_size
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_config_counts_all_blocks(tiny_folder: Path) -> None:
    assert TransformerSpec(model=str(tiny_folder)).config().num_hidden_layers == BLOCKS


def untrained(folder: Path, depth: int, seed: int = 0) -> TruncatedTransformer:
    return TransformerSpec(
        model=str(folder), depth=depth, weights="untrained", weights_seed=seed
    ).load()


def test_untrained_weights_depend_on_their_seed_alone(tiny_folder: Path) -> None:
    torch.manual_seed(1)
    one = untrained(tiny_folder, 2).features_of(IDS)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = untrained(tiny_folder, 2).features_of(IDS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert not torch.equal(one, untrained(tiny_folder, 2, seed=1).features_of(IDS))
    assert not torch.equal(
        one, TransformerSpec(model=str(tiny_folder), depth=2).load().features_of(IDS)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_untrained_blocks_do_not_depend_on_the_depth(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, family)
    two = TransformerSpec(model=str(folder), layers=[1, 2], depth=None, weights="untrained").load()
    one = untrained(folder, 1)
    assert torch.equal(two.features_of(IDS)[..., :32], one.features_of(IDS))
    model, _ = TransformerSpec(model=str(folder), weights="untrained").load_causal_lm()
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states[1]
    assert torch.equal(hidden, one.features_of(IDS))


def test_loading_trained_weights_leaves_the_generator(tiny_folder: Path) -> None:
    state = torch.get_rng_state()
    TransformerSpec(model=str(tiny_folder)).load()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_language_part_of_a_model_that_sees(tmp_path: Path) -> None:
    text = CONFIGS["gemma3_text"]().to_dict()
    vision = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "intermediate_size": 64, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states[2]
    transformer = TransformerSpec(model=str(tmp_path), depth=2).load()
    assert torch.equal(transformer.features_of(IDS), expected)


def test_a_device_map(tiny_folder: Path) -> None:
    mapped = TransformerSpec(model=str(tiny_folder), device_map="cpu").load()
    assert torch.equal(
        mapped.features_of(IDS), TransformerSpec(model=str(tiny_folder)).load().features_of(IDS)
    )


def test_attention_without_sdpa_is_eager(tmp_path: Path) -> None:
    transformer = TransformerSpec(model=str(save_tiny(tmp_path, "gptj"))).load()
    assert transformer.description["attention"] == "eager"


def test_the_spec_is_plain(tiny_folder: Path) -> None:
    spec = TransformerSpec(model=str(tiny_folder), layers=[1, 3], depth=3)
    assert TransformerSpec(**asdict(spec)) == spec


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"depth": 0}, "depth"),
        ({"layers": [1, 2], "depth": 3}, "depth"),
        ({"layers": [2, 2]}, "layers"),
        ({"features": "5"}, "features"),
        ({"revision": "main"}, "revision"),
        ({"weights": "untrained", "device_map": "auto"}, "device_map"),
        ({"quantization": "int8", "dtype": "float16"}, "quantization"),
        ({"quantization": "nf4", "weights": "untrained"}, "quantization"),
        ({"dtype": "float64"}, "dtype"),
        ({"weights": "random"}, "weights"),
    ],
)
def test_wrong_options_fail_before_anything_is_loaded(
    tiny_folder: Path, options: dict[str, object], option: str
) -> None:
    with pytest.raises(InputError, match=rf"--model\.transformer\.{option}:"):
        TransformerSpec(model=str(tiny_folder), **options)  # type: ignore[arg-type]


def test_a_depth_beyond_the_model(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=r"depth: 9 blocks were asked for and the model has 4"):
        TransformerSpec(model=str(tiny_folder), depth=9).load()


def test_missing_weights_are_never_drawn_at_random(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 weights"):
        TransformerSpec(model=str(folder)).load()


def test_a_damaged_file_is_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="could not be loaded"):
        TransformerSpec(model=str(folder)).load()


@pytest.mark.parametrize(
    ("file", "key", "value", "reason"),
    [
        ("config.json", "num_hidden_layers", 2**63, "at most 4096 can be built"),
        ("config.json", "text_config", {"num_experts": 10**9}, "at most 4096 can be built"),
        ("config.json", "num_hidden_layers", -3, "at most 4096 can be built"),
        ("config.json", "hidden_act", "__import__", "could not be loaded"),
        ("config.json", "text_config", {"model_type": "x"}, "a part that is dict"),
        ("config.json", "num_attention_heads", 0, "could not be loaded"),
        ("tokenizer_config.json", "model_max_length", "x", "could not be loaded"),
    ],
)
def test_a_setting_that_no_model_can_have_is_one_sentence(
    file: str, key: str, value: Any, reason: str, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**settings, key: value}))
    with pytest.raises(InputError, match=reason):
        TransformerSpec(model=str(tmp_path), depth=1).load()
    with pytest.raises(InputError, match=r"could not be loaded|can be built|a part that is dict"):
        TransformerSpec(model=str(tmp_path), depth=1, weights="untrained").load()


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 33), ("quantization_config", {"quant_method": "gptq"})]
)
def test_a_setting_that_does_not_fit_the_weights_is_one_sentence(
    key: str, value: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, key: value}))
    with pytest.raises(InputError, match=r"could not be loaded|lacks 38 weights"):
        TransformerSpec(model=str(tmp_path), depth=1).load()


def test_a_pickle_among_the_weights_runs_no_code(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(InputError, match="could not be loaded"):
        TransformerSpec(model=str(tmp_path)).load()
    assert not RAN.exists()


@pytest.mark.parametrize("config", ["null", "[]", "{}", "3", '{"model_type": "llama"'])
def test_a_configuration_of_nothing_is_one_sentence(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="could not be loaded"):
        TransformerSpec(model=str(tmp_path)).load()


@pytest.mark.parametrize("depth", [1, None])
@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size"])
def test_weights_of_another_shape_are_never_drawn_at_random(
    key: str, depth: int | None, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings[key] += 8
    (tmp_path / "config.json").write_text(json.dumps(settings))
    spec = TransformerSpec(model=str(tmp_path), depth=depth)
    for load in (spec.load, spec.load_with_head):
        with pytest.raises(InputError, match=r"stores \S+ in shape .* correct its config"):
            load()


def test_an_adapter_is_not_left_out_silently(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="holds an adapter of a model; merge it"):
        TransformerSpec(model=str(tmp_path)).load()


def test_a_model_of_images_has_no_vocabulary(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="a model of type vit has no vocabulary"):
        PromptDataModule(["The sky"], tokenizer=str(tmp_path)).setup()


def test_a_hub_id_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"--model\.transformer\.model: 'nobody/nothing'"):
        TransformerSpec(model="nobody/nothing").load()


def test_memory_models_of_a_real_class_are_accepted(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert TruncatedTransformer.from_model(model.base_model, depth=1).depth == 1


def test_code_in_a_models_folder_is_never_run(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": "own.T",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    transformer = TransformerSpec(model=str(tmp_path), depth=1).load()  # the class of transformers
    assert transformer.depth == 1
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    with pytest.raises(InputError, match="could not be loaded"):
        TransformerSpec(model=str(tmp_path), depth=1).load()
    assert not (tmp_path / "ran").exists()
