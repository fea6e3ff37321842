"""Every config: parsed with the document's own models, run for a few iterations on a tiny one."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_inversion.__main__ import main as run
from lightning_inversion.cli.lightning import InversionCLI
from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.module import InputInversion
from lightning_inversion.replication.claims import read_claims

pytestmark = pytest.mark.usefixtures("shared_measurements", "shared_parsers")

CONFIGS = Path(__file__).parents[2] / "configs"
OVERLAYS = sorted((CONFIGS / "document_models").glob("*.yaml"))
POLICIES = sorted((CONFIGS / "recovery").glob("*.yaml"))
EXPERIMENTS = sorted({*CONFIGS.rglob("*.yaml")} - {*OVERLAYS, *POLICIES, CONFIGS / "claims.yaml"})
CLAIMS = read_claims(CONFIGS)
OTHERS = {b for a, b in pairwise(EXPERIMENTS) if a.parent == b.parent != CONFIGS}
"""All but the first of each folder, whose settings are much like that one's."""


def short(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


class ParsedOnly(InversionCLI):
    """The real parser; nothing is instantiated, so that no model's files are asked for."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def after_instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(scope="module")
def parse() -> Callable[..., Any]:
    """Arguments of ``fit`` -> the parsed config.

    The parser is built once, and the command's own: the one above it would parse everything twice.
    """
    parser = ParsedOnly(["fit", f"--config={CONFIGS / 'indirect/l1.yaml'}"])._parser("fit")
    return lambda *arguments: parser.parse_args(arguments)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=short)
def test_every_overlay_names_a_model_of_the_document(overlay: Path, parse) -> None:
    config = parse(f"--config={CONFIGS / 'indirect/l1.yaml'}", f"--config={overlay}")
    parsed = config.model.transformer
    assert parsed.model in {
        "gpt2",
        "gpt2-xl",
        "EleutherAI/gpt-j-6b",
        "huggyllama/llama-7b",
        "huggyllama/llama-13b",
        "huggyllama/llama-30b",
    }
    assert parsed.depth == 1  # the experiment's own keys stay


@pytest.mark.parametrize("experiment", CLAIMS, ids=lambda experiment: experiment.name)
def test_every_row_of_the_table_is_parsed_with_the_documents_model(experiment, parse) -> None:
    own = experiment.options.get("model.transformer.model")
    assert own is None or own.startswith("lightning_logs/stand_ins/")
    options = {k: v for k, v in experiment.options.items() if k != "model.transformer.model"}
    arguments = [f"--config={CONFIGS / experiment.config}"]
    if experiment.document_model is not None:
        arguments.append(f"--config={CONFIGS / 'document_models' / experiment.document_model}.yaml")
    arguments += [f"--{key}={_text(value)}" for key, value in options.items()]
    parsed = parse(*arguments)
    assert parsed.data.tokenizer == parsed.model.transformer.model
    settings = yaml.safe_load((CONFIGS / experiment.config).read_text())
    assert len(settings["data"]["prompts"]) >= 5
    assert experiment.section


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(path, marks=[pytest.mark.integration] if path in OTHERS else [])
        for path in EXPERIMENTS
    ],
    ids=short,
)
def test_every_config_runs_on_a_stand_in(
    config: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[InputInversion] = []
    weights: dict[str, torch.Tensor] = {}
    began = InputInversion.begin

    def begin(self: InputInversion, batch: PromptBatch) -> None:
        seen.append(self)
        weights.update((name, value.clone()) for name, value in self.frozen.state_dict().items())
        began(self, batch)

    monkeypatch.setattr(InputInversion, "begin", begin)
    settings = yaml.safe_load(config.read_text())
    arguments = [
        "fit",
        f"--config={config}",
        f"--model.transformer.model={tiny_folder}",
        '--data.prompts=["The sky is blue.", "A fox"]',
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--data.tokens_per_batch=100",  # nothing to count before
        "--decoding.show=false",
        "--checkpoint.every=1000",
    ]
    if "position_by_position" in settings:
        arguments += ["--position_by_position.iterations=1", "--model.iterations=20"]
    else:
        arguments.append("--model.iterations=2")
    assert run(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * settings.get("data", {}).get("repeat", 1)
    for row in rows:
        assert len(row["recovered_ids"]) == len(row["ids"])
    (module,) = seen
    spec = settings["model"]["transformer"]
    depth = spec.get("layers", [spec.get("depth", 1)])[-1]
    assert module.frozen.depth == depth
    assert module.target.shape[:2] == module.learnable.values.shape[:2]
    learning = [name for name, value in module.named_parameters() if value.requires_grad]
    assert learning == ["learnable.values"]
    assert weights
    for name, value in module.frozen.state_dict().items():
        assert torch.equal(value, weights[name]), name


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
