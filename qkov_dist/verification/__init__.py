"""Is it right, and does it predict, on a user's own model?"""
