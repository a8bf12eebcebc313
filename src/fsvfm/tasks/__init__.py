"""LightningModules: one per task, each building its own network and optimiser from plain values."""
