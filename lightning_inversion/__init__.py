"""Reads a language model's input back out of its hidden states."""

__version__ = "0.1.0"
