"""The commands that the README shows, run as they stand there but for a tiny model."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lightning_inversion import __main__
from lightning_inversion.cache import ENVIRONMENT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = sorted(set(re.findall(r"`(lightning-inversion [a-z]+ [^`]+)`", README)))
PROMPTS = "The sky is blue.\nA quick brown fox\n"


def smaller(command: str, model: Path, root: Path) -> list[str]:
    """What makes a command quick, and keeps what it leaves in a folder of its own."""
    if command == "cache":
        return []
    if command in {"capture", "attribute"}:
        return [f"--model={model}", *(["--depth=2"] if command == "capture" else [])]
    run = [
        f"--model.transformer.model={model}", "--model.transformer.depth=2",
        f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu",
        "--data.tokens_per_batch=100",
    ]  # fmt: skip
    if command == "predict":
        return [*run, "--model.recovery.budget=50"]
    return [*run, "--model.iterations=2", "--decoding.show=false"]


def words(shown: str) -> list[str]:
    return shlex.split(shown)[1:]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands: beside the configs, with a file of prompts."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch):
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["lightning-inversion", *arguments])
        return __main__.main()

    return run


RUN = [
    shown
    for shown in SHOWN
    if words(shown)[0] in {"fit", "predict", "capture", "attribute", "cache"}
    and not {"--help", "--print_config", "--processes"} & set(words(shown))
    and "targets.safetensors" not in shown
]


@pytest.mark.integration  # a whole run each
@pytest.mark.parametrize("shown", RUN)
def test_a_command_of_the_table(shown: str, folder: Path, tiny_folder: Path, enter) -> None:
    arguments = words(shown)
    assert enter(*arguments, *smaller(arguments[0], tiny_folder, folder)) == 0


@pytest.mark.integration  # two runs each
def test_capture_and_what_is_made_of_it(folder: Path, tiny_folder: Path, enter) -> None:
    (capture,) = [s for s in SHOWN if words(s)[0] == "capture"]
    (predict,) = [s for s in SHOWN if "--targets" in s]
    assert enter(*words(capture), *smaller("capture", tiny_folder, folder)) == 0
    assert enter(*words(predict), *smaller("predict", tiny_folder, folder)) == 0


@pytest.mark.integration  # two runs each
def test_validate_after_a_fit(folder: Path, tiny_folder: Path, enter) -> None:
    (validate,) = [s for s in SHOWN if words(s)[0] == "validate"]
    fit = ["fit", *words(validate)[1:]]
    fit = fit[: fit.index("--ckpt_path")]
    assert enter(*fit, *smaller("fit", tiny_folder, folder)) == 0
    assert enter(*words(validate), *smaller("validate", tiny_folder, folder)) == 0


def test_the_readme_shows_every_command() -> None:
    assert {words(shown)[0] for shown in SHOWN} == {
        "fit", "validate", "predict", "attribute", "capture", "sweep", "report", "audit", "cache",
    }  # fmt: skip


def test_files_that_the_readme_names_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 8
    assert all((ROOT / link).exists() for link in links if "://" not in link)


@pytest.mark.integration  # loads the real model
@pytest.mark.timeout(2400)  # measured for the first time, beside many other jobs
def test_the_python_blocks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)  # the real model is in the user's cache
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    assert names["found"].texts == ["The sky is blue."]
    assert names["found"].verified


@pytest.mark.integration  # loads the real model
@pytest.mark.timeout(2400)  # measured for the first time, beside many other jobs
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    cells = json.loads((ROOT / "configs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(source, names)
            if (last := source.splitlines()[-1]).isidentifier():
                shown.append(names[last]._repr_html_())
    assert len(shown) == 3
    assert names["found"].texts == ["The sky is blue."]
    assert names["found"].verified
    assert names["inverted"][0].iterations == 20
    assert [result.predictions[0].text for result in names["attributed"]][1] == " Paris"
