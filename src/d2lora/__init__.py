"""d2lora."""
