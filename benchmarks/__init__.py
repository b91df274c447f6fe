"""What this package is measured against, the cases, and the commands that measure and report."""
