"""A rollout's way from runner to replica to training step as one OpenTelemetry trace, and how it leaves the store."""
