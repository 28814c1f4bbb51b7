"""The server: OpenAI's protocol over HTTP, on top of the engine."""
