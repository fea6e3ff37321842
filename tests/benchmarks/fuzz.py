"""Thousands of whole command lines on damaged input, counted by how they end, as a Markdown table.

    python -m tests.benchmarks.fuzz                       6,750 cases, half an hour
    python -m tests.benchmarks.fuzz --share 0.05          every twentieth of them
    python -m tests.benchmarks.fuzz weights --only 17     one case again

Each case is run in a process that ends with it where it hangs. A case is right, is refused in one
line (exit code 1 or 2), or ends badly: in a traceback, in a message of many lines, with a wrong
result, refused though it was right, hung, with raw control characters on the terminal, with a file
outside of its folder, or with code run. What ends badly is printed with its command line.
"""

import argparse
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from lightning_inversion import __main__ as command_line
from lightning_inversion.cache import ENVIRONMENT
from tests.hostile_cases import Case, Place, prepare
from tests.hostile_files import KINDS

# Imported before the processes are forked, so that no case waits for it.
import lightning_inversion.cli.lightning  # isort: skip
import lightning_inversion.report.figures  # isort: skip  # noqa: F401

Kind = Callable[[random.Random, Place], Case]
GOOD = ("right", "refused")
BAD = ("traceback", "many lines", "wrong", "refused wrongly", "hung", "raw", "outside", "ran code")
MEMORY = 12 * 2**30
"""Bytes of address space that a case may have."""
_STEERS = {*map(chr, [*range(9), *range(14, 32), 127, *range(0x80, 0xA0)]), *"\u202a\u202e\u2066"}


@contextmanager
def prepared() -> Iterator[Path]:
    """A folder with `base`, right files of every kind, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("base", "home", "tmp"):
            (root / name).mkdir()
        os.environ |= {"HOME": str(root / "home"), ENVIRONMENT: str(root / "base" / "cache")}
        nothing = io.StringIO()
        with _in_folder(root / "base"), redirect_stdout(nothing), redirect_stderr(nothing):
            prepare(root / "base", command_line.main)
        yield root


@contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def outcome(kind: Kind, number: int, root: Path) -> tuple[str, str]:
    """How one case ends: one of `GOOD` or `BAD`; and its command line, with what is bad."""
    place = Place(root / "base", root / "case")
    shutil.rmtree(place.folder, ignore_errors=True)
    place.folder.mkdir()
    for name in ("model", "tiny.gguf"):
        (place.folder / name).symlink_to(place.base / name)
    place.copy("prompts.txt")
    os.chdir(place.folder)
    case = kind(random.Random(f"{kind.__name__} {number}"), place)
    cache = place.folder if (place.folder / "cache").exists() else place.base
    os.environ[ENVIRONMENT] = str(cache / "cache")
    before = _files(root)
    out, err = io.StringIO(), io.StringIO()
    code, fault = 0, ""
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = command_line.main(case.args)
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            own = [one for one in traceback.extract_tb(error.__traceback__)
                   if "lightning_inversion/" in one.filename][-1]  # fmt: skip
            fault = (f"{type(error).__name__}: {str(error)[:150]!r} ({frame.filename[-40:]}:"
                     f"{frame.lineno}, from {own.filename[-30:]}:{own.lineno})")  # fmt: skip
    printed, message = out.getvalue(), err.getvalue()
    line = shlex.join(case.args)
    ran = list(root.rglob("ran"))
    if ran:
        return "ran code", line
    if _files(root) != before:
        return "outside", line
    if fault:
        return "traceback", f"{line}: {fault}"
    if _STEERS & {*printed, *message}:
        return "raw", f"{line}: {sorted(_STEERS & {*printed, *message})}"
    if code:
        errors = [one for one in message.splitlines() if one.startswith("lightning-inversion: ")]
        last = message.rstrip("\n").rpartition("\n")[2]
        if len(errors) != 1 or last != errors[0] or "Traceback" in message:
            return "many lines", f"{line}: {message[:600]!r}"
        return ("refused wrongly" if case.accept else "refused"), f"{line}: {last}"
    try:
        case.check(printed)
    except Exception as error:
        return "wrong", f"{line}: {type(error).__name__}: {str(error)[:300]}"
    return "right", line


def _files(root: Path) -> dict[str, tuple[int, int]]:
    """What lies outside of the case's folder and of the cache."""
    found = {}
    for folder, folders, files in os.walk(root):
        # pip asks rustc for its version, which leaves a folder.
        folders[:] = [one for one in folders if one not in ("case", "cache", ".rustup")]
        for name in files:
            status = Path(folder, name).lstat()
            found[f"{folder}/{name}"] = (status.st_size, status.st_mtime_ns)
    return found


