"""Conversations as chat messages, without a rollout behind them: read from files, rendered to tokens."""
