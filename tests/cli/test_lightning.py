"""The real entry point in process: wrong use, configs, a run, a resumed run, a stored input."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from lightning_inversion.__main__ import main as run
from lightning_inversion.callbacks.stopping import StoppingCriterion
from lightning_inversion.cli.lightning import RECOMMENDED
from lightning_inversion.errors import InputError
from lightning_inversion.module import InputInversion
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.loading import TransformerSpec

pytestmark = pytest.mark.usefixtures("shared_parsers")


def fit(folder: Path, root: Path, *more: str) -> list[str]:
    return [
        "fit",
        f"--model.transformer.model={folder}",
        "--model.transformer.depth=2",
        '--data.prompts=["The sky is blue.", "A quick brown fox"]',
        "--data.tokens_per_batch=100",
        f"--trainer.default_root_dir={root}",
        "--trainer.accelerator=cpu",
        *more,
    ]


def rows_of(root: Path, version: int = 0) -> list[dict]:
    lines = (root / "lightning_logs" / f"version_{version}" / "results.jsonl").read_text()
    return [json.loads(line) for line in lines.splitlines()]


WRONG_USE = [
    (["--model.transformer.dept=3"], "did you mean --model.transformer.depth?"),
    (["--model.iterations=0"], "--model.iterations must be at least 1"),
    (["--model.transformer.dtype=int3"], "int3 is unknown; choose from float32, bfloat16"),
    (["--trainer.accelerator=foo"], "--trainer.accelerator: "),
    (["--model.optimizer.lr=null"], "--model.optimizer: '<=' not supported"),
    (["--trainer.default_root_dir=/proc/x"], "--trainer.default_root_dir '/proc/x' cannot"),
    (["--model.transformer.depth=99"], "99 blocks were asked for and the model has 4"),
    (["--model.objective=L3"], "unknown Objective 'L3'; choose from C"),
    (["--model.learnable=VocabularyInput"], "choose --model.schedule AllPositions"),
    (["--data.prompts=['']"], "--data.prompts, prompt 1 is empty"),
    (["--trainer.strategy=ddp", "--trainer.devices=2"], "DDPStrategy would average the inputs"),
    (["--trainer.precision=64-true"], "--trainer.precision: 64-true is not one of 32-true"),
    (["--ckpt_path=last"], "--ckpt_path last finds no run"),
    (["The sky", "--seed_everything=1"], "'The sky' belongs to no option; see"),
]
MORE_WRONG_USE = [
    (["--model.iteration=3"], "did you mean --model.iterations?"),
    (["--model.iterations=x"], "--model.iterations: x is not a whole number"),
    (["--model.recovery=SIPIT", "--model.recovery.budget=x"], "--model.recovery.budget: x is"),
    (["--model.transformer.depth=x"], "depth: x is not a whole number or null"),
    (["--data.tokens_per_batch=x"], "tokens_per_batch: x is not a whole number or auto"),
    (["--nothing_like_it=1"], "see lightning-inversion fit --help"),
    (["--results.file=rows.jsonl"], "unknown option --results.file"),
    (["--results.top_k=0"], "--results.top_k must be at least 1, and is 0"),
    (["--seed_everything=-1"], "--seed_everything must be between 0 and 4294967295"),
    (["--trainer.devices=0"], "--trainer.devices: "),
    (["--trainer.devices=null"], "--trainer.devices: "),
    (["--model.optimizer.lr=-1"], "--model.optimizer: Invalid learning rate: -1.0"),
    (["--model.recovery.budget=-3"], "--model.recovery: candidates, max_candidates and budget"),
    ([f"--trainer.default_root_dir={__file__}"], "is a file; give a folder"),
    (["--model.transformer.depth=0"], "--model.transformer.depth"),
    (["--model.decoder=Pin"], "unknown Decoder 'Pin'; choose from C"),
    (["--data.batch_size=0"], "--data.batch_size must be at least 1"),
    ([f"--data.file={__file__}"], "--data.prompts and --data.file were given"),
    (["--learning_rate.start=-1"], "learning_rate.start"),
    (["--model.schedule.window=0"], "--model.schedule: every, candidates and window"),
    (
        ["--trainer.precision=bf16-true", "--model.transformer.dtype=float16"],
        "--trainer.precision bf16-true contradicts --model.transformer.dtype float16",
    ),
    (
        ["--model.transformer.device_map=auto", "--trainer.devices=2"],
        "set --trainer.devices 1, or leave device_map out",
    ),
    (["--config=none.yaml"], "none.yaml' does not exist"),
]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        *WRONG_USE,
        *(pytest.param(*case, marks=pytest.mark.integration) for case in MORE_WRONG_USE),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_use_ends_in_one_sentence_and_code_2(
    arguments, sentence, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(InputInversion, "begin", lambda *_: pytest.fail("a batch was begun"))
    assert run(fit(tiny_folder, tmp_path, *arguments)) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1, message
    assert not (tmp_path / "lightning_logs").exists()


def test_a_config_of_other_bytes_is_one_sentence(tmp_path: Path, capsys) -> None:
    config = tmp_path / "bytes.yaml"
    config.write_bytes(bytes(range(128, 256)))
    assert run(["fit", f"--config={config}"]) == 2
    message = capsys.readouterr().err
    assert "--config" in message
    assert message.count("\n") == 1, message


def test_a_list_longer_than_a_parser_can_take_is_one_sentence(capsys) -> None:
    assert run(["fit", f"--data.prompts={['a'] * 2001}"]) == 2
    message = capsys.readouterr().err
    assert "--data.prompts: it has more than 2000 values in a list; put them in a file" in message
    assert message.count("\n") == 1, message


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("The sky is blue.", "holds no options; give a file of YAML"),
        ("a: &a [*a]", "has an alias *a of nothing, or of itself; give a file of YAML"),
        ('trainer: {default_root_dir: "a\\0b"}', "has a NUL in it"),
        (f"data: {{prompts: {['a'] * 2001}}}", "more than 2000 values in a list"),
        ("results: {top_k: null}", "--results.top_k: None is not a whole number"),
        ("learning_rate: {start: null}", "--learning_rate.start: None is not a number"),
        ("trainer: {num_nodes: 1000000000}", "num_nodes is 1000000000, and at most 10000"),
        ("data: {noise: 1e300}", "--data.noise must be between 0 and 1e+15"),
        ("data: {largest: 0}", "--data.largest is a share of the features"),
        ("trainer: {devices: 1000000000}", "1000000000 processes are too many"),
    ],
)
def test_a_config_that_no_run_can_have_is_one_sentence(
    content: str, sentence: str, tiny_folder: Path, tmp_path: Path, capsys
) -> None:
    config = tmp_path / "odd.yaml"
    config.write_text(content)
    options = fit(tiny_folder, tmp_path, f"--config={config}")
    assert run([o for o in options if "default_root_dir" not in o]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1, message


@pytest.mark.parametrize(
    "option",
    [
        '--data.prompts=["The sky is blue.", "A quick brown dog"]',
        "--model.transformer.depth=1",
        "--model.optimizer.lr=0.5",
    ],
)
def test_rows_of_another_run_do_not_count_as_finished(
    option: str, tiny_folder: Path, fitted: Path, tmp_path: Path, capsys
) -> None:
    root = shutil.copytree(fitted, tmp_path / "moved")
    rows = (root / "lightning_logs" / "version_0" / "results.jsonl").read_bytes()
    same_place = [
        "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
        f"--trainer.logger.save_dir={root}",
        "--trainer.logger.version=0",
        "--data.batch_size=1",
        "--model.iterations=3",
    ]
    assert run(fit(tiny_folder, root, *same_place, option)) == 2
    assert "holds a row of another prompt" in capsys.readouterr().err
    assert (root / "lightning_logs" / "version_0" / "results.jsonl").read_bytes() == rows


@pytest.mark.parametrize("source", ["prompts", "file"])
def test_prompts_replace_those_of_a_config(
    source: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.txt").write_text("A quick dog\n")
    value = {"prompts": ["The sky"], "file": str(tmp_path / "some.txt")}[source]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {source: value}}))
    words = [word for word in fit(tiny_folder, tmp_path) if "--data.prompts" not in word]
    words += [f"--config={config}", "--print_config"]
    (tmp_path / "other.txt").write_text("A boat\n")
    assert run([*words[:-1], f"--prompts={tmp_path / 'other.txt'}", words[-1]]) == 0
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["file"] == str(tmp_path / "other.txt")
    assert data["prompts"] is data["targets"] is None


def test_a_missing_prompt_and_a_missing_checkpoint(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["fit", f"--model.transformer.model={tiny_folder}"]) == 2
    assert (
        "Give one of --data.prompts, --prompts, --targets; none was given"
        in capsys.readouterr().err
    )
    assert run(["validate", "--data.prompts=['a']"]) == 2
    assert "name it with --ckpt_path" in capsys.readouterr().err


def test_a_run_leaves_all_that_is_promised(tiny_folder: Path, tmp_path: Path, capsys) -> None:
    options = ["--model.iterations=40", "--seed_everything=3", "--data.tokens_per_batch=auto"]
    assert run(fit(tiny_folder, tmp_path, *options)) == 0
    folder = tmp_path / "lightning_logs" / "version_0"
    names = {path.name.split(".")[0] for path in folder.iterdir()}
    assert {"config", "results", "checkpoints", "events"} <= names
    rows = rows_of(tmp_path)
    assert [row["prompt"] for row in rows] == ["The sky is blue.", "A quick brown fox"]
    assert {row["seed"] for row in rows} == {3}
    assert all(row["schema"] == 4 and row["depth"] == 2 for row in rows)
    for row in rows:
        right = sum(a == b for a, b in zip(row["ids"], row["recovered_ids"], strict=True))
        assert row["token_accuracy"] == pytest.approx(right / len(row["ids"]))
        assert row["verified"] == (not row["unresolved"])
        assert row["exact"] or not row["verified"]
    output = capsys.readouterr().out
    assert str(folder / "results.jsonl") in output.replace("\n", "")


@pytest.mark.integration  # a whole run each
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_the_trainers_precision_is_what_the_model_computes_in(
    precision: str, tiny_folder: Path, tmp_path: Path
) -> None:
    options = ["--model.iterations=1", f"--trainer.precision={precision}"]
    assert run(fit(tiny_folder, tmp_path, *options)) == 0
    assert {row["dtype"] for row in rows_of(tmp_path)} == {"bfloat16"}
    (checkpoint,) = tmp_path.glob("lightning_logs/*/checkpoints/last.ckpt")
    values = torch.load(checkpoint, weights_only=True)["state"]["values"]
    assert values.dtype == torch.float32


def test_an_interrupted_run_says_how_to_go_on(
    tiny_folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("signal.signal", lambda *_: None)  # Lightning would ignore the next Ctrl-C
    monkeypatch.setattr(InputInversion, "begin", interrupted)
    assert run(fit(tiny_folder, tmp_path)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("0 of 2 prompts are finished, in ")
    assert message.endswith("resume with the same command and --ckpt_path last.")


def test_a_run_has_the_name_that_it_is_given(tiny_folder: Path, tmp_path: Path, capsys) -> None:
    arguments = fit(tiny_folder, tmp_path, "--model.iterations=1", "--name=mine")
    assert run(arguments) == 0
    folder = tmp_path / "lightning_logs" / "mine"
    rows = (folder / "results.jsonl").read_text()
    assert "\nname: null\n" in (folder / "config.yaml").read_text()  # it serves other runs
    assert list(folder.glob("events*"))
    assert run(arguments) == 2
    assert "resume it with --ckpt_path last" in capsys.readouterr().err
    assert run([*arguments, "--ckpt_path=last"]) == 0
    assert (folder / "results.jsonl").read_text() == rows
    assert run(["validate", *arguments[1:], "--ckpt_path=last"]) == 0
    for name, message in (("../x", "is no name of a run"), ("version_3", "is no name of a run")):
        assert run([*arguments[:-1], f"--name={name}"]) == 2
        assert message in capsys.readouterr().err
    assert run([*arguments[:-1], "--name=new", "--ckpt_path=last"]) == 2
    assert "finds no run" in capsys.readouterr().err


def test_hparams_hold_real_values(tiny_folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    slowly = [
        "--model.schedule.candidates=1",
        "--model.schedule.max_candidates=1",
    ]  # not without iterations
    assert run(fit(tiny_folder, tmp_path, "--model.iterations=12", *slowly)) == 0
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {
        "match/distance",
        "match/distance_ratio",
        "tokens/accuracy",
        "final/token_accuracy",
    } <= set(tags)
    assert "hp_metric" not in tags
    assert "optimizer/learning_rate" in tags
    assert events.Tags()["images"] == ["tokens/distance_to_nearest"]
    assert "tokens/top_k/text_summary" in events.Tags()["tensors"]
    accuracy = events.Scalars("final/token_accuracy")[-1].value
    rows = rows_of(tmp_path)
    assert accuracy == pytest.approx(sum(row["token_accuracy"] for row in rows) / len(rows))


def test_a_finished_run_resumes_to_itself_and_is_scored(
    tiny_folder: Path, fitted: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(fitted, tmp_path, dirs_exist_ok=True)
    arguments = fit(tiny_folder, tmp_path, "--model.iterations=3", "--data.batch_size=1")
    before = rows_of(tmp_path)
    assert run(["validate", *arguments[1:], "--ckpt_path=last"]) == 0
    assert accuracy_of(before) in capsys.readouterr().out
    # Scoring is no run of its own: the fit can still be resumed.
    assert run([*arguments, "--ckpt_path=last"]) == 0
    assert rows_of(tmp_path) == before


def accuracy_of(rows: list[dict]) -> str:
    """The score of a run, as validate prints it."""
    return f"token accuracy {sum(row['token_accuracy'] for row in rows) / len(rows):.3f}"


def test_resuming_with_other_settings_is_refused(tiny_folder: Path, fitted: Path, capsys) -> None:
    options = ["--model.iterations=4", "--data.batch_size=1", "--ckpt_path=last"]
    assert run(fit(tiny_folder, fitted, *options)) == 2
    assert "made with another --model.iterations" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_last_is_the_newest_run_with_these_settings(
    command: str, tiny_folder: Path, fitted: Path, tmp_path: Path, capsys
) -> None:
    root = shutil.copytree(fitted, tmp_path / "moved")
    mine = root / "lightning_logs" / "version_0"
    settings = (mine / "config.yaml").read_text()
    for name, text in (
        ("version_1", settings.replace("depth: 2", "depth: 1")),
        ("version_10", "a: b: c"),
    ):
        shutil.copytree(mine, mine.with_name(name))
        (mine.with_name(name) / "config.yaml").write_text(text)
    before = rows_of(root)
    options = ["--model.iterations=3", "--data.batch_size=1", "--ckpt_path=last"]
    assert run([command, *fit(tiny_folder, root, *options)[1:]]) == 0
    assert accuracy_of(before)[:10] in capsys.readouterr().out
    assert rows_of(root) == before


def test_the_defaults_of_fit_are_those_of_the_constructor(tiny_folder: Path) -> None:
    module = InputInversion(TransformerSpec(model=str(tiny_folder)))
    for part in ("learnable", "objective", "schedule", "recovery"):
        kind = type(getattr(module, part))
        path = RECOMMENDED[f"model.{part}"]["class_path"]
        assert path == f"{kind.__module__}.{kind.__qualname__}"
    initializer = RECOMMENDED["model.learnable"]["init_args"]["initializer"]["class_path"]
    assert initializer.endswith(f".{type(module.learnable.initializer).__name__}")


@pytest.mark.integration  # a whole run
def test_a_damaged_checkpoint_costs_its_batch_alone(
    tiny_folder: Path, fitted: Path, tmp_path: Path, capsys
) -> None:
    root = shutil.copytree(fitted, tmp_path / "moved")
    before = without_seconds(root)
    folder = root / "lightning_logs" / "version_0"
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"not a checkpoint")
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text(lines[1] + lines[0][:40])
    options = ["--model.iterations=3", "--data.batch_size=1", "--ckpt_path=last"]
    assert run(fit(tiny_folder, root, *options)) == 0
    assert "last.ckpt is no whole checkpoint; its batch begins again." in capsys.readouterr().err
    assert without_seconds(root) == before


@pytest.fixture(scope="module")
def fitted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a fit that has ended; tests that change it copy it first."""
    root = tmp_path_factory.mktemp("fitted")
    assert run(fit(tiny_folder, root, "--model.iterations=3", "--data.batch_size=1")) == 0
    return root