def _work(kind: Kind, numbers: Sequence[int], root: Path, results: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tempfile.tempdir = str(root / "tmp")
    with Path(os.devnull).open("w") as nothing:  # what libraries in C print
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    for number in numbers:
        results.send((number, *outcome(kind, number, root)))


def run_kind(
    kind: Kind, numbers: Sequence[int], root: Path, limit: float = 120
) -> Iterator[tuple[int, str, str]]:
    """Run cases of a kind; yields each one's number, how it ended, and its command line.

    Args:
        kind: of `KINDS`.
        numbers: of the cases.
        root: from `prepared`.
        limit: seconds after which a case has hung.
    """
    context = multiprocessing.get_context("fork")
    left = list(numbers)
    while left:
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(kind, left, root, sending))
        process.start()
        sending.close()
        try:
            while left and receiving.poll(limit):
                yield receiving.recv()
                left.pop(0)
            if left:
                yield left.pop(0), "hung", f"more than {limit:.0f} s"
        except EOFError:
            yield left.pop(0), "traceback", "the process ended"
        process.kill()
        process.join()


def markdown(counts: dict[str, Counter[str]]) -> str:
    """The table: a row for each kind, a column for each outcome."""
    columns = [*GOOD, *BAD]
    total: Counter[str] = sum(counts.values(), Counter())
    lines = [
        f"| input | cases | {' | '.join(columns)} |",
        f"|---|{'---|' * (len(columns) + 1)}",
    ]
    for name, row in [*counts.items(), ("all", total)]:
        cells = [sum(row.values()), *(row[column] for column in columns)]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Run the kinds named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="KIND", help="all if left out")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="number of one case")
    parser.add_argument("--rows", type=Path, help="outcomes are kept here, and not run again")
    parser.add_argument("--limit", type=float, default=120, help="seconds of a case")
    parser.add_argument("--show", choices=[*GOOD, *BAD], nargs="+", default=BAD)
    chosen = parser.parse_args()
    known = {kind.__name__: kind for kind in KINDS}
    if unknown := set(chosen.names) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    counts = {name: Counter[str]() for name in chosen.names or known}
    done: set[tuple[str, int]] = set()
    if chosen.rows and chosen.rows.exists():
        for name, number, ended, _ in map(json.loads, chosen.rows.read_text().splitlines()):
            done.add((name, number))
            counts.setdefault(name, Counter())[ended] += 1
    with prepared() as root:
        for name in chosen.names or known:
            kind = known[name]
            first = chosen.first if chosen.only is None else chosen.only
            count = max(1, round(KINDS[kind] * chosen.share)) if chosen.only is None else 1
            left = [n for n in range(first, first + count) if (name, n) not in done]
            for number, ended, line in run_kind(kind, left, root, chosen.limit):
                counts[name][ended] += 1
                if chosen.rows:
                    with chosen.rows.open("a") as file:
                        file.write(json.dumps([name, number, ended, line]) + "\n")
                if ended in chosen.show:
                    print(f"{name} {number} {ended}: {line}"[:1500], flush=True)
    print(markdown(counts))


if __name__ == "__main__":
    main()
