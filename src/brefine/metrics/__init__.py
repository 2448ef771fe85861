"""What an evaluation measures: overlaps first, then everything that is counted from them."""
