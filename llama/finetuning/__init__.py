"""Fine-tuning of soft prompts and LoRA over the sharded model: settings, steps, the loop, logs and the run's folder."""
