"""Commands: a typed `main` each, which `llama-shards WORD` and the files at the root start."""
