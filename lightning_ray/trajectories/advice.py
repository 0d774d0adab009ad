"""What each reason means, and what to do about it: a paragraph for people."""

from __future__ import annotations

ADVICE: dict[str, str] = {
    "agent_failed": (
        "The agent raised an exception. A failure is no reward of 0: the rollout is left out of its group. Mend the "
        "agent, or catch what is part of the task and return a reward for it. Trainer.dev(agent, tasks) plays it "
        "here, with breakpoints."
    ),
    "at_work": (
        "Not ended yet: queued, or being played. Ask again later; if nothing is playing, the run was ended in the "
        "midst of them, and --resume plays new ones."
    ),
    "below_min_reward": (
        "The reward is below keep.min_reward, and only what reaches it is imitated. If too few do, lower it, take "
        "easier tasks, a larger group_size, or keep.top_share, which takes the best of each task whatever they are."
    ),
    "calls_broken_off": (
        "The model was called, but no call was answered to its end: the client gave up waiting, the replica "
        "restarted, or the agent was stopped. Allow the client more time, or the model fewer tokens (max_tokens)."
    ),
    "calls_failed": (
        "The agent called a model, every call failed at its client, and the agent went on without. See the reasons "
        "below; an agent that cannot work without the model should let the exception out."
    ),
    "cancelled": (
        "The rollout was cancelled: by a call of update_rollout, or because --resume found it open and played it "
        "anew under another id."
    ),
    "evaluation": "Played to evaluate the policy (val_dataset, test_dataset); never trained on.",
    "filtered_out": "keep.filter, the user's own function, did not keep it.",
    "group_of_one": (
        "All other rollouts of its group were left out, and an advantage is relative to the group. See why the "
        "others were; a larger group_size makes it rarer. batch.groups.alone says what becomes of such a group: "
        "drop, keep or resample."
    ),
    "infrastructure_failure": (
        "A part of the system failed, not the agent: a runner died, the model's endpoint was gone or answered with "
        "a 5xx, more often than retries could mend. See the reasons below, memory first, and the logs of runners "
        "and replicas in Ray's session folder. batch.groups.infrastructure = 'resample' plays their groups again."
    ),
    "no_call_of_agent": (
        "Models were called, but not by the agents to train: agent_match is found in no agent's name; or, of several "
        "policies, not this one, or not by one of its agents. See which agents called which model (SELECT model, "
        "agent, count(*) FROM spans GROUP BY ALL). A call's agent is named by the header x-lightning-agent, by "
        "/agent/NAME in the base URL, or by the framework where the tracer sees it."
    ),
    "no_model_call": (
        "The agent ended without a model call that reached the policy. It must call the endpoint it is given: "
        "base_url=llm.endpoint, api_key=llm.api_key, model=llm.model. Check early returns too, and calls whose "
        "failure the agent swallows."
    ),
    "no_reward": (
        "The agent returned None and emitted no reward, or none of a dimension that batch.reward_weights names "
        "(told below). Return a number, or call emit_reward(...) with every dimension; None leaves the rollout out."
    ),
    "no_sampled_token": (
        "The model was called and sampled nothing: max_tokens of 0, a stop sequence at once, or a prompt as long as "
        "the context."
    ),
    "no_token_ids": (
        "The agent called a model, but not the policy: its calls were seen at the client, and no engine told which "
        "tokens it sampled. Give every client that is to be trained llm.endpoint and llm.api_key."
    ),
    "no_variance": (
        "All rewards of the group are the same, so nothing tells its rollouts apart. Take tasks that the policy "
        "solves sometimes, a finer reward, a larger group_size, or more exploration. batch.groups.no_variance = "
        "'resample' plays such tasks again within the step."
    ),
    "not_among_best": (
        "Of each task only the best rollouts are imitated, as many as keep.top_share says; others were better, or as "
        "good and earlier."
    ),
    "not_chosen": (
        "The run's algorithm gave this rollout no advantage: it was played, and left out of the update by choice."
    ),
    "not_settled": (
        "The rollout ended, but its step was never trained on: the step is under way, or was interrupted; --resume "
        "plays it anew under other ids."
    ),
    "prompt_too_long": (
        "A row's first prompt has more tokens than batch.max_prompt_tokens. Shorten the system prompt, the task or "
        "the history that a new conversation begins with, or raise the limit. batch.on_prompt_too_long = "
        "'drop_rows' leaves out only the row."
    ),
    "resampled": (
        "Another rollout of its group failed for the infrastructure, and batch.groups.infrastructure is 'resample': "
        "the whole group was left out, and its task played again. See infrastructure_failure for the cause."
    ),
    "response_too_long": (
        "What follows the first prompt of a row, sampled or not, has more tokens than batch.max_response_tokens. "
        "Bound the agent's turns and the tools' answers, or raise the limit. batch.on_response_too_long may leave "
        "out only the row, or cut it; batch.overlong punishes long responses before they reach the limit."
    ),
    "reward_not_finite": "The reward is infinite or no number. Return a finite one, or None where there is none.",
    "timed_out": (
        "The attempt ran longer than rollout_timeout_seconds, in every try. Look for waits without a deadline in "
        "the agent, bound its turns, or allow more."
    ),
    "too_long": (
        "A row has more tokens than batch.max_tokens. Bound the agent's turns and the tools' answers, or raise the "
        "limit as far as the memory of the trainer ranks allows. batch.on_too_long may leave out only the row, or "
        "cut it."
    ),
    "too_stale": (
        "Tokens were sampled by weights older than the bound on staleness. Play fewer rollouts ahead, shorten the "
        "longest ones, or raise the bound."
    ),
    "unresponsive": (
        "The runner or the agent gave no sign of life for too long. A sync agent that blocks in native code, or a "
        "runner without memory, looks like this."
    ),
    "usable": (
        "Has tokens and a reward, and belongs to no training group: it was not played by an algorithm that trains "
        "on groups."
    ),
    # Remarks: they leave nobody out.
    "new_conversation": (
        "The agent began a conversation of its own beside the first: a sub-agent, a judge, a fresh context. Each is "
        "a trajectory, with the rollout's one reward. If it should not be trained on, call another endpoint with "
        "it."
    ),
    "overlong": (
        "A row neared or passed batch.overlong.max_tokens, and the reward was lowered, so that the policy learns to "
        "be shorter (DAPO's soft punishment)."
    ),
    "prefix_broken": (
        "A prompt did not extend the tokens before it, so a new trajectory was begun: correct, but the shared part "
        "is computed again. Where sampled tokens differ, the text was encoded differently when it came back "
        "(stripped white space, removed thinking, tool calls parsed and rewritten); send the answer back as it "
        "came. Where context differs, the agent edited or dropped an earlier message."
    ),
    "retried": "An attempt before the last one did not succeed; only the last counts.",
    "rows_dropped": (
        "Some of its rows were left out and the others trained on: they exceeded a limit whose choice is "
        "'drop_rows', nothing of them was left behind a cut, or nothing was sampled in them."
    ),
    "rows_truncated": (
        "Some of its rows were longer than a limit whose choice is 'truncate' and are trained on as far as they "
        "fit; the reward is that of the whole rollout."
    ),
    "some_calls_broken_off": "Calls that were not answered to their end are not trained on.",
    "truncated": (
        "An answer was cut at its token limit (finish_reason 'length'). It is trained on as it is, so that the "
        "policy may learn to be cut. Allow more max_tokens, or give such rollouts a lower reward."
    ),
}
UNKNOWN = "See the span store for more."
