"""Lightning callbacks: what happens during a training besides the training steps."""
