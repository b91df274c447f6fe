"""Baselines, cases, and the commands that measure and report."""
