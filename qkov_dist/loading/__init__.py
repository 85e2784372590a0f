"""A checkpoint -> a model in eval mode and its tokenizer, or a refusal."""
