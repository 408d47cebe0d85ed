"""Load on an endpoint of OpenAI's interface."""
