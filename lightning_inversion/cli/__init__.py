"""The command line: its parser, and fit, validate and predict of Lightning."""
