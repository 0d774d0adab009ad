"""A recorded step trained again from the span store, without engine and Ray.

    steps.jsonl --> record      store --> batch      checkpoints --> beginning
                          \\           |            /
                            training (one rank, this process) --> comparison

Invariant: with the run's own settings, the batch is the one that its trainer ranks got, row for row.
"""
