"""An HTTP server with OpenAI's API over the decode engine."""
