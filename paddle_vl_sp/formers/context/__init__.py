"""Context parallelism of PaddleFormers' models: the whole batch in, this rank's part of the sequence inside."""
