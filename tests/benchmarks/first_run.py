"""What the first ``predict`` at a depth measures, here and in another checkout of the package.

    python -m tests.benchmarks.first_run --depths 1 8 --against ../other
    python -m tests.benchmarks.first_run --audit --against ../other

CPU seconds of ``predict`` of one prompt with a cache that holds the converted model alone, less
those of importing torch, transformers and lightning and loading the model; and the ratio of the
two checkouts. With ``--audit``, those of a whole ``audit`` of four prompts: 16 cells at depths 1
and 8.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning_inversion.cache import ENVIRONMENT
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.sources import resolve_source
from tests.benchmarks.second_run import LOADING, Cost, cost, predict

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts.txt"


def in_package(work: Callable[[], Cost], model: Path, package: Path) -> float:
    """CPU seconds of a command of the package in a folder, whose cache holds the model alone."""
    with tempfile.TemporaryDirectory() as cache:
        (Path(cache) / model.name).symlink_to(model)
        os.environ[ENVIRONMENT] = cache
        here = Path.cwd()
        os.chdir(package)  # -m finds the package of the working folder first
        try:
            return work().cpu
        finally:
            os.chdir(here)
            del os.environ[ENVIRONMENT]


def audit(prompts: list[str]) -> Cost:
    """What ``audit`` of prompts takes, at its own depths."""
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "prompts.txt"
        file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
        return cost([
            "-m", "lightning_inversion", "audit", f"--prompts={file}",
            f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu",
        ])  # fmt: skip


def main() -> None:
    """Print a row for each depth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 8, 15, 30])
    parser.add_argument("--against", type=Path, help="folder of another checkout")
    parser.add_argument("--audit", action="store_true", help="in place of predict")
    options = parser.parse_args()
    model = Path(resolve_source(TransformerSpec.model).location)
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[:4]
    loading = min(cost(["-c", LOADING, str(model)]).cpu for _ in range(2))
    print("| | CPU s | the other | ratio |\n|---|---|---|---|", flush=True)
    runs = [(f"depth {depth}", partial(predict, depth), loading) for depth in options.depths]
    if options.audit:
        runs = [("audit", partial(audit, prompts), 0.0)]
    for name, work, less in runs:
        ours = in_package(work, model, Path.cwd()) - less
        shown = " | "
        if options.against:
            theirs = in_package(work, model, options.against) - less
            shown = f"{theirs:.1f} | {ours / theirs:.2f}"
        print(f"| {name} | {ours:.1f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
