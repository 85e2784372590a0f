"""Factors -> scores."""
