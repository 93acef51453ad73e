"""Training data: records, and the training examples made of them."""
