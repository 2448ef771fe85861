"""What predictions are written as."""
