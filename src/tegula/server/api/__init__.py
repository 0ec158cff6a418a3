"""The HTTP API: routes, problem bodies, tokens, server-sent events."""
