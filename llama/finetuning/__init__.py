"""Fine-tuning: soft prompts and LoRA over the sharded model, and the files that PEFT shares with us."""
