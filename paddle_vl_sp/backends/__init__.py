"""Two implementations of the same operations, custom operators and plain Paddle, and the choice between them."""
