"""Data: reading, loading and drawing it."""
