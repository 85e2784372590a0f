"""Files -> tokenized samples -> batches."""
