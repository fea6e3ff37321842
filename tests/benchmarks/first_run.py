"""What the first ``predict`` at a depth measures, here and in another checkout of the package.

    python -m tests.benchmarks.first_run --depths 1 8 --against ../other

CPU seconds of ``predict`` of one prompt with a cache that holds the converted model alone, less
those of importing torch, transformers and lightning and loading the model; and the ratio of the
two checkouts.
"""

import argparse
import os
import tempfile
from pathlib import Path

from lightning_inversion.cache import ENVIRONMENT
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.sources import resolve_source
from tests.benchmarks.second_run import LOADING, cost, predict


def first_run(depth: int, model: Path, package: Path, loading: float) -> float:
    """CPU seconds of a first run of the package in a folder, less those of loading."""
    with tempfile.TemporaryDirectory() as cache:
        (Path(cache) / model.name).symlink_to(model)
        os.environ[ENVIRONMENT] = cache
        here = Path.cwd()
        os.chdir(package)  # -m finds the package of the working folder first
        try:
            return predict(depth).cpu - loading
        finally:
            os.chdir(here)
            del os.environ[ENVIRONMENT]


def main() -> None:
    """Print a row for each depth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 8, 15, 30])
    parser.add_argument("--against", type=Path, help="folder of another checkout")
    options = parser.parse_args()
    model = Path(resolve_source(TransformerSpec.model).location)
    loading = min(cost(["-c", LOADING, str(model)]).cpu for _ in range(2))
    print(
        "| depth | first run measures: CPU s | the other | ratio |\n|---|---|---|---|", flush=True
    )
    for depth in options.depths:
        ours = first_run(depth, model, Path.cwd(), loading)
        theirs = first_run(depth, model, options.against, loading) if options.against else None
        shown = "" if theirs is None else f"{theirs:.1f} | {ours / theirs:.2f}"
        print(f"| {depth} | {ours:.1f} | {shown or ' | '} |", flush=True)


if __name__ == "__main__":
    main()
