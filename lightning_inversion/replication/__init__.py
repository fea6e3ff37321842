"""The source's experiments, repeated; nothing else imports this."""
