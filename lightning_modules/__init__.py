"""What is learned and measured: encoders, objective, training module, retrieval and metrics."""
