"""Settings of one upstream: where it is, who pays, and how much may be asked of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, SecretStr, field_validator, model_validator

from lightning_ray.config import Settings
from lightning_ray.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = ("main_llm",)


class Prices(Settings):
    """What tokens cost."""

    price_input_per_million: float = Field(default=0.0, ge=0)
    price_cached_input_per_million: float | None = Field(default=None, ge=0)
    """Of prompt tokens that the upstream had cached; without one, as others."""
    price_output_per_million: float = Field(default=0.0, ge=0)


class Upstream(Prices):
    """An endpoint that speaks OpenAI's or Anthropic's API."""

    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str
    """As the client of its kind takes it: up to and including ``/v1`` (or what stands for it) for OpenAI's, without for
    Anthropic's.
    """
    kind: Literal["openai", "anthropic"] = "openai"
    """How the key is sent: ``Authorization: Bearer`` or ``x-api-key``."""
    model: str | None = None
    """Stands in for whatever model a client names; without one, the client's name goes on."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Put into each model call over what the client asks for, as ``{"temperature": 0}``; None takes one out."""
    api_key_env: str | None = None
    """The environment variable that holds the key: of the script, otherwise of the relay's own process."""
    api_key: SecretStr | None = None
    """The key itself; ``api_key_env`` keeps it out of the script."""
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Sent with each request, over all others."""
    max_concurrent: int = Field(default=256, ge=1)
    """Calls at once; further ones wait."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Of prompt and answer; a call is held to take its length and its ``max_tokens`` until it told what it took."""
    wait_seconds: float = Field(default=300.0, gt=0)
    """How long a call waits for these limits before it is answered 429."""
    retries: int = Field(default=4, ge=0)
    """After a failed connection, 429 or 5xx, as long as nothing of an answer has come."""
    retry_seconds: float = Field(default=120.0, ge=0)
    """No retry begins later."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """For silence of the upstream; an answer may take as long as it likes while it comes."""
    ask_for_usage: bool = True
    """Have streams of chat and completions end with their usage, which clients that did not ask for it do not see."""
    max_spend: float | None = Field(default=None, gt=0)
    """In the currency of the prices. Once it is reached further calls are answered 402; those at work go on."""

    @field_validator("base_url")
    @classmethod
    def _address(cls, base_url: str) -> str:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("give an address that begins with http:// or https://")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("no user, query or fragment goes here; send secrets by api_key_env or headers")
        return base_url.rstrip("/")

    @field_validator("api_key")
    @classmethod
    def _sendable(cls, key: SecretStr | None) -> SecretStr | None:
        return None if key is None else SecretStr(sendable(key.get_secret_value(), "the key"))

    @field_validator("headers")
    @classmethod
    def _sendable_headers(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        return {name: SecretStr(sendable(value.get_secret_value(), name)) for name, value in headers.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Upstream:
        if self.api_key is not None and self.api_key_env is not None:
            raise ValueError("give api_key_env or api_key, not both")
        if self.max_spend is not None and not (self.price_input_per_million or self.price_output_per_million):
            raise ValueError("max_spend needs price_input_per_million and price_output_per_million")
        return self

    def url(self, path: str) -> str:
        """Where a path of the relay's (``/v1/...``, ``/tokenize``) is at the upstream."""
        root = self.base_url.removesuffix("/v1")
        if self.kind == "openai" and path.startswith("/v1/"):
            return self.base_url + path.removeprefix("/v1")
        return root + path

    def with_key(self) -> Upstream:
        """With the key itself where this process's environment has it."""
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        if not key:
            return self
        return self.model_copy(update={"api_key": SecretStr(sendable(key, "the key")), "api_key_env": None})

    def own_headers(self) -> dict[str, str]:
        """The key and the further headers. Raises ConfigError if the variable of the key is not set."""
        upstream = self.with_key()
        if upstream.api_key_env is not None:
            raise ConfigError(f"api_key_env={self.api_key_env!r}: there is no such environment variable; set it")
        headers: dict[str, str] = {}
        if upstream.api_key is not None:
            key = upstream.api_key.get_secret_value()
            headers = {"authorization": f"Bearer {key}"} if self.kind == "openai" else {"x-api-key": key}
        return headers | {name.lower(): value.get_secret_value() for name, value in self.headers.items()}

    def secrets(self) -> list[str]:
        """What must not get out: the key and the values of the further headers."""
        key = self.with_key().api_key
        return [secret.get_secret_value() for secret in (key, *self.headers.values()) if secret is not None]


def sendable(value: str, what: str) -> str:
    """The value of a header, without white space around it. Raises ValueError, which does not quote it."""
    value = value.strip()
    if not value or not value.isascii() or not value.isprintable():
        raise ValueError(f"{what} must be printable ASCII, and not empty")
    return value


def check_upstreams(upstreams: Mapping[str, Upstream]) -> None:
    """Raises ConfigError for a name that cannot be part of an address or is taken."""
    for name, upstream in upstreams.items():
        if not isinstance(upstream, Upstream):
            raise ConfigError(f"relay {name!r} is {type(upstream).__name__}; give an lr.Upstream(base_url=...)")
        check_name("relay", name)


def check_name(what: str, name: str) -> None:
    """Raises ConfigError for a name that cannot be part of an address or is taken."""
    if name in _RESERVED or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name!r}: a name has letters, digits, '.', '_' and '-', and is not {' or '.join(_RESERVED)}"
        )
