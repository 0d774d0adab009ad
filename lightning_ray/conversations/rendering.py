"""Conversations as the policy sees them: each of the assistant's messages as the call that would have sampled it.

The prompt is what the chat template makes of the messages before, ready to be answered; what was sampled is what the
template adds to it for the answer, up to the token that ends a turn. So the marks are exact, or there are none: where
an answer does not follow its prompt letter by letter, the template is refused. Calls are joined as those of rollouts
are (``trajectories.join``), so a template that rewrites earlier turns (drops their reasoning, say) gives rows of their
own, each of which is what the engine would be asked.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_ray.conversations.files import Conversation, is_trained
from lightning_ray.errors import ConfigError
from lightning_ray.trajectories.join import ModelCall

SHOWN = 40
"""Characters shown of texts that differ."""


class Renderer:
    """A model's tokenizer and chat template; ``arguments`` are the template's own (``enable_thinking``, say)."""

    def __init__(self, tokenizer: Any, ends: Collection[int], arguments: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._ends = frozenset(ends)
        self._arguments = dict(arguments or {})

    @classmethod
    def of_model(cls, folder: Path, arguments: Mapping[str, Any] | None = None) -> Renderer:
        """Of a model's folder. Raises ConfigError if it has no tokenizer, chat template or end token."""
        tokenizer = load_tokenizer(folder)
        if not tokenizer.chat_template:
            raise ConfigError(f"{folder}: its tokenizer has no chat template; add chat_template.jinja to the folder")
        ends = end_tokens(folder) | {tokenizer.eos_token_id} - {None}
        if not ends:
            raise ConfigError(f"{folder}: no token ends a turn; set eos_token_id in its generation_config.json")
        return cls(tokenizer, ends, arguments)

    def calls(self, conversation: Conversation) -> list[ModelCall]:
        """The calls that are trained on. Raises ConfigError where the template allows no exact marks."""
        messages = conversation.messages
        return [self._call(conversation, index) for index, message in enumerate(messages) if is_trained(message)]

    def _call(self, conversation: Conversation, index: int) -> ModelCall:
        where = f"{conversation.where}, message {index}"
        prompt = self._render(conversation, conversation.messages[:index], True, where)
        whole = self._render(conversation, conversation.messages[: index + 1], False, where)
        if not whole.startswith(prompt):
            at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
            raise ConfigError(
                f"{where}: the chat template does not tell what the assistant said: the prompt goes on with "
                f"{prompt[at : at + SHOWN]!r}, the answered conversation with {whole[at : at + SHOWN]!r}. Give the "
                "template_arguments with which an answer follows its prompt, or another chat template"
            )
        prompt_ids, said = self._encode(prompt), self._answer(prompt, whole)
        ends = [place for place, token in enumerate(said) if token in self._ends]
        if not ends:
            raise ConfigError(
                f"{where}: the chat template ends the assistant's message with {whole[-SHOWN:]!r}, in which none of "
                f"the model's end tokens is ({self._tokenizer.convert_ids_to_tokens(sorted(self._ends))}): what is "
                "learned would never end. Set eos_token_id in generation_config.json to the token that ends a turn"
            )
        return model_call(prompt_ids, said[: ends[-1] + 1])

    def _answer(self, prompt: str, whole: str) -> list[int]:
        """Ids of what follows the prompt; encoded alone where the two would melt into one token."""
        prompt_ids, ids = self._encode(prompt), self._encode(whole)
        if ids[: len(prompt_ids)] == prompt_ids:
            return ids[len(prompt_ids) :]
        return self._encode(whole[len(prompt) :])

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _render(self, conversation: Conversation, messages: Sequence[dict[str, Any]], ask: bool, where: str) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=conversation.tools,
                add_generation_prompt=ask,
                tokenize=False,
                **self._arguments,
            )
        except Exception as error:  # jinja's, and whatever the template raises itself
            raise ConfigError(f"{where}: the chat template refuses the messages up to here: {error}") from error
        return text


def model_call(prompt_ids: Sequence[int], sampled_ids: Sequence[int]) -> ModelCall:
    """A call without log probabilities and weight versions, which nobody knows."""
    count = len(sampled_ids)
    ids = (np.asarray(prompt_ids, np.int32), np.asarray(sampled_ids, np.int32))
    return ModelCall(*ids, np.zeros(count, np.float32), np.full(count, -1, np.int32))


def load_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer. Raises ConfigError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: its tokenizer cannot be loaded: {error}") from error


def end_tokens(folder: Path) -> set[int]:
    """The ids at which the model's generation ends."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        told = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        found |= {told} if isinstance(told, int) else set(told or ())
    return found
