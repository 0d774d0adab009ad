"""Find a better prompt for an agent that sorts support tickets.

    OPENAI_API_KEY=... lightning-ray train examples/prompts
    lightning-ray train examples/prompts --name mine --resume

Both the agent's model and the one that criticises and edits stand behind the run's relay, which keeps the key, and
stops at 2 dollars. OPENAI_BASE_URL names any other endpoint that speaks OpenAI's API (a key is needed there too,
whatever it is).
"""

from __future__ import annotations

import os

import lightning_ray as lr
from examples.prompts.agent import PROMPT, sorter
from examples.prompts.tickets import TRAIN, VALIDATION


def upstream(model: str, price_in: float, price_out: float) -> lr.Upstream:
    """A model of the endpoint; prices are dollars for a million tokens."""
    return lr.Upstream(
        base_url=os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1"),
        api_key_env="OPENAI_API_KEY",
        model=model,
        price_input_per_million=price_in,
        price_output_per_million=price_out,
        max_spend=2.0,
    )


def main() -> None:
    trainer = lr.Trainer(
        algorithm=lr.APO(
            optimizer="optimizer",
            beam_width=2,
            branch_factor=2,
            beam_rounds=4,
            gradient_batch_size=4,
            val_batch_size=8,
            target_score=1.0,
        ),
        relays={"sorter": upstream("gpt-4.1-nano", 0.1, 0.4), "optimizer": upstream("gpt-4.1-mini", 0.4, 1.6)},
        initial_resources={"prompt_template": lr.PromptTemplate(template=PROMPT, engine="f-string")},
        adapter=lr.TraceToMessages(),
        name="prompts",
    )
    trainer.fit(sorter, train_dataset=TRAIN, val_dataset=VALIDATION)


if __name__ == "__main__":
    main()
