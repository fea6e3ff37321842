"""Parts from outside the package are selected by their class_path."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from torch.nn.functional import cosine_similarity

from lightning_inversion.__main__ import main as run
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.surgery import FAMILIES
from tests.tiny import save_tiny, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("shared_parsers")


@pytest.fixture(scope="module")
def parts() -> Iterator[ModuleType]:
    """The parts, which a class_path imports."""
    yield importlib.import_module("tests.own_parts")
    FAMILIES.pop("my_llama")


def fit(folder: Path, root: Path, *more: str) -> tuple[list[dict], dict]:
    arguments = [
        "fit", f"--model.transformer.model={folder}", '--data.prompts=["The sky is blue."]',
        "--model.iterations=3", "--data.tokens_per_batch=100",
        f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu", *more,
    ]  # fmt: skip
    assert run(arguments) == 0
    made = root / "lightning_logs" / "version_0"
    rows = [json.loads(line) for line in (made / "results.jsonl").read_text().splitlines()]
    return rows, yaml.safe_load((made / "config.yaml").read_text())


@pytest.mark.integration  # a whole run
def test_an_objective(parts: ModuleType, tiny_folder: Path, tmp_path: Path) -> None:
    (row,), config = fit(
        tiny_folder,
        tmp_path,
        "--model.objective=tests.own_parts.Huber",
        "--model.objective.delta=0.5",
    )
    assert row["objective"] == "Huber"
    written = {"class_path": "tests.own_parts.Huber", "init_args": {"delta": 0.5}}
    assert config["model"]["objective"] == written
    huber = parts.Huber(delta=1.0)
    generated = torch.tensor([[[0.5, 3.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, False]])
    assert huber(generated, torch.zeros(1, 2, 2), mask).tolist() == [0.125 + 2.5]


def test_a_decoder(parts: ModuleType, tiny_folder: Path, tmp_path: Path) -> None:
    (row,), config = fit(
        tiny_folder, tmp_path, "--model.decoder=tests.own_parts.CentredCosineDecoder"
    )
    assert row["decoder"] == "CentredCosineDecoder"
    assert config["model"]["decoder"]["class_path"] == "tests.own_parts.CentredCosineDecoder"
    embedding = TransformerSpec(model=str(tiny_folder)).load().embedding
    vectors = embedding(torch.tensor([[5, 77]]))[0] + 0.1
    scores = parts.CentredCosineDecoder()(vectors, embedding)
    mean = embedding.matrix.mean(0)
    expected = cosine_similarity(vectors[:, None] - mean, embedding.matrix[None] - mean, dim=-1)
    assert torch.allclose(scores / (vectors - mean).norm(dim=1, keepdim=True), expected, atol=1e-5)
    assert scores.argmax(-1).tolist() == [5, 77]


def predict(folder: Path, root: Path, *options: str) -> dict:
    arguments = [
        "predict", f"--model.transformer.model={folder}", "--model.transformer.depth=2",
        '--data.prompts=["The sky is blue."]', "--data.tokens_per_batch=100",
        f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu", *options,
    ]  # fmt: skip
    assert run(arguments) == 0
    (line,) = (root / "lightning_logs/version_0/results.jsonl").read_text().splitlines()
    row: dict = json.loads(line)
    assert row["recovered"] == "The sky is blue."
    assert row["verified"]
    return row


@pytest.mark.integration  # three runs
def test_a_proposer(parts: ModuleType, tiny_folder: Path, tmp_path: Path) -> None:
    option = "--model.recovery.proposer=tests.own_parts.SuspectedText"
    likely, unlikely = (
        predict(tiny_folder, tmp_path / name, option, f"--model.recovery.proposer.text={text}")
        for name, text in (("likely", "The sky is red or blue."), ("unlikely", "x"))
    )
    assert set(likely["proposers"][1:]) == {"SuspectedText"}
    first_two_rounds = 4 + 16
    assert max(likely["candidates"][1:]) <= first_two_rounds
    assert max(unlikely["candidates"][1:]) > first_two_rounds
    mixture = {
        "class_path": "Mixture",
        "init_args": {
            "proposers": [
                {"class_path": "ProbeProposer"},
                {"class_path": "tests.own_parts.SuspectedText", "init_args": {"text": "sky"}},
            ]
        },
    }
    policy = {"class_path": "TokenRecovery", "init_args": {"proposer": mixture}}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"model": {"recovery": policy}}))
    row = predict(tiny_folder, tmp_path / "mixed", f"--config={tmp_path / 'mixture.yaml'}")
    assert row["policy"] == "TokenRecovery(ProbeProposer+SuspectedText)"


def test_a_model_family(parts: ModuleType, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "mine", save_tiny(tmp_path / "llama")
    TransformerSpec(model=str(theirs)).load_causal_lm()[0].save_pretrained(ours)
    tiny_tokenizer().save_pretrained(ours)
    config = json.loads((ours / "config.json").read_text())
    config.update(model_type="my_llama", architectures=["MyForCausalLM"])
    (ours / "config.json").write_text(json.dumps(config))
    ids = torch.tensor([[3, 4, 5]])
    for surgery in ({}, {"mlp": False}, {"norms": False}, {"residuals": False}):
        ours_cut = TransformerSpec(model=str(ours), depth=2, **surgery).load()
        theirs_cut = TransformerSpec(model=str(theirs), depth=2, **surgery).load()
        assert type(ours_cut.model.config).__name__ == "MyConfig"
        assert torch.equal(ours_cut.features_of(ids), theirs_cut.features_of(ids))
    (row,), _ = fit(
        ours, tmp_path, "--model.objective=tests.own_parts.Huber", "--model.transformer.mlp=false"
    )
    assert row["mlp"] is False
