"""Training data: records, and the examples that they become."""
