"""Which tokens are run first: what each proposer ranks them by."""
