"""What cannot work is refused before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_ray.errors import ConfigError
from lightning_ray.relay.settings import Upstream
from lightning_ray.templates import TemplateError, holes
from lightning_ray.types import NamedResources, PromptTemplate

if TYPE_CHECKING:
    from lightning_ray.algorithms.apo.settings import APO


def check_settings(apo: APO[Any], relays: Mapping[str, Upstream]) -> None:
    """There must be one optimizing model: a client, or the name of a relay. Raises ConfigError."""
    client, name = apo.async_openai_client, apo.optimizer
    if (client is None) == (name is None):
        raise ConfigError(
            "APO needs a model that criticises and edits, and one only: APO(AsyncOpenAI(...)), or "
            f'APO(optimizer="NAME") with Trainer(relays={{"NAME": lr.Upstream(...)}}); given are client={client!r:.60} '
            f"and optimizer={name!r}"
        )
    if name is None:
        return
    if name not in relays:
        raise ConfigError(f"optimizer={name!r} is none of the Trainer's relays: {sorted(relays) or 'there are none'}")
    if relays[name].kind != "openai":
        raise ConfigError(
            f"optimizer={name!r}: its upstream must speak OpenAI's API, and is of kind {relays[name].kind!r}"
        )


def check_prompts(apo: APO[Any]) -> None:
    """The user's prompt files must be there, and ask for what there is. Raises ConfigError."""
    from lightning_ray.algorithms.apo.prompt_files import FIELDS, read_prompts

    for setting in FIELDS:
        if given := getattr(apo, setting):
            read_prompts(setting, given, ())


def templates_of(resources: NamedResources | None) -> dict[str, PromptTemplate]:
    """The templates to be optimised, by name. Raises ConfigError if there is none, or one is malformed."""
    found = {name: each for name, each in (resources or {}).items() if isinstance(each, PromptTemplate)}
    if not found:
        kinds = {name: type(each).__name__ for name, each in (resources or {}).items()}
        raise ConfigError(
            f"initial_resources={kinds} hold no PromptTemplate to optimise; give one: "
            'Trainer(initial_resources={"prompt_template": lr.PromptTemplate(template="...", engine="f-string")})'
        )
    for name, template in found.items():
        try:
            holes(template.engine, template.template)
        except TemplateError as error:
            raise ConfigError(f"initial_resources[{name!r}]: {error}") from None
    return found


def check_tasks(train: Any, val: Any) -> None:
    """Raises ConfigError without tasks to learn from, or to score on."""
    for name, data, use in (("train_dataset", train, "criticises"), ("val_dataset", val, "scores")):
        if data is None or not len(data):
            raise ConfigError(f"{name} has no task; APO {use} prompts by what becomes of its tasks: give at least one")