def without_seconds(root: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(root)]


@pytest.mark.integration  # three runs
def test_a_fit_resumes_behind_a_batch_that_ended_early(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        "--model.iterations=60", "--data.batch_size=1", "--checkpoint.every=1",
        "--model.learnable.initializer=NormalInitializer", "--model.schedule=AllPositions",
        "--stopping.stop=true",
    ]  # fmt: skip
    assert run(fit(tiny_folder, tmp_path / "whole", *options)) == 0
    iterations = [row["iterations"] for row in rows_of(tmp_path / "whole")]
    assert min(iterations) > 7
    assert max(iterations) < 60

    judge = StoppingCriterion.on_before_optimizer_step

    def stop_in_the_second_batch(self, trainer, pl_module, optimizer) -> None:
        judge(self, trainer, pl_module, optimizer)
        if trainer.current_epoch == 1 and pl_module.state.iteration == 7:
            raise InputError("stopped")

    arguments = fit(tiny_folder, tmp_path / "stopped", *options)
    with monkeypatch.context() as patch:
        patch.setattr(StoppingCriterion, "on_before_optimizer_step", stop_in_the_second_batch)
        assert run(arguments) == 2
    taken: list[int] = []
    begin = InputInversion.on_train_batch_start

    def watched(self, batch, batch_idx):
        taken.append(batch_idx)
        return begin(self, batch, batch_idx)

    monkeypatch.setattr(InputInversion, "on_train_batch_start", watched)
    assert run([*arguments, "--ckpt_path=last"]) == 0
    assert taken[0] == 7
    assert without_seconds(tmp_path / "stopped") == without_seconds(tmp_path / "whole")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("model: {seed: 1, seed: 2}", "cannot be read: it has the key 'seed' twice"),
        (
            "trainer: {callbacks: [{class_path: ModelCheckpoint}, {class_path: ModelCheckpoint}]}",
            "more than one stateful callback of type `ModelCheckpoint`",
        ),
        ("ckpt_path: ''", "--ckpt_path '.' is a folder; name a checkpoint, or last"),
    ],
)
def test_a_config_that_contradicts_itself_is_one_sentence(
    content: str, sentence: str, tiny_folder: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "c.yaml").write_text(content)
    assert run(fit(tiny_folder, tmp_path, f"--config={tmp_path / 'c.yaml'}")) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize(
    ("command", "content"),
    [
        ("validate", "missing"),
        ("predict", "empty"),
        pytest.param("validate", "text", marks=pytest.mark.integration),
        pytest.param("validate", "truncated", marks=pytest.mark.integration),
        ("predict", "other"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_one_sentence(
    command: str, content: str, tiny_folder: Path, fitted: Path, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "last.ckpt"
    whole = (fitted / "lightning_logs/version_0/checkpoints/last.ckpt").read_bytes()
    if content == "other":
        torch.save({"weights": torch.zeros(1)}, path)
    elif content != "missing":
        path.write_bytes({"empty": b"", "text": b"This is text\n"}.get(content, whole[:-500]))
    options = fit(tiny_folder, tmp_path, f"--ckpt_path={path}")[1:]
    assert run([command, *options]) == 2
    message = capsys.readouterr().err
    assert f"--ckpt_path {str(path)!r} cannot be read: " in message
    assert message.endswith("; name a checkpoint of a fit.\n")
    assert message.count("\n") == 1
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize(
    ("command", "option", "key"),
    [
        ("validate", "--model.transformer.depth=3", "model.transformer.depth"),
        pytest.param(
            "validate",
            "--model.learnable=VocabularyInput",
            "model.learnable",
            marks=pytest.mark.integration,
        ),
        pytest.param(
            "validate", "--model.objective=L1", "model.objective", marks=pytest.mark.integration
        ),
        ("predict", "--model.transformer.depth=3", "model.transformer.depth"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    command: str, option: str, key: str, tiny_folder: Path, fitted: Path, tmp_path: Path, capsys
) -> None:
    path = fitted / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    options = fit(tiny_folder, tmp_path, f"--ckpt_path={path}", option)[1:]
    assert run([command, *options]) == 2
    assert f"was made with another --{key}" in capsys.readouterr().err


def test_validate_prints_its_score_and_leaves_no_folder(
    tiny_folder: Path, fitted: Path, tmp_path: Path, capsys
) -> None:
    path = fitted / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    assert run(["validate", *fit(tiny_folder, tmp_path, f"--ckpt_path={path}")[1:]]) == 0
    assert accuracy_of(rows_of(fitted)) in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration  # a whole run
def test_predict_reports_that_a_checkpoint_holds_none_of_its_prompts(
    tiny_folder: Path, fitted: Path, tmp_path: Path, capsys
) -> None:
    path = fitted / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    options = fit(tiny_folder, tmp_path, f"--ckpt_path={path}", '--data.prompts=["other"]')[1:]
    assert run(["predict", *options]) == 0
    assert "holds none of these prompts" in capsys.readouterr().err


@pytest.mark.integration  # a whole run
def test_a_row_that_was_cut_off_at_the_end_is_made_again_from_the_start(
    tiny_folder: Path, fitted: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(fitted, tmp_path / "moved")
    before = without_seconds(root)
    rows = root / "lightning_logs" / "version_0" / "results.jsonl"
    rows.write_bytes(rows.read_bytes()[:-40])
    options = ["--model.iterations=3", "--data.batch_size=1", "--ckpt_path=last"]
    # The folder has another name now, and the run is the same.
    assert run(fit(tiny_folder, root, *options)) == 0
    assert without_seconds(root) == before


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.yaml", "[", "config.yaml' cannot be read as the settings of a run"),
        ("results.jsonl", "{}\n", "results.jsonl', line 1 is no row; remove the line and run"),
    ],
)
def test_a_damaged_run_is_not_resumed(
    file: str, content: str, sentence: str, tiny_folder: Path, fitted: Path, tmp_path: Path, capsys
) -> None:
    root = shutil.copytree(fitted, tmp_path / "moved")
    (root / "lightning_logs" / "version_0" / file).write_text(content)
    options = ["--model.iterations=3", "--data.batch_size=1", "--ckpt_path=last"]
    assert run(fit(tiny_folder, root, *options)) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_sigterm_ends_a_run_in_the_middle_of_long_work(
    command: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def endless(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
        raise AssertionError("the signal came to nothing")

    monkeypatch.setattr(PrefixSearch, "step", endless)
    before = signal.getsignal(signal.SIGTERM)
    assert run([command, *fit(tiny_folder, tmp_path)[1:]]) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    messages = capsys.readouterr().err
    assert "0 of 2 prompts are finished" in messages
    assert "resume with the same command and --ckpt_path last" in messages
    assert "Traceback" not in messages


@pytest.mark.parametrize("command", ["fit", "predict", "validate"])
def test_the_config_is_printed_and_can_be_used(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--depth=3", "--print_config", "--data.prompts=['a']"]) == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["model"]["transformer"]["depth"] == 3
    assert config["model"]["transformer"]["dtype"] == "float32"
    assert config["data"]["prompts"] == ["a"]
    (tmp_path / "again.yaml").write_text(printed)
    assert run([command, f"--config={tmp_path / 'again.yaml'}", "--print_config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("section", ["trainer", "model", "decoding", "data"])
@pytest.mark.parametrize("value", ["null", "[1]", "3"])
def test_a_section_of_a_config_without_options(
    section: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"{section}: {value}\n")
    assert run(["fit", f"--config={config}", "--trainer.accelerator=cpu"]) == 2
    assert f"c.yaml': {section} holds no options" in capsys.readouterr().err
