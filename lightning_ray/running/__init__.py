"""What a runner is made of: an attempt's way (``play``), its resources, what the store is told, whose fault an end is.

``lightning_ray.runner`` puts them together.
"""
