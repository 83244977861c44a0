"""What becomes of a teacher's output before a loss sees it: normalisers."""
