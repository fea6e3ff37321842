import json
from pathlib import Path

import pytest

from lightning_inversion.callbacks.learning_rate import LinearLearningRate
from lightning_inversion.callbacks.summary import mean, print_rows
from lightning_inversion.cli.resume import differences
from lightning_inversion.errors import InputError
from lightning_inversion.files import append_records, check_writable, read_records


def test_rows_are_whole_or_absent_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_records(path, [{"index": 1, "text": "é"}])
    with path.open("ab") as file:
        file.write(b'{"index": 2, "te')  # killed here
    assert read_records(path) == [{"index": 1, "text": "é"}]
    append_records(path, [{"index": 0}])
    lines = path.read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [1, 0]
    assert [row["index"] for row in read_records(path)] == [0, 1]


@pytest.mark.parametrize("line", [b"{not JSON\n", b'{"text": "no index"}\n', b"\xff\x00\n", b"3\n"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"index": 0}\n' + line + b'{"index": 1}\n')
    with pytest.raises(InputError, match=r"results\.jsonl', line 2 is no row; remove the line"):
        read_records(path)


@pytest.mark.parametrize("below", [Path("/proc"), Path(__file__)])
def test_a_place_that_takes_no_file_is_refused(below: Path) -> None:
    with pytest.raises(InputError, match=r"--out '.*' cannot") as error:
        check_writable(below / "new" / "file", "--out")
    assert "\n" not in str(error.value)


def fitted(index: int, right: bool) -> dict[str, object]:
    ids = [1, 2, 3][: 1 + index % 3]
    read = ids if right else [ids[0], *[9 for _ in ids[1:]]]
    return {
        "index": index, "error": None, "recovered": f"text {index}", "verified": read == ids,
        "verified_tokens": 1, "token_accuracy": 1.0, "iterations": 5, "distance_ratio": None,
        "ids": ids, "recovered_ids": read, "top_k_ids": [[token, 7] for token in read],
    }  # fmt: skip


def test_texts_of_unequal_length_count_alike() -> None:
    averages = mean([fitted(index, right=index != 1) for index in range(300)])
    assert averages["TokenAccuracy"] == pytest.approx((299 + 1 / 2) / 300)
    assert averages["TopKAccuracy"] == pytest.approx((299 + 1 / 2) / 300)
    assert averages["ExactMatch"] == pytest.approx(299 / 300)


def test_of_many_rows_the_doubtful_ones_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([fitted(index, right=index != 299) for index in range(300)])
    printed = capsys.readouterr().out
    assert "text 299" in printed
    assert "text 48 " in printed
    assert "text 49 " not in printed
    assert "... and 250 more, all of them verified" in printed
    assert "verified 0.997 of 300 prompts" in printed
    print_rows([fitted(index, right=index % 3 == 0) for index in range(90)])
    assert "... and 40 more, 10 of them not verified" in capsys.readouterr().out


def test_a_place_is_looked_at_and_left_alone(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "file", "--out")
    check_writable(tmp_path, "--out", folder=True)
    assert list(tmp_path.iterdir()) == []


def test_learning_rate_goes_from_base_to_a_hundredth() -> None:
    schedule = LinearLearningRate()
    assert schedule.factor(0, 500) == 1
    assert schedule.factor(499, 500) == pytest.approx(0.01)
    assert schedule.factor(250, 501) == pytest.approx(0.505)
    assert schedule.factor(0, 1) == 1
    with pytest.raises(InputError, match=r"learning_rate\.start"):
        LinearLearningRate(start=-1)


def test_configs_differ_by_key() -> None:
    ours = {"model": {"transformer": {"depth": 1}, "iterations": 5}, "ckpt_path": None}
    theirs = {"model": {"transformer": {"depth": 2}, "iterations": 5}, "ckpt_path": "last"}
    assert differences(ours, theirs) == ["model.transformer.depth"]
    assert differences(ours, ours) == []


def test_a_runs_mean_is_the_mean_of_its_rows() -> None:
    rows = [
        {"ids": [1, 2], "recovered_ids": recovered, "top_k_ids": [[1, 9], [9, 2]],
         "distance_ratio": None, "verified": exact, "iterations": 3, "exact": exact}
        for recovered, exact in (([1, 2], True), ([1, 9], False), ([9, 9], False))
    ]  # fmt: skip
    means = mean(rows)
    assert means["TokenAccuracy"] == pytest.approx(0.5)
    assert means["ExactMatch"] == pytest.approx(1 / 3)
    assert means["TopKAccuracy"] == pytest.approx(1)
    assert means["Hamming"] == pytest.approx(0)
