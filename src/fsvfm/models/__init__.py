"""Vision transformers, the pre-training networks, and downstream heads."""
