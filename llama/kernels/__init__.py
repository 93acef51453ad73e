"""Large matrices and products with them: packed forms, our CPU kernels, and torch where those do not serve."""
