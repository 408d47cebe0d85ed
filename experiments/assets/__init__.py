"""What the experiments ask a model unless they are told otherwise."""
