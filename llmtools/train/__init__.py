"""Training of adapters: options, training examples, the trainer with its arguments and callbacks, the run folder."""
