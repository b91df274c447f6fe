"""Counts what a model computes and keeps, without running it: arithmetic, saved memory, calls of operations."""
