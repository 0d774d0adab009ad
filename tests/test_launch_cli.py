"""The command line: what it overrides, what it runs, and messages that name key, value and fix."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.cli import main, split
from lightning_ray.launch import Launch, current_launch, launched, parse_setting

ALGORITHM = lr.GRPO(model="somewhere", steps=7)


def trainer(settings: dict[str, Any], **arguments: Any) -> lr.Trainer:
    with launched(Launch(settings=settings)):
        return lr.Trainer(algorithm=ALGORITHM, **arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=5", ("a", 5)),
        ("a.b=0.5", ("a.b", 0.5)),
        ("a=true", ("a", True)),
        ("a=null", ("a", None)),
        ("a=[1, 2]", ("a", [1, 2])),
        ('a="5"', ("a", "5")),
        ("a=runs/x", ("a", "runs/x")),
        ("a=b=c", ("a", "b=c")),
        ("a=", ("a", "")),
    ],
)
def test_a_setting_is_json_or_text(text: str, expected: tuple[str, Any]) -> None:
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["a", "=5", ""])
def test_a_setting_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(lr.ConfigError, match="write key=value"):
        parse_setting(text)


def test_settings_of_the_script_are_overridden_and_the_others_stay() -> None:
    made = trainer(
        {"algorithm.group_size": 4, "algorithm.engine.port": 8123, "algorithm.engine.dtype": "auto", "n_runners": 3},
        concurrency=5,
    )
    assert (made.algorithm.group_size, made.algorithm.steps, made.algorithm.model) == (4, 7, "somewhere")
    assert (made.algorithm.engine.port, made.algorithm.engine.dtype) == (8123, "auto")
    assert made.algorithm.engine.replicas == 1
    assert (made.n_runners, made.concurrency) == (3, 5)
    assert (ALGORITHM.group_size, ALGORITHM.engine.port) == (8, 0)


def test_nothing_is_overridden_in_a_plain_script() -> None:
    assert current_launch() == Launch()
    made = lr.Trainer(algorithm=ALGORITHM, name="n")
    assert made.algorithm is ALGORITHM and not made.resume and made.folder == Path("runs/n").absolute()


def test_a_model_maker_survives_an_override() -> None:
    def make(folder: Path) -> None: ...

    with launched(Launch(settings={"algorithm.steps": 1})):
        assert lr.Trainer(algorithm=lr.GRPO(model=make)).algorithm.model is make


def test_the_name_the_folder_and_the_resume_come_from_the_command_line(tmp_path: Path) -> None:
    with launched(Launch(name="other", runs_dir=tmp_path, resume=True)):
        made = lr.Trainer(algorithm=ALGORITHM, name="n")
    assert made.folder == tmp_path / "other" and made.resume
    assert current_launch() == Launch()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"algorithm.grup_size": 3}, ["algorithm.grup_size=3", "no such setting", "did you mean 'group_size'?"]),
        ({"algorithm.engine.prt": 3}, ["algorithm.engine.prt=3", "did you mean 'port'?"]),
        ({"algorithm.xyz": 3}, ["algorithm.xyz=3", "known keys: ", "group_size"]),
        ({"algorithm.group_size": 1}, ["algorithm.group_size=1", "greater than or equal to 2"]),
        ({"algorithm.steps": "many"}, ["algorithm.steps='many'", "valid integer"]),
        ({"algorithm.engine.port": 70000}, ["algorithm.engine.port=70000", "less than or equal to 65535"]),
        ({"algorithm.engine.device": "tpu"}, ["algorithm.engine.device='tpu'", "'cpu' or 'cuda'"]),
        ({"algorithm.steps.more": 1}, ["algorithm.steps.more=1", "'steps' is a int and has no settings"]),
        ({"algorithm.nothing.port": 1}, ["algorithm.nothing={'port': 1}", "no such setting"]),
        ({"n_runner": 3}, ["n_runner=3", "did you mean 'n_runners'?"]),
        ({"algorithm": 3}, ["algorithm=3", "algorithm.<setting>"]),
        ({"steps": 3}, ["steps=3", "no such setting"]),
        ({"n_runners": 0}, ["n_runners=0", "whole number of at least 1"]),
        ({"n_runners": True}, ["n_runners=True", "whole number"]),
        ({"concurrency": 1.5}, ["concurrency=1.5", "whole number"]),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_the_fix(settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(lr.ConfigError) as refused:
        trainer(settings)
    assert "\n" not in str(refused.value)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "algorithm.model is required"),
        ({"model": "m", "betas": ("a", 0.9)}, "algorithm.betas.0='a': input should be a valid number"),
        ({"model": "m", "engine": 3}, "algorithm.engine=3: input should be a valid dictionary"),
        (
            {"model": "m", "engine": {"replica": 2}},
            "algorithm.engine.replica=2: there is no such setting; did you mean",
        ),
        ({"model": 5}, "algorithm.model=5: input should be a valid string or input is not a valid path"),
    ],
)
def test_bad_arguments_in_a_script_are_named_alike(values: dict[str, Any], message: str) -> None:
    with pytest.raises(lr.ConfigError) as refused:
        lr.GRPO(**values)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_each_bad_argument_has_its_line() -> None:
    with pytest.raises(lr.ConfigError) as refused:
        lr.GRPO(model="m", group_size=0, steps=-1)
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "algorithm.group_size=0",
        "algorithm.steps=-1",
    ]


def test_an_assignment_is_checked_too() -> None:
    algorithm = lr.GRPO(model="m")
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        algorithm.group_size = 0


@pytest.mark.parametrize("arguments", [{"n_runners": 0}, {"concurrency": 0}])
def test_a_trainer_without_runners_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(lr.ConfigError, match="must be at least 1"):
        lr.Trainer(algorithm=ALGORITHM, **arguments)  # type: ignore[arg-type]


def test_the_runners_settings_are_resolved_and_refused_by_name() -> None:
    made = trainer({"max_runners": 6}, n_runners=2)
    assert made.resolved() | {"algorithm": None} == {
        "algorithm": None,
        "n_runners": 2,
        "max_runners": 6,
        "concurrency": 64,
        "isolation": None,
        "python": None,
        "address": None,
    }
    isolated = lr.Trainer(algorithm=ALGORITHM, isolation="process")
    assert (isolated.max_runners, isolated.concurrency, isolated.isolation) == (2, 8, "process")
    elsewhere = lr.Trainer(algorithm=ALGORITHM, python="env/bin/python")
    assert (elsewhere.concurrency, elsewhere.isolation) == (8, "process")
    assert elsewhere.resolved()["python"] == str(Path.cwd() / "env/bin/python")
    with pytest.raises(lr.ConfigError, match="max_runners=1: it is at least n_runners=2"):
        lr.Trainer(algorithm=ALGORITHM, max_runners=1)
    with pytest.raises(lr.ConfigError, match="isolation='thread'"):
        lr.Trainer(algorithm=ALGORITHM, isolation="thread")  # type: ignore[arg-type]


# The command

SCRIPT = """
import json, sys
import neighbour
import lightning_ray as lr
made = lr.Trainer(algorithm=lr.GRPO(model="m"))
print(json.dumps([__name__, sys.argv[1:], neighbour.NAME, made.algorithm.steps, made.folder.name, made.resume]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a train.py and a module beside it; sys.path and sys.argv are put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    example = tmp_path / "example"
    example.mkdir()
    (example / "train.py").write_text(SCRIPT)
    (example / "neighbour.py").write_text("NAME = 'beside'\n")
    yield example
    sys.modules.pop("neighbour", None)


@pytest.mark.parametrize("path", ["", "train.py"])
def test_a_script_or_a_folder_is_run_as_main(folder: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(folder / path), "--set", "algorithm.steps=5", "--name", "mine", "--resume"]
    assert main([*arguments, "--", "--set", "x", "--", "y"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == ["__main__", ["--set", "x", "--", "y"], "beside", 5, "mine", True]
    assert sys.argv[0] == str(folder / "train.py")
    assert sys.path[:2] == [os.getcwd(), str(folder)]


def test_what_follows_two_dashes_is_the_scripts() -> None:
    assert split(["train", "p", "--", "a", "--", "b"]) == (["train", "p"], ["a", "--", "b"])
    assert split(["train", "p"]) == (["train", "p"], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such training script"),
        (["nowhere.py"], "nowhere.py: no such training script"),
        (["FOLDER", "--set", "steps"], "--set 'steps': write key=value"),
        (["FOLDER", "--set", "algorithm.step=3"], "algorithm.step=3: there is no such setting; did you mean 'steps'?"),
    ],
)
def test_a_mistake_is_one_line_and_the_code_2(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *[str(folder) if a == "FOLDER" else a for a in arguments]]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith(f"error: {message}") and told.err.count("\n") == 1


def test_a_folder_without_a_train_py_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path)]) == 2
    assert "a folder with a train.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        ("lr.InfrastructureError('the store is gone')", 1, "error: the store is gone"),
        ("KeyboardInterrupt", 130, "continue with --resume"),
    ],
)
def test_failures_have_their_codes(
    folder: Path, raised: str, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train.py").write_text(f"import lightning_ray as lr\nraise {raised}\n")
    assert main(["train", str(folder)]) == code
    assert told in capsys.readouterr().err


def test_a_defect_of_the_script_keeps_its_traceback(folder: Path) -> None:
    (folder / "train.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        main(["train", str(folder)])


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train"], ["train", "p", "--nonsense"]])
def test_unknown_arguments_end_with_usage_and_the_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: lightning-ray" in capsys.readouterr().err


def test_a_preset_can_be_chosen_and_exchanged_from_outside() -> None:
    def launched_with(settings: dict[str, Any], **given: Any) -> lr.GRPO:
        with launched(Launch(settings=settings)):
            made = lr.Trainer(algorithm=lr.GRPO(model="m", **given)).algorithm
        assert isinstance(made, lr.GRPO)
        return made

    chosen = launched_with({"algorithm.preset": "gspo"}, learning_rate=1e-4)
    assert (chosen.loss, chosen.learning_rate) == (lr.GRPO(model="m", preset="gspo").loss, 1e-4)
    exchanged = launched_with({"algorithm.preset": "cispo"}, preset="gspo")
    assert exchanged.loss == lr.GRPO(model="m", preset="cispo").loss != chosen.loss
    assert launched_with({"algorithm.preset": "cispo"}, loss="sapo").loss == "sapo", "what is given wins"
    assert launched_with({"algorithm.engine.replicas": 2}).engine.replicas == 2
