"""One training run: its folder and state, its models, rollouts and policies, and what is told of its steps.

run                         what an algorithm works with
folder, state               what a run leaves, and what it goes on from
models, rollouts            how both come about
trained_policy              a policy under training: its ranks, its version, its swaps
evaluations                 before, between and after the steps
step_figures, policy_rows   a step's line of metrics; phases: where its time went
summary, plots              the end in figures and in pictures
events, lateness            what died, and what everyone is at when a step is late
policy_folder               a run's folder as one of several policies has it
"""
