"""Lightning callbacks: progress with throughput and data wait, weight EMA, the run directory."""
