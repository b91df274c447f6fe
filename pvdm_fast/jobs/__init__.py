"""What every long command needs: one sentence for an error, files that survive, signals, progress, processes."""
