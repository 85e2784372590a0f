"""One pass leaves the factors X and D of every per-sample gradient."""
