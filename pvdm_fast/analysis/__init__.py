"""What a model computes and keeps, counted without running it: arithmetic, saved memory, calls of operations."""
