"""An engine behind OpenAI's interface, over HTTP. Needs the extra `server`."""
