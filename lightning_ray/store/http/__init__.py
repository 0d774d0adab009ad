"""The store over HTTP: Agent Lightning 0.3's REST paths and ours beside them, OTLP, and the client of both."""
