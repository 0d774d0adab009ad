"""Capture in front of endpoints that are not ours: hosted models, judges, other servers, several by name.

An agent calls ``/to/{name}/rollout/{id}/attempt/{id}/v1/...`` with its attempt's own key. The policy's own edge (keys,
addresses, retries that count once, images, an answer that is stored before its end goes out) stands in front of a
forwarder. Invariant: the upstream's key is known to the relay alone; it is in no answer, error, span or resource.
"""
