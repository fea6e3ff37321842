"""The command in process: cells are normal runs, the model loads once, a stopped sweep goes on."""

import contextlib
import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_inversion.__main__ import main
from lightning_inversion.module import InputInversion
from lightning_inversion.sweep import command
from lightning_inversion.sweep import run as sweep_run
from lightning_inversion.transformer.loading import TransformerSpec

pytestmark = pytest.mark.usefixtures("shared_parsers")

OF_A_PLACE = {"seconds"}


def run(options: list[str]) -> int:
    return main(["sweep", *options])


def options_of(folder: Path, root: Path) -> list[str]:
    return [
        f"--model.transformer.model={folder}",
        '--data.prompts=["The sky is blue.", "A quick brown fox"]',
        "--data.tokens_per_batch=100",
        "--model.iterations=4",
        f"--trainer.default_root_dir={root}",
        "--trainer.accelerator=cpu",
    ]


@pytest.fixture
def options(tiny_folder: Path, tmp_path: Path) -> list[str]:
    return options_of(tiny_folder, tmp_path)


@contextlib.contextmanager
def counted_loads() -> Iterator[list[int]]:
    """The depths that are loaded meanwhile."""
    seen: list[int] = []
    load_blocks = TransformerSpec.load_blocks

    def counted(spec: TransformerSpec, depth: int) -> Any:
        seen.append(depth)
        return load_blocks(spec, depth)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerSpec, "load_blocks", counted)
        yield seen


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than cells, and one sweep that shows them is enough."""
    monkeypatch.setattr(command, "write_report", lambda folder: None)


@dataclass(frozen=True)
class Finished:
    """A sweep of a fit over two depths that has ended, what it said, and how it was asked for."""

    options: list[str]
    over: list[str]
    config: Path
    folder: Path
    loads: list[int]
    out: str
    err: str


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("finished")
    config = root / "c.yaml"
    config.write_text("model: {schedule: {init_args: {window: 1}}}\n")
    options = [f"--config={config}", *options_of(tiny_folder, root)]
    over = ["--over=transformer.depth=2,4", "--name=depths"]
    out, err = io.StringIO(), io.StringIO()
    with counted_loads() as loads, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run([*options, *over]) == 0
    folder = root / "lightning_logs" / "depths"
    return Finished(options, over, config, folder, loads, out.getvalue(), err.getvalue())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in OF_A_PLACE} for row in rows]


def test_a_depth_sweep_loads_once_and_its_cells_are_the_runs_they_name(
    finished: Finished, tmp_path: Path
) -> None:
    assert finished.loads == [4]
    assert str(finished.folder / "report" / "report.html") in finished.out
    figures = EventAccumulator(str(finished.folder / "report"))
    figures.Reload()
    assert "sweep/depth" in figures.Tags()["images"]
    assert "depth=4: done in " in finished.err
    cell_of_2 = finished.folder / "depth=2"
    for cell in (cell_of_2, finished.folder / "depth=4"):
        assert {"config.yaml", "checkpoints", "results.jsonl"} <= {p.name for p in cell.iterdir()}
    assert rows_of(finished.folder / "depth=4")[0]["depth"] == 4
    with counted_loads() as loads:
        assert main(["fit", *finished.options, "--model.transformer.depth=2",
                        f"--trainer.default_root_dir={tmp_path}"]) == 0  # fmt: skip
    assert loads == [2]
    assert rows_of(cell_of_2) == rows_of(tmp_path / "lightning_logs" / "version_0")


@pytest.mark.integration  # several runs
def test_a_sweep_of_predict_loads_once_and_its_cells_are_the_runs_they_name(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None, capsys
) -> None:
    wholes: list[str] = []
    load_whole = TransformerSpec.load_causal_lm
    monkeypatch.setattr(
        TransformerSpec, "load_causal_lm", lambda s: (wholes.append(s.model), load_whole(s))[1]
    )
    config = tmp_path / "c.yaml"
    config.write_text("model: {recovery: {init_args: {budget: 200}}}\n")
    sweep = [f"--config={config}", *options, "--over=transformer.depth=1,2", "--name=exact"]
    assert run(["predict", *sweep]) == 0
    assert len(wholes) == 1
    folder = tmp_path / "lightning_logs" / "exact"
    of_time = OF_A_PLACE | {"token_seconds"}
    for depth in (1, 2):
        alone = tmp_path / f"alone-{depth}"
        assert main(["predict", f"--config={config}", *options,
                        f"--model.transformer.depth={depth}",
                        f"--trainer.default_root_dir={alone}"]) == 0  # fmt: skip
        ours, theirs = (
            rows_of(folder / f"depth={depth}"),
            rows_of(alone / "lightning_logs" / "version_0"),
        )
        assert all(row["exact"] and row["verified"] for row in ours)
        for row in (*ours, *theirs):
            assert all(row.pop(key) is not None for key in of_time & row.keys())
        assert ours == theirs
    config.write_text("model: {recovery: {init_args: {budget: 100}}}\n")
    assert run(["predict", *sweep]) == 2
    assert "made with another --model.recovery" in capsys.readouterr().err


def test_only_what_is_not_done_runs_again(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, no_report: None
) -> None:
    begun: list[int] = []
    begin = InputInversion.begin
    monkeypatch.setattr(
        InputInversion, "begin", lambda s, b: (begun.append(s.spec.depth), begin(s, b))[1]
    )
    before = {cell.name: rows_of(cell) for cell in finished.folder.glob("depth=*")}
    (finished.folder / "depth=2" / "cell.json").unlink()  # killed after its last row
    shutil.rmtree(finished.folder / "depth=4")
    with counted_loads() as loads:
        assert run([*finished.options, *finished.over]) == 0
    assert loads == [4]
    assert begun == [4]
    assert {name: rows_of(finished.folder / name) for name in before} == before
    assert len(before) == 2


@pytest.mark.integration  # several runs
def test_a_cell_that_fails_leaves_the_others_and_is_tried_again(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, no_report: None
) -> None:
    begin = InputInversion.begin

    def failing(module: InputInversion, batch: Any) -> None:
        if module.spec.depth == 2:
            raise RuntimeError("out of memory")
        begin(module, batch)

    sweep = [*options, "--over=transformer.depth=2,3", "--name=broken"]
    with monkeypatch.context() as patched:
        patched.setattr(InputInversion, "begin", failing)
        assert run(sweep) == 1
    assert "depth=2 failed: RuntimeError: out of memory" in capsys.readouterr().err
    folder = tmp_path / "lightning_logs" / "broken"
    assert "Traceback" in (folder / "depth=2" / "messages.txt").read_text()
    assert not (folder / "depth=2" / "results.jsonl").exists()
    assert len(rows_of(folder / "depth=3")) == 2
    assert run(sweep) == 0
    assert len(rows_of(folder / "depth=2")) == 2


@pytest.mark.integration  # several runs
def test_a_sweep_that_is_asked_to_end_can_be_resumed(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, no_report: None
) -> None:
    begin = InputInversion.begin

    def asked_to_end(module: InputInversion, batch: Any) -> None:
        if module.spec.depth == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        begin(module, batch)

    before = signal.getsignal(signal.SIGTERM)
    sweep = [*options, "--over=transformer.depth=1,2,3", "--name=ended"]
    with monkeypatch.context() as patched:
        patched.setattr(InputInversion, "begin", asked_to_end)
        assert run(sweep) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopped; the same command resumes it" in capsys.readouterr().err
    folder = tmp_path / "lightning_logs" / "ended"
    assert len(rows_of(folder / "depth=1")) == 2
    assert not (folder / "depth=3").exists()
    assert run(sweep) == 0
    assert len(rows_of(folder / "depth=3")) == 2


def test_a_dry_run_lists_the_cells_and_leaves_nothing(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = [*options, "--over=transformer.depth=2", "--over=objective=L1", "--seeds=2"]
    assert run([*sweep, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert plan.startswith(str(tmp_path / "lightning_logs" / "fit-depth-objective-seed"))
    assert "  depth=2,objective=L1,seed=1\n    fit " in plan
    assert plan.endswith("2 of 2 cells to run\n")
    assert not (tmp_path / "lightning_logs").exists()


def test_cells_that_differ_in_a_seed_alone_are_checked_once(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    checked: list[list[str]] = []

    class Counted(sweep_run._Checked):
        def __init__(self, args: list[str]) -> None:
            checked.append(args)
            super().__init__(args)

    monkeypatch.setattr(sweep_run, "_Checked", Counted)
    sweep = [*options, "--over=transformer.depth=1,2", "--seeds=5000", "--name=many"]
    assert run([*sweep, "--dry-run"]) == 0
    assert len(checked) == 2
    assert capsys.readouterr().out.endswith("10000 of 10000 cells to run\n")
    # A seed that may be wrong is checked, and so is a folder that is there already.
    assert run([*options, f"--over=seed_everything=1,2,{2**32}", "--dry-run"]) == 2
    assert "--over seed_everything must be between 0 and" in capsys.readouterr().err
    kept = tmp_path / "lightning_logs" / "many" / "depth=2,seed=4000"
    kept.mkdir(parents=True)
    run_with = sweep_run._Checked(["fit", *options, "--model.transformer.depth=2"])
    settings = {**run_with.settings(), "seed_everything": 4000}
    (kept / "config.yaml").write_text(yaml.safe_dump(settings))
    assert run([*sweep, "--dry-run"]) == 0
    (kept / "config.yaml").write_text(yaml.safe_dump({**settings, "seed_everything": 3}))
    assert run([*sweep, "--dry-run"]) == 2
    assert "seed=4000' was made with another --seed_everything" in capsys.readouterr().err


def test_a_dry_run_of_what_is_done(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert finished.err.startswith(f"{finished.folder}: 2 of 2 cells to run\n")
    assert run([*finished.options, *finished.over, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "depth=4: done" in plan
    assert "0 of 2 cells to run" in plan


def test_a_cell_without_a_row_has_failed(options: list[str], capsys, no_report: None) -> None:
    sweep = ["predict", *options, "--over=transformer.depth=1", "--name=none"]
    assert run([*sweep, "--trainer.limit_predict_batches=0"]) == 1
    assert "depth=1 failed: RuntimeError: the run wrote no row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "A sweep needs --over"),
        (["--over=transformer.dept=1,2"], "unknown option --over transformer.dept; did you mean"),
        (["--over=transformer.depth=1,99"], "99 blocks were asked for and the model has 4"),
        (["--over=objective=L3"], "unknown Objective 'L3'"),
        (["--over=iterations=0"], "--over iterations must be at least 1"),
        (["--over=transformer.depth"], "is not key=value,value"),
        (["--seeds=0"], "--seeds must be between 1"),
        (["--seeds=2", "--name=a/b"], "--name 'a/b' is not a plain name"),
        *(
            pytest.param(options, sentence, marks=pytest.mark.integration)
            for options, sentence in (
                (["--seeds=x"], "--seeds: x is not a whole number"),
                (["--seeds=99999999999"], "--seeds must be between 1 and 10000"),
                (["--seeds=2", "--processes=0"], "--processes must be at least 1"),
                (["--seeds=2", "--name=.."], "--name '..' is not a plain name"),
            )
        ),
        (["--seeds=2", "--results.file=rows.jsonl"], "unknown option --results.file"),
        (
            ["--seeds=2", "--trainer.default_root_dir=/proc/x"],
            "--trainer.default_root_dir '/proc/x' cannot be written",
        ),
        (["--join=nowhere"], "--join 'nowhere' does not exist"),
        (["--join=."], "holds no sweep.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_ends_before_a_cell_runs(
    arguments: list[str], sentence: str, options: list[str], tmp_path: Path, capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(InputInversion, "begin", lambda *_: pytest.fail("a batch was begun"))
    assert run([*options, *arguments]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1, message
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize(
    "content", ["null", "", "[]", '{"cells": 3}', '{"cells": [3]}', "[" * 100_000, "\udcff"]
)
def test_a_damaged_sweep_file_is_one_sentence(content: str, tmp_path: Path, capsys) -> None:
    stored = tmp_path / "sweep.json"
    stored.write_text(content, errors="surrogateescape")
    assert run([f"--join={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert f"{str(stored)!r} is not a sweep's: " in message
    assert message.count("\n") == 1


def test_a_folder_of_other_options_is_not_resumed(finished: Finished, capsys) -> None:
    assert run([*finished.options, "--over=transformer.depth=2", "--name=depths"]) == 2
    assert "holds a sweep with other options" in capsys.readouterr().err


def test_a_changed_config_file_is_not_resumed(finished: Finished, capsys) -> None:
    before = finished.config.read_text()
    finished.config.write_text("model: {schedule: {init_args: {window: 3}}}\n")
    try:
        assert run([*finished.options, *finished.over]) == 2
        assert "made with another --model.schedule.init_args.window" in capsys.readouterr().err
    finally:
        finished.config.write_text(before)


def test_a_sweep_of_seeds_alone_has_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left over for the command: no option names the folder."""
    seen: list[Any] = []
    monkeypatch.setattr("lightning_inversion.sweep.run.check", seen.append)
    monkeypatch.setattr(command, "print_cells", lambda *_: None)
    assert run(["--seeds=2", "--dry-run"]) == 0
    assert seen[0].path.parent == Path("lightning_logs")
    assert [cell.arguments for cell in seen[0].cells] == [
        ("--seed_everything=0",), ("--seed_everything=1",),
    ]  # fmt: skip


@pytest.mark.integration
def test_cells_are_shared_over_processes(options: list[str], tmp_path: Path) -> None:
    over = ["--over=transformer.depth=1,2"]
    assert run([*options, *over, "--name=two", "--processes=2"]) == 0
    assert run([*options, *over, "--name=one"]) == 0
    logs = tmp_path / "lightning_logs"
    for cell in ("depth=1", "depth=2"):
        assert rows_of(logs / "two" / cell) == rows_of(logs / "one" / cell)
