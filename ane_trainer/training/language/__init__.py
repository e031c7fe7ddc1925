"""Language models: loading them, batches by name with their own loss, adapters, tuning."""
