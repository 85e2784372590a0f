"""The commands of `qkov`, one file each: its arguments, and one call. What a command needs is imported by that call."""
