"""Whether tokens reproduce hidden states: thresholds, rivals, certificates."""
