"""The model cut across ranks: who owns what, the groups, the layers and their collectives."""
