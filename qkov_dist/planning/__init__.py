"""What a run costs before it runs."""
