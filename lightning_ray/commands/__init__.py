"""The subcommands of ``lightning-ray``, a file each; ``lightning_ray.cli`` tells them apart."""
