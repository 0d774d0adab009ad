"""The wire APIs that are captured, one file each."""

from lightning_ray.capture.dialects.base import Body as Body
from lightning_ray.capture.dialects.base import Dialect as Dialect
from lightning_ray.capture.dialects.base import openai_error as openai_error
from lightning_ray.capture.dialects.chat import Chat
from lightning_ray.capture.dialects.completions import Completions
from lightning_ray.capture.dialects.messages import Messages
from lightning_ray.capture.dialects.responses import Responses

DIALECTS: dict[str, Dialect] = {dialect.path: dialect for dialect in (Chat(), Completions(), Responses(), Messages())}
"""By path."""
