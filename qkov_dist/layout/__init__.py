"""Where each head lives, and the proof of it."""
