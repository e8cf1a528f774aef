"""Vision DP: the ranks of a group encode different images (or frames), and all get all features."""
