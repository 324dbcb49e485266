"""`d2lora fit`: from a task's rows to the best adapter, by cross-validation within them."""
