"""Per-image losses: (prediction, target) -> (B,). One family a file."""
