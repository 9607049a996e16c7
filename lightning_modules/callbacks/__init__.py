"""Lightning callbacks: everything that happens during training besides the training steps."""
