"""Model parallelism: the partition, the process groups, the collectives and the layers."""
