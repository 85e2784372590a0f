"""The commands of `qkov`: arguments, and one call each."""
