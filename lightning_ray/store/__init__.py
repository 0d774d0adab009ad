"""The span store: every span and every state change of a run, acknowledged once durable, in a folder that
outlives its processes."""

from lightning_ray.store.base import Finish, Store
from lightning_ray.store.client import LocalStoreClient, StoreClient
from lightning_ray.store.core import SpanStore
from lightning_ray.store.query import Page
from lightning_ray.store.schema import SPAN_SCHEMA, read_spans, spans_to_batch
from lightning_ray.store.shards import ShardedStore
from lightning_ray.store.view import StoreView, open_folder

__all__ = [
    "SPAN_SCHEMA",
    "Finish",
    "LocalStoreClient",
    "Page",
    "ShardedStore",
    "SpanStore",
    "Store",
    "StoreClient",
    "StoreView",
    "open_folder",
    "read_spans",
    "spans_to_batch",
]
