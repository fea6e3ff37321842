"""Captured targets: the file, its manifest, what is refused, and fits that know no prompt."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_inversion.__main__ import main as run
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.data.request import Request
from lightning_inversion.data.storage import Storage
from lightning_inversion.data.targets import Captured
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer

pytestmark = pytest.mark.usefixtures("shared_parsers")

PROMPTS = ["The sky is blue.", "A quick brown fox"]


def capture(folder: Path, root: Path, *more: str) -> Path:
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    out = root / "targets.safetensors"
    words = [
        "capture", f"--prompts={root / 'prompts.txt'}", f"--out={out}",
        f"--model={folder}", "--depth=2", *more,
    ]  # fmt: skip
    assert run(words) == 0
    return out


@pytest.fixture(scope="module")
def captured(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture of the prompts' features alone; no test changes it."""
    return capture(tiny_folder, tmp_path_factory.mktemp("captured"))


def fit(folder: Path, root: Path, *data: str) -> list[str]:
    return [
        "fit", f"--model.transformer.model={folder}", "--model.transformer.depth=2",
        f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu",
        "--data.tokens_per_batch=100", "--model.iterations=4", "--model.schedule.candidates=2",
        "--model.schedule.max_candidates=2", *data,
    ]  # fmt: skip


def rows_of(root: Path, version: int = 0) -> list[dict]:
    lines = (
        (root / "lightning_logs" / f"version_{version}" / "results.jsonl").read_text().splitlines()
    )
    return [json.loads(line) for line in lines]


def own_file(path: Path, manifest: object = None, **tensors: torch.Tensor) -> Path:
    save_file(tensors or {"0": torch.ones(3, 32)}, path)
    if manifest is not None:
        path.with_name(path.name + ".manifest.json").write_text(json.dumps(manifest))
    return path


