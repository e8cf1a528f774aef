"""Vision DP: whole images (or frames) spread over the ranks of a group, and their features made whole."""
