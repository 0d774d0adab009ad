"""Of what a process wrote last, what is of use to a reader."""

from __future__ import annotations

from lightning_ray.deaths.last_words import last_words


def test_last_words_leave_out_what_is_of_no_use() -> None:
    frames = "\n".join(f'  File "x.py", line {n} in f' for n in range(9))
    text = f":job_id:01\nfirst\n\nFatal Python error: Aborted\n\nCurrent thread:\n{frames}\nExtension modules: a, b"
    assert last_words(text).split(" | ") == [
        "first",
        "Fatal Python error: Aborted",
        *(f'File "x.py", line {n} in f' for n in range(4)),
    ]
    assert last_words("") == ""


def test_why_a_replica_is_ended_is_its_last_word_whatever_serve_writes_after_it() -> None:
    why = "Health check failed: the replica hangs"
    later = [f"line {number}" for number in range(40)]
    assert last_words("\n".join(["before", why, *later[:20], f"{why} still", *later[20:30]])) == f"{why} still"
    assert last_words("\n".join([why, *later])).split(" | ") == later[-8:], "that was long ago"
