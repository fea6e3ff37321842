"""Which input tokens an output depends on, and a page that shows it."""
