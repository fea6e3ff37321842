"""The command line of Lightning: fit, validate, predict."""
