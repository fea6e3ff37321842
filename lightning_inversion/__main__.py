"""``python -m lightning_inversion`` and the console script."""

import sys


def main() -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 wrong usage)."""
    from lightning_inversion.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
