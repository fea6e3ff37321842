"""The source's experiments, repeated; nothing else imports this."""

import logging


def log_to_stderr() -> None:
    """Show the package's messages on stderr, for the commands of this folder."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightning_inversion").setLevel(logging.INFO)
