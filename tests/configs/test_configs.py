"""Every config is parsed by the real command line, and run for a few iterations on a tiny model."""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_inversion.__main__ import main
from lightning_inversion.cli.lightning import InversionCLI
from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.module import InputInversion
from lightning_inversion.replication.claims import SourceExperiment, read_experiments

pytestmark = pytest.mark.usefixtures("shared_parsers")

CONFIGS = Path(__file__).parents[2] / "configs"
ORIGINAL = CONFIGS / "original"
FITS = [CONFIGS / "quickstart.yaml", *sorted(ORIGINAL.glob("*.yaml"))]
FITS.remove(ORIGINAL / "experiments.yaml")
MODELS = sorted((ORIGINAL / "models").glob("*.yaml"))
POLICIES = sorted((CONFIGS / "recovery").glob("*.yaml"))
EXPERIMENTS = read_experiments(ORIGINAL)


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


@cache
def parser(command: str) -> argparse.ArgumentParser:
    """A command's own parser: the one above it would parse everything twice."""
    return ParsedOnly([command, f"--config={CONFIGS / 'quickstart.yaml'}"])._parser(command)


def parse(*arguments: str, command: str = "fit") -> Any:
    return parser(command).parse_args(arguments)


def test_every_yaml_is_in_one_of_the_lists() -> None:
    ladder = CONFIGS / "ladder" / "ladder.yaml"  # a plan, read by its own test
    known = {*FITS, *MODELS, *POLICIES, ORIGINAL / "experiments.yaml", ladder}
    assert known == {*CONFIGS.rglob("*.yaml")}
    assert {one.base for one in EXPERIMENTS} <= {path.stem for path in FITS}
    assert {one.source_model for one in EXPERIMENTS} - {None} <= {path.stem for path in MODELS}


@pytest.mark.integration  # the command line is parsed for each
@pytest.mark.parametrize("overlay", MODELS, ids=lambda path: path.stem)
def test_a_source_model_is_an_overlay(overlay: Path) -> None:
    base = ORIGINAL / "indirect.yaml"
    config = parse(f"--config={base}", f"--config={overlay}").model
    assert config.transformer.model.rpartition("/")[2] == overlay.stem.removesuffix("-untrained")
    assert (config.transformer.depth, config.decoder.class_path.rpartition(".")[2]) == (
        1, "PinvDecoder",
    )  # fmt: skip


@pytest.mark.integration  # the command line is parsed for each
@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_a_policy_is_a_config_of_predict(path: Path) -> None:
    recovery = parse(f"--config={path}", command="predict").model.recovery
    assert (
        recovery.class_path == yaml.safe_load(path.read_text())["model"]["recovery"]["class_path"]
    )


def value_at(config: Any, key: str) -> Any:
    for word in key.split("."):
        config = config[word] if word in config else config.init_args[word]
    return config


@pytest.mark.integration  # a parse each
def test_every_experiment_is_parsed_with_the_source_model() -> None:
    for experiment in EXPERIMENTS:
        arguments = experiment.arguments(ORIGINAL)
        if experiment.source_model is not None:
            arguments.append(f"--config={ORIGINAL / 'models' / experiment.source_model}.yaml")
        config = parse(*arguments)
        for key, value in experiment.overrides.items():
            if not isinstance(value, dict | str):  # of a class, or its name
                assert value_at(config, key) == value
        assert config.data.tokenizer == config.model.transformer.model
        assert len(config.data.prompts) >= 5, experiment.name


@pytest.fixture
def fit(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Options of ``fit`` -> its rows on the tiny model, and its module."""

    def run(*arguments: str, iterations: int = 2) -> tuple[list[dict[str, Any]], InputInversion]:
        modules: list[InputInversion] = []
        weights: dict[str, torch.Tensor] = {}
        began = InputInversion.on_train_batch_start

        def begin(self: InputInversion, batch: PromptBatch, batch_idx: int) -> int | None:
            if not modules:
                modules.append(self)
                weights.update(
                    (name, kept.clone()) for name, kept in self.frozen.state_dict().items()
                )
            return began(self, batch, batch_idx)

        monkeypatch.setattr(InputInversion, "on_train_batch_start", begin)
        code = main(["fit", *arguments,
            f"--model.transformer.model={tiny_folder}",
            '--data.prompts=["The sky is blue.", "A fox"]',
            f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu",
            "--trainer.logger=false", "--checkpoint.every=1000", "--decoding.show=false",
            "--data.tokens_per_batch=100",  # auto would measure the machine
            f"--model.iterations={iterations}",
        ])  # fmt: skip
        assert code == 0
        (module,) = modules
        for name, value in module.frozen.state_dict().items():
            assert torch.equal(value, weights[name]), name
        learning = [name for name, value in module.named_parameters() if value.requires_grad]
        assert learning == ["state.values"]
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], module

    return run


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            path, id=path.stem, marks=() if path.stem == "recommended" else pytest.mark.integration
        )
        for path in FITS
    ],
)
def test_a_config_runs(config: Path, fit: Callable[..., Any]) -> None:
    rows, module = fit(f"--config={config}", "--model.transformer.depth=1")  # the tiny model has 4
    assert [len(row["recovered_ids"]) for row in rows] == [len(row["ids"]) for row in rows]
    assert len(rows) == 2
    assert module.frozen.depth == 1


VALUES_ALONE = {
    "model.optimizer.lr", "learning_rate.end", "model.iterations", "data.prompts",
    "model.transformer.depth", "model.transformer.features", "model.transformer.model",
    "model.transformer.quantization",
}  # fmt: skip
"""Overrides whose value does not change which code runs, or which the tiny model cannot take."""


def kinds() -> Iterator[SourceExperiment]:
    """Experiments of which no two differ in values alone."""
    seen = set()
    for one in EXPERIMENTS:
        changed = {key: value for key, value in one.overrides.items() if key not in VALUES_ALONE}
        kind = json.dumps([one.base, {**changed, "model.transformer.weights": ""}], sort_keys=True)
        if changed and kind not in seen:
            seen.add(kind)
            yield SourceExperiment(one.name, "", one.base, "", overrides=changed)


@pytest.mark.integration  # a second each
@pytest.mark.parametrize("experiment", [*kinds()], ids=lambda one: one.name)
def test_an_experiment_runs(experiment: SourceExperiment, fit: Callable[..., Any]) -> None:
    arguments, iterations = experiment.arguments(ORIGINAL), 2
    if experiment.name.startswith("sequential-prefix"):
        arguments, iterations = [*arguments, "--model.schedule.init_args.iterations=1"], 20
    rows, module = fit(*arguments, iterations=iterations)
    assert len(rows) == 2 * experiment.overrides.get("data.repeat", 1)
    assert all(len(row["recovered_ids"]) == len(row["ids"]) for row in rows)
    layers = experiment.overrides.get("model.transformer.layers", [1])
    assert module.frozen.depth == layers[-1]
