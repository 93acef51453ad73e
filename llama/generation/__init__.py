"""From a model to text: sampling, the engine that runs batches, and the `Llama` that people use."""
