"""What is done about heads that harm: their slices held, or their updates scaled, while a model trains."""
