"""An engine behind OpenAI's interface."""
