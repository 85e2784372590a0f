"""Arrays in, tests out."""
