"""Any command over a grid of its options: each cell a normal run in a folder of its own."""
