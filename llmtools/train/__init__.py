"""Training a model's adapters: options, rows, the trainer's arguments and callbacks, the run's folder."""