def test_a_file_comes_back_as_it_was_written(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    path = capture(tiny_folder, tmp_path, "--store=bfloat16", "--keep_prompts=true")
    captured = Captured.read(path)
    captured.check(tiny_transformer.description, 32)
    assert captured.prompts == PROMPTS
    assert captured.storage == Storage("bfloat16")
    for target, ids in zip(captured.targets, captured.ids or (), strict=True):
        whole = tiny_transformer.features_of(torch.tensor([ids]))[0]
        torch.testing.assert_close(target, whole.bfloat16(), atol=1e-2, rtol=1e-2)
    again = tmp_path / "again.safetensors"
    captured.write(again)
    assert Captured.read(again).manifest() == captured.manifest()
    assert not list(tmp_path.glob(".*"))


def test_a_file_keeps_what_happened_to_its_features(tiny_folder: Path, tmp_path: Path) -> None:
    options = ("--largest=0.5", "--noise=0.1", "--noise_kind=laplace")
    captured = Captured.read(capture(tiny_folder, tmp_path, *options))
    assert captured.storage == Storage(noise=0.1, noise_kind="laplace", largest=0.5)
    assert all(((target != 0).sum(1) == 16).all() for target in captured.targets)
    assert not captured.warnings


def test_features_that_are_0_are_reported(tmp_path: Path) -> None:
    rows = torch.where(torch.arange(32) < 8, 1.0, 0.0).expand(3, 32).contiguous()
    path = own_file(tmp_path / "own.safetensors", **{"0": rows})
    (warning,) = Captured.read(path).warnings
    assert warning.endswith(
        "at most 0.25 of the features of a position are not 0, as where only the largest are kept; "
        "set --data.largest 0.25 then."
    )
    assert not Captured.read(path, Request(largest=0.25)).warnings


def test_every_difference_from_the_model_is_listed(
    tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    transformer = {"model": "other", "depth": 3, "dtype": "bfloat16"}
    path = own_file(tmp_path / "own.safetensors", {"transformer": transformer})
    with pytest.raises(InputError) as refusal:
        Captured.read(path).check(tiny_transformer.description, 64)
    message = str(refusal.value)
    for part in (
        "model is other in the file", "depth is 3 in the file and 2 in the model",
        "dtype is bfloat16 in the file and float32", "features are 32 in the file and 64",
        "--model.transformer.depth 3", "--model.transformer.dtype bfloat16",
    ):  # fmt: skip
        assert part in message
    # The hash decides, wherever the files lie.
    sha = tiny_transformer.fingerprint
    transformer = {"model": "other", "depth": 2, "weights_sha256": sha}
    own_file(path, {"transformer": transformer})
    Captured.read(path).check(tiny_transformer.description, 32)
    own_file(path, {"transformer": {**transformer, "weights_sha256": "0" * 64}})
    with pytest.raises(InputError, match="weights_sha256 is 000000000000"):
        Captured.read(path).check(tiny_transformer.description)


MINIMAL = {"transformer": {"model": "m", "depth": 2}}


@pytest.mark.parametrize(
    ("manifest", "tensors", "sentence"),
    [
        ({"transformer": {"depth": 2}}, {}, "does not name the model"),
        ({**MINIMAL, "postions": "all"}, {}, "has a key 'postions'"),
        ({**MINIMAL, "positions": 2, "known_prefix": [1]}, {}, "unknown tokens before it"),
        ({**MINIMAL, "positions": "some"}, {}, "has positions 'some'; write all"),
        ({**MINIMAL, "positions": -1}, {}, "has positions -1; write all"),
        ({**MINIMAL, "known_prefix": [1.5]}, {}, r"has known_prefix \[1\.5\]; write token ids"),
        ({**MINIMAL, "known_prefix": [2**70]}, {}, "has known_prefix with numbers that are no"),
        ({**MINIMAL, "prompts": "a", "ids": [[1]]}, {}, 'has prompts "a"; write a list of str'),
        ({**MINIMAL, "prompts": ["\ud83d"], "ids": [[1]]}, {}, "half of a surrogate pair"),
        ({**MINIMAL, "prompts": ["a"]}, {}, "only one of prompts and ids"),
        ({**MINIMAL, "versions": None}, {}, "has versions null; leave it out"),
        ({**MINIMAL, "format": 2}, {}, "has format 2, and 1 is read"),
        (
            {**MINIMAL, "storage": {"noise": 1e400}},
            {},
            "its manifest's storage.noise must be .*, and is inf",
        ),
        (
            {**MINIMAL, "storage": {"noise": 1e30}},
            {},
            "storage.noise must be between 0 and 1e\\+15, and is 1e\\+30",
        ),
        ({**MINIMAL, "storage": {"largest": 0.0}}, {}, "storage.largest is a share"),
        ({**MINIMAL, "storage": {"scale": 0.0}}, {}, "storage.scale is a factor other than 0"),
        ({**MINIMAL, "storage": {"dtype": "int8"}}, {}, 'has storage {"dtype": "int8"}; write'),
        ({**MINIMAL, "storage": {"kind": 1}}, {}, "has storage .*kind.*; write"),
        ({"transformer": {"model": "m", "depth": True}}, {}, "has transformer.depth True"),
        ({"transformer": {"model": "m", "deep": 2}}, {}, "has a key transformer.deep"),
        ([], {}, "is no JSON object"),
        (MINIMAL, {"0": torch.ones(3, 32), "1": torch.ones(3, 31)}, "has 31 features"),
        (MINIMAL, {"0": torch.full((3, 32), torch.nan)}, "all padding, nan or 0"),
        (MINIMAL, {"0": torch.full((3, 32), torch.inf).half()}, "infinite"),
        (MINIMAL, {"0": torch.full((3, 32), -3e38)}, "or ones above 1e\\+15"),
    ],
)
def test_what_cannot_be_used_is_refused(manifest, tensors, sentence, tmp_path: Path) -> None:
    path = own_file(tmp_path / "own.safetensors", manifest, **tensors)
    with pytest.raises(InputError, match=sentence) as refusal:
        PromptDataModule(targets=str(path))
    assert "--data.targets" in str(refusal.value)


@pytest.fixture(scope="module")
def of_prompts(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The rows of a fit that was given the prompts themselves."""
    root = tmp_path_factory.mktemp("of-prompts")
    assert run(fit(tiny_folder, root, f"--data.prompts={json.dumps(PROMPTS)}")) == 0
    return rows_of(root)


@pytest.mark.parametrize("kept", [pytest.param(True, marks=pytest.mark.integration), False])
def test_a_fit_of_captured_targets_is_that_of_the_prompts(
    tiny_folder: Path, tmp_path: Path, of_prompts: list[dict], kept: bool
) -> None:
    path = capture(tiny_folder, tmp_path, f"--keep_prompts={str(kept).lower()}")
    assert run(fit(tiny_folder, tmp_path / "a", f"--data.targets={path}")) == 0
    scores = {"prompt", "ids", "exact", "same_text", "token_accuracy", "top_k_accuracy", "hamming"}
    unknown = set() if kept else scores | {"distance_ratio", "criterion_met", "criterion_met_at"}
    for ours, theirs in zip(rows_of(tmp_path / "a"), of_prompts, strict=True):
        assert all(ours[key] is None for key in scores) is not kept
        for key in set(theirs) - unknown - {"seconds", "fingerprint"}:
            assert ours[key] == theirs[key], key


@pytest.mark.integration  # three runs
def test_a_fit_of_captured_targets_is_resumed_and_scored(
    tiny_folder: Path, captured: Path, tmp_path: Path
) -> None:
    options = fit(tiny_folder, tmp_path / "a", f"--data.targets={captured}")
    assert run(options) == 0
    before = rows_of(tmp_path / "a")
    again = [*options, "--ckpt_path=last"]
    assert run(again) == 0
    assert rows_of(tmp_path / "a") == before
    assert run(["validate", *again[1:]]) == 0


def test_features_after_a_known_prefix(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    ids = torch.tensor([[5, 9, 40, 41, 42]])
    manifest = {
        "transformer": {"model": str(tiny_folder), "depth": 2},
        "positions": 2, "known_prefix": [5, 9],
    }  # fmt: skip
    path = tmp_path / "own.safetensors"
    own_file(path, manifest, **{"0": tiny_transformer.features_of(ids)[0, 2:].contiguous()})
    words = fit(
        tiny_folder, tmp_path, f"--data.targets={path}", "--model.schedule.max_candidates=64"
    )
    assert run([*words, "--model.schedule.candidates=64"]) == 0
    (row,) = rows_of(tmp_path)
    assert row["recovered_ids"] == ids[0].tolist()
    assert row["verified"]


@pytest.mark.integration  # a whole run
def test_predict_knows_no_prompt(tiny_folder: Path, captured: Path, tmp_path: Path) -> None:
    words = [
        "predict", f"--model.transformer.model={tiny_folder}", "--model.transformer.depth=2",
        f"--data.targets={captured}", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
    ]  # fmt: skip
    assert run(words) == 0
    rows = rows_of(tmp_path)
    assert [row["recovered"] for row in rows] == PROMPTS
    assert all(row["verified"] and row["exact"] is None for row in rows)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--model.transformer.depth=1"], "depth is 2 in the file and 1 in the model"),
        (["--model.own_tokens=true"], "--model.own_tokens decodes the tokens of prompts"),
    ],
)
def test_cheap_mismatches_come_before_the_model(
    tiny_folder: Path, captured: Path, tmp_path: Path, capsys, monkeypatch, more, sentence
) -> None:
    monkeypatch.setattr(
        "lightning_inversion.transformer.loading.TransformerSpec.load",
        lambda _: pytest.fail("loaded"),
    )
    assert run([*fit(tiny_folder, tmp_path, f"--data.targets={captured}"), *more]) == 2
    assert sentence in capsys.readouterr().err


def test_a_prompt_that_cannot_be_captured_costs_no_other(
    tiny_folder: Path, captured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "some.safetensors"
    prompts.write_text(f"\n{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    words = [
        "capture", f"--prompts={prompts}", f"--out={out}", f"--model={tiny_folder}", "--depth=2",
    ]  # fmt: skip
    assert run([*words, "--keep_prompts=true"]) == 0
    assert "prompt 3 is empty; give it a text. The others are captured." in caplog.messages
    found, whole = Captured.read(out), Captured.read(captured)
    assert found.prompts == PROMPTS
    assert all(map(torch.equal, found.targets, whole.targets))
    prompts.write_text("\n" + "a b " * 1000)
    assert run([*words, "--overwrite=true"]) == 2
    assert f"--prompts {str(prompts)!r}, prompt 1 is empty" in caplog.messages[-1]
    assert Captured.read(out).prompts == PROMPTS


@pytest.mark.integration  # two captures and two runs
def test_a_fit_verifies_what_a_coarse_capture_lets_it(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (noise, verified) in enumerate((("0.01", True), ("3.0", False))):
        path = capture(tiny_folder, tmp_path, "--store=float16", f"--noise={noise}")
        more = ("--model.schedule.candidates=64", "--model.schedule.max_candidates=64")
        assert run(fit(tiny_folder, tmp_path, f"--data.targets={path}", *more)) == 0
        assert ("then verified 0.000" in capsys.readouterr().err) is not verified
        for row in rows_of(tmp_path, version=number):
            assert row["verified"] is verified
            assert row["storage"] == f"gaussian noise {float(noise):g}, float16"
            assert row["token_verified"] == [verified] * len(row["recovered_ids"])
        path.unlink()


def test_a_capture_is_not_overwritten(tiny_folder: Path, captured: Path, capsys) -> None:
    words = ["capture", f"--prompts={captured.with_name('prompts.txt')}", f"--out={captured}"]
    assert run([*words, f"--model={tiny_folder}"]) == 2
    assert "exists; give another file" in capsys.readouterr().err


def test_a_capture_is_not_written_under_another_formats_name(captured: Path, capsys) -> None:
    out = captured.with_name("features.npy")
    words = ["capture", f"--prompts={captured.with_name('prompts.txt')}", f"--out={out}"]
    assert run(words) == 2
    assert "no .npy file is written; name a .safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/proc/t.safetensors", f"{__file__}/t.safetensors"])
def test_a_folder_that_takes_no_file_is_refused_before_the_model_loads(
    place: str, tiny_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(TransformerSpec, "load", lambda _: pytest.fail("the model was loaded"))
    (tmp_path / "prompts.txt").write_text("a\n")
    words = [f"--prompts={tmp_path / 'prompts.txt'}", f"--out={place}", f"--model={tiny_folder}"]
    assert run(["capture", *words, "--depth=2"]) == 2
    message = capsys.readouterr().err
    assert f"--out {place!r} cannot" in message
    assert message.count("\n") == 1
