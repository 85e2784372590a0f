"""What shows results: page, figures, tables. It computes nothing."""
