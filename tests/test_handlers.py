"""Serve's handlers over a library that configures logging anew."""

from __future__ import annotations

import logging
from logging.config import dictConfig
from logging.handlers import MemoryHandler
from pathlib import Path

from deployments.handlers import LOGGER, handlers_kept


def test_serves_handler_writes_to_its_file_after_logging_was_configured_anew(tmp_path: Path) -> None:
    file = logging.FileHandler(tmp_path / "replica.log")
    handler = MemoryHandler(1, target=file)
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    try:
        with handlers_kept():
            dictConfig({"version": 1, "disable_existing_loggers": False})
            assert handler.target is None, "it is closed, as every handler is"
        assert handler.target is file
        logger.error("still here")
        assert "still here" in (tmp_path / "replica.log").read_text()
    finally:
        logger.removeHandler(handler)
