"""What is recovered: prompts, or captured features without them."""
