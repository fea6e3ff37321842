"""The experiments of the source, repeated; nothing else imports this."""
