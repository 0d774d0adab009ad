"""What a user is told of a deployment that did not come up: why, on a line."""

from __future__ import annotations

from lightning_ray.serving import plainly

MESSAGE = """The deployment failed to start 3 times in a row. Error:
\x1b[36mray::ServeReplica:run:policy.initialize_and_get_metadata()\x1b[39m (pid=1, ip=192.0.2.2)
  File "replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "arg_utils.py", line 1820, in create_model_config
    return ModelConfig(
           ^^^^^^^^^^^^
pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (2000) is greater than 512.
"""


def test_of_a_traceback_what_was_raised() -> None:
    assert plainly(MESSAGE) == (
        "pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, User-specified max_model_len "
        "(2000) is greater than 512."
    )
    assert len(plainly(MESSAGE.replace("2000", "9" * 5000))) <= 800


def test_of_several_lines_that_were_raised_all() -> None:
    said = "torch.AcceleratorError: CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to see more."
    trace = f'Error:\nray::Replica()\n  File "a.py", line 1\nRuntimeError: Traceback (most recent call last):\n{said}'
    assert plainly(trace) == " ".join(said.split())


def test_a_message_without_one_as_it_is() -> None:
    assert plainly("no node has\n  the GPUs") == "no node has the GPUs"
    assert plainly("") == ""
