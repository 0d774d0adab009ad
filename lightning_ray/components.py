"""Parts of a trainer, given as they are, or as a class, a factory, a dotted name or a mapping that makes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from lightning_ray.errors import ConfigError

T = TypeVar("T")
Spec: TypeAlias = T | type[T] | Callable[[], T] | str | Mapping[str, Any]
"""How a part may be given."""


def build_component(
    spec: Spec[T] | None,
    *,
    expected_type: type[T],
    spec_name: str,
    default_factory: Callable[[], T | None] = lambda: None,
    dict_default_cls: type[T] | None = None,
) -> T | None:
    """The part that ``spec`` means; None means what ``default_factory`` makes.

    An instance is itself; a class or another callable is called; a string is the dotted name of one; a mapping has the
    dotted name under ``"type"`` (``dict_default_cls`` otherwise), and arguments. Raises ConfigError naming
    ``spec_name`` for anything else, and for what comes out as another type.
    """
    if spec is None:
        return default_factory()
    made = spec
    if not isinstance(spec, expected_type):
        make, arguments = _maker(spec, spec_name, dict_default_cls)
        try:
            made = make(**arguments)
        except TypeError as error:
            raise ConfigError(f"{spec_name}={spec!r:.80}: {error}") from error
    if not isinstance(made, expected_type):
        raise ConfigError(
            f"{spec_name}={spec!r:.80} is a {type(made).__name__}, not a {expected_type.__name__}; give one, its "
            'class, a factory, a dotted name, or {"type": dotted name, ...}'
        )
    return made


def _maker(spec: Any, spec_name: str, default: type[Any] | None) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What to call, and with which arguments; ``spec`` itself where it makes nothing."""
    if isinstance(spec, Mapping):
        arguments = dict(spec)
        name = arguments.pop("type", None)
        if name is None and default is None:
            raise ConfigError(f'{spec_name}={spec!r:.80} has no "type", the dotted name of a class')
        return (load(name, spec_name) if name is not None else default), arguments  # type: ignore[return-value]
    if isinstance(spec, str):
        return load(spec, spec_name), {}
    return (spec if callable(spec) else lambda: spec), {}


def load(name: Any, spec_name: str) -> Callable[..., Any]:
    """The class or factory of a dotted name. Raises ConfigError if there is none."""
    module, _, attribute = str(name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{spec_name}={name!r}: {error}; give the dotted name of a class") from error
    if not callable(found):
        raise ConfigError(f"{spec_name}={name!r} is a {type(found).__name__}, not a class or factory")
    return found
