"""Lightning callbacks: learning rate, top-k decoding, stopping, rows, checkpoints."""
