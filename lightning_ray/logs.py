"""Where the library's log records go. Signatures are those of Agent Lightning 0.3; the logger is ``lightning_ray``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = "lightning_ray"
PLAIN = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")


def setup_logging(
    level: int | str = "INFO",
    *,
    console: bool = True,
    color: bool | Mapping[str, Any] = True,
    propagate: bool = False,
    disable_existing_loggers: bool = False,
    capture_warnings: bool = False,
    submodule_levels: Mapping[str, int | str] | None = None,
    extra_handlers: Sequence[logging.Handler] | None = None,
    formatter: logging.Formatter | None = None,
    apply_to: Sequence[str] | None = None,
    files: str | Mapping[str, str] | None = None,
) -> None:
    """Show what the library logs, on the console and elsewhere. Other loggers stay as they are, unless named.

    Args:
        level: from which on; a number or a name.
        console, color: whether on the console, and how: plain, or by rich, with options of its ``RichHandler``.
        propagate: whether handlers of loggers above get the records too.
        disable_existing_loggers: silence all other loggers that there are.
        capture_warnings: log what ``warnings`` tells.
        submodule_levels: by logger, as ``{"lightning_ray.store": "DEBUG"}``.
        extra_handlers: more handlers.
        formatter: of handlers that have none.
        apply_to: loggers that get the same handlers and level.
        files: a file, or one for each named logger.

    Raises ValueError for a level that there is not.
    """
    logger = setup_module_logging(
        level,
        name=ROOT,
        console=console,
        color=color,
        propagate=propagate,
        disable_existing_loggers=disable_existing_loggers,
    )
    for handler in extra_handlers or ():
        logger.addHandler(handler)
    for name, path in {ROOT: files}.items() if isinstance(files, str) else (files or {}).items():
        _write_to(logging.getLogger(name), Path(path), formatter)
    for handler in logger.handlers:
        if handler.formatter is None and formatter is not None:
            handler.setFormatter(formatter)
    for name, own in (submodule_levels or {}).items():
        logging.getLogger(name).setLevel(own)
    for name in apply_to or ():
        other = logging.getLogger(name)
        other.handlers, other.propagate = list(logger.handlers), False
        other.setLevel(logger.level)
    if capture_warnings:
        logging.captureWarnings(True)


def setup_module_logging(
    level: int | str = "INFO",
    *,
    name: str = ROOT,
    console: bool = True,
    color: bool | Mapping[str, Any] = True,
    propagate: bool = False,
    disable_existing_loggers: bool = False,
) -> logging.Logger:
    """Give one logger a level and, with ``console``, a handler in place of those that it has; returns it."""
    logger = logging.getLogger(name)
    logger.setLevel(level)
    logger.propagate = propagate
    if disable_existing_loggers:
        for other in logging.root.manager.loggerDict.values():
            if isinstance(other, logging.Logger) and not f"{other.name}.".startswith(f"{name}."):
                other.disabled = True
    logger.handlers = [_console(color)] if console else []
    return logger


def configure_logger(level: int | str = logging.INFO, name: str = ROOT) -> logging.Logger:
    """As ``setup_module_logging``, which stands in its place."""
    warnings.warn("configure_logger is deprecated; call setup_logging", DeprecationWarning, stacklevel=2)
    return setup_module_logging(level, name=name)


def _console(color: bool | Mapping[str, Any]) -> logging.Handler:
    if color is False:
        handler: logging.Handler = logging.StreamHandler()
        handler.setFormatter(PLAIN)
        return handler
    from rich.logging import RichHandler

    return RichHandler(**(color if isinstance(color, Mapping) else {}))


def _write_to(logger: logging.Logger, path: Path, formatter: logging.Formatter | None) -> None:
    """Have a file get the logger's records; once, however often it is asked for."""
    known = [each.baseFilename for each in logger.handlers if isinstance(each, logging.FileHandler)]
    if str(path.absolute()) not in known:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(formatter or PLAIN)
        logger.addHandler(handler)
