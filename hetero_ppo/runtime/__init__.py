"""What surrounds a run's trainer: heartbeats, the terminal, work that would be lost."""
