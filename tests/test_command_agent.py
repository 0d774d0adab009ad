"""Agents that are programs: what a program finds, how it says its reward, and what is said when it does not."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import lightning_ray as lr
from lightning_ray.programs.outcome import PROGRAM_SPAN, Outcome
from lightning_ray.traces.ids import trace_id_of
from tests.command_agents import RESOURCES, play, python, sh

PRINT_ENVIRONMENT = "import json, os; print(json.dumps(dict(os.environ)))"


async def environment_of(task: Any = None, resources: Any = RESOURCES, **options: Any) -> dict[str, str]:
    played = await play(python(PRINT_ENVIRONMENT, reward=None, **options), task, resources)
    return json.loads(played.stdout)


async def test_a_program_finds_its_model_its_task_and_its_attempt() -> None:
    found = await environment_of({"question": "Why?"})
    endpoint = "http://host:1/rollout/ro-1/attempt/at-1"
    assert found["OPENAI_BASE_URL"] == f"{endpoint}/v1" and found["ANTHROPIC_BASE_URL"] == endpoint
    assert found["OPENAI_API_KEY"] == found["ANTHROPIC_API_KEY"] == "key-1"
    assert found["OPENAI_MODEL"] == found["ANTHROPIC_MODEL"] == found["LIGHTNING_MODEL"] == "policy"
    assert json.loads(found["LIGHTNING_TASK"]) == {"question": "Why?"}
    assert (found["LIGHTNING_ROLLOUT_ID"], found["LIGHTNING_ATTEMPT_ID"]) == ("ro-1", "at-1")
    assert found["OTEL_EXPORTER_OTLP_HEADERS"] == "x-lightning-rollout-id=ro-1,x-lightning-attempt-id=at-1"
    assert found["TRACEPARENT"].split("-")[1] == trace_id_of("ro-1", "at-1")
    assert found["LIGHTNING_REPORT_URL"].startswith("http://127.0.0.1:")


async def test_without_a_model_there_is_no_endpoint() -> None:
    found = await environment_of(resources={})
    assert not [name for name in found if name.startswith(("OPENAI", "ANTHROPIC"))]


async def test_the_environment_is_clean_but_for_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_SECRET", "1")
    monkeypatch.setenv("WANTED", "2")
    found = await environment_of("t")
    assert "TRAINER_SECRET" not in found and found["PATH"] == os.environ["PATH"]
    found = await environment_of(
        "t", inherit_env=["WANTED"], env={"MINE": "{task}-{llm.model}", "OPENAI_MODEL": "other"}
    )
    assert "TRAINER_SECRET" not in found and found["WANTED"] == "2"
    assert found["MINE"] == "t-policy" and found["OPENAI_MODEL"] == "other"
    assert (await environment_of(inherit_env=True))["TRAINER_SECRET"] == "1"


async def test_a_large_task_is_in_its_file_only() -> None:
    code = "import os; print('LIGHTNING_TASK' in os.environ, os.path.getsize(os.environ['LIGHTNING_TASK_FILE']))"
    assert (await play(python(code, reward=None), "x" * 100_000)).stdout == "False 100000\n"


async def test_arguments_and_stdin_are_templates_and_no_shell_reads_them() -> None:
    task = {"question": "$(whoami); `ls`", "id": 7}
    played = await play(
        python(
            "import sys; print(sys.argv[1:], input())",
            "{task.question}",
            "{task}",
            "{{}}",
            stdin="n {task.id}",
            reward=None,
        ),
        task,
    )
    assert played.stdout == f"{[task['question'], json.dumps(task), '{}']} n 7\n"


async def test_a_shell_is_used_on_request_and_values_stay_words() -> None:
    agent = lr.CommandAgent("printf '%s' {task} | wc -c; echo {prompt_template}", shell=True, reward=None)
    assert (await play(agent, "a b; exit 3")).stdout.split() == ["11", "Be", "{kind}."]


async def test_without_an_input_a_program_reads_the_end() -> None:
    assert (await play(python("import sys; print(repr(sys.stdin.read()))", reward=None))).stdout == "''\n"


class TestFolder:
    async def test_each_attempt_has_an_empty_one_that_is_removed(self) -> None:
        code = "pwd; ls -A; echo $TMPDIR; touch left; mkdir -p closed/in; chmod 0 closed"
        first, second = [(await play(sh(code, reward=None))).stdout.split() for _ in range(2)]
        assert len(first) == 2 and first[0] != second[0]
        assert Path(first[0]).parent == Path(first[1]).parent and not Path(first[0]).parent.exists()

    async def test_it_can_be_kept(self, tmp_path: Path) -> None:
        played = await play(sh("echo 1 > left; pwd; echo 0.5 > $LIGHTNING_REWARD_FILE", keep_folders=tmp_path / "kept"))
        [kept] = (tmp_path / "kept").iterdir()
        assert kept.name.startswith("at-1-") and (kept / "work/left").exists() and played.result == 0.5

    async def test_it_starts_as_a_copy_of_cwd(self, tmp_path: Path) -> None:
        (tmp_path / "agent.sh").write_text("#!/bin/sh\necho changed > data; cat data\n")
        (tmp_path / "agent.sh").chmod(0o755)
        (tmp_path / "data").write_text("original")
        for _ in range(2):
            played = await play(lr.CommandAgent(["./agent.sh"], cwd=tmp_path, reward=None))
            assert played.stdout == "changed\n" and (tmp_path / "data").read_text() == "original"
        await play(lr.CommandAgent(["./agent.sh"], cwd=tmp_path, in_place=True, reward=None))
        assert (tmp_path / "data").read_text() == "changed\n" and (tmp_path / "agent.sh").exists()

    async def test_files_of_the_current_folder_are_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "agent.sh").write_text("echo found $1")
        (tmp_path / "sh").write_text("not this one")
        monkeypatch.chdir(tmp_path)
        agent = lr.CommandAgent(["sh", "agent.sh", "{task}"], reward=None)
        monkeypatch.chdir("/")
        assert (await play(agent, "sh")).stdout == "found sh\n"


class TestReward:
    @pytest.mark.parametrize(("code", "reward"), [(0, 1.0), (1, 0.0), (77, 0.0)])
    async def test_by_exit(self, code: int, reward: float) -> None:
        assert (await play(sh(f"exit {code}", reward="exit"))).result == reward

    @pytest.mark.parametrize("way", ["auto", "file"])
    @pytest.mark.parametrize("text", ["0.25", " 0.25\n", '{"reward": 0.25}', '{"only": 0.25}'])
    async def test_by_file(self, way: Any, text: str) -> None:
        played = await play(sh('printf "%s" "$1" > $LIGHTNING_REWARD_FILE; exit 1', "{task}", reward=way), text)
        assert played.result == 0.25 or played.rewards == [0.25]

    async def test_of_several_dimensions(self) -> None:
        agent = sh('echo {\\"style\\": 1, \\"f1\\": 0.5} > $LIGHTNING_REWARD_FILE', primary_key="f1")
        played = await play(agent)
        assert played.result is None and played.rewards == [0.5]
        with pytest.raises(lr.AgentError, match=r"dimensions \['f1', 'style'\]; say which is trained on: primary_key="):
            await play(sh('echo {\\"style\\": 1, \\"f1\\": 0.5} > $LIGHTNING_REWARD_FILE'))

    @pytest.mark.parametrize(
        ("printed", "reward"),
        [("0.5", 0.5), ("thinking\n0.5\n\n", 0.5), ("1\n2\nbye", 2.0), ('{"reward": 0.75}', 0.75), ("a\n-1e-1", -0.1)],
    )
    async def test_by_the_last_line(self, printed: str, reward: float) -> None:
        assert (await play(sh('printf "%s" "$1"', "{task}", reward="stdout"), printed)).result == reward

    async def test_by_a_function(self) -> None:
        seen: list[Outcome] = []

        def judged(task: Any, outcome: Outcome) -> float:
            seen.append(outcome)
            lr.emit_annotation({"judged": True})
            return float((outcome.files / "answer").read_text() == task["gold"])

        played = await play(sh("printf 42 > answer; echo o; echo e >&2; exit 3", reward=judged), {"gold": "42"})
        assert played.result == 1.0 and any(row["attributes"].get("judged") for row in played.trace.spans)
        [outcome] = seen
        assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (3, "o\n", "e\n")
        assert outcome.signal is None and not outcome.timed_out and 0 < outcome.duration_s < 30

    async def test_by_an_async_function_that_may_give_none_or_several(self) -> None:
        async def judged(task: Any, outcome: Outcome) -> Any:
            return task

        assert (await play(sh("true", reward=judged), None)).result is None
        assert (await play(sh("true", reward=judged), {"reward": 1, "speed": 2})).rewards == [1.0]

    async def test_a_function_that_fails_is_the_agents_failure(self) -> None:
        with pytest.raises(ZeroDivisionError):
            await play(sh("true", reward=lambda task, outcome: 1 / 0))
        with pytest.raises(lr.AgentError, match="must be a number, got str 'good'"):
            await play(sh("true", reward=lambda task, outcome: "good"))

    async def test_none_where_there_is_none(self) -> None:
        assert (await play(sh("true", reward=None))).result is None

    @pytest.mark.parametrize(
        ("way", "said"),
        [
            (
                "auto",
                'sh -c .* exited with code 0 .* gave no reward: write a number .* LIGHTNING_REWARD_FILE.*reward="exit"',
            ),
            ("file", "wrote no reward to the file named by LIGHTNING_REWARD_FILE"),
            ("http", "POSTed no reward to LIGHTNING_REPORT_URL/reward"),
            ("stdout", "printed no line that is a number .* ends 'hello"),
        ],
    )
    async def test_one_that_is_missing_is_told(self, way: Any, said: str) -> None:
        with pytest.raises(lr.AgentError, match=said):
            await play(sh("echo hello", reward=way))

    @pytest.mark.parametrize("text", ["good", '"0.5"', "NaN", "[1]", "null x"])
    async def test_a_file_with_something_else_is_told(self, text: str) -> None:
        with pytest.raises(lr.AgentError, match="must be"):
            await play(sh('printf "%s" "$1" > $LIGHTNING_REWARD_FILE', "{task}"), text)


class TestFailure:
    @pytest.mark.parametrize("way", ["auto", "file", "http", "stdout", None])
    async def test_a_bad_end_without_a_reward_tells_the_code_and_the_last_lines(self, way: Any) -> None:
        with pytest.raises(
            lr.AgentError, match=r"(?s)exited with code 3 after .* its stderr ends:\nline 2\n.*\nline 21$"
        ) as error:
            await play(sh("echo nothing; seq -f 'line %g' 1 21 >&2; exit 3", reward=way))
        assert "line 1\n" not in str(error.value)

    async def test_a_signal_is_named(self) -> None:
        with pytest.raises(lr.AgentError, match="was ended by SIGSEGV after"):
            await play(sh("kill -SEGV $$"))

    async def test_sigkill_from_outside_is_no_failure_of_the_agents(self) -> None:
        for way in ("auto", "exit"):
            with pytest.raises(
                lr.InfrastructureError, match=r"(?s)killed by SIGKILL .*ran out of memory.*\nlast words"
            ):
                await play(sh("echo last words >&2; kill -KILL $$", reward=way))
        with pytest.raises(lr.InfrastructureError, match="killed by SIGKILL"):
            await play(lr.CommandAgent("sh -c 'kill -KILL $$'; exit $?", shell=True))

    async def test_a_program_that_is_not_there(self) -> None:
        with pytest.raises(lr.AgentError, match="no program 'no-such-program' on PATH='/somewhere'"):
            await play(lr.CommandAgent(["no-such-program"], env={"PATH": "/somewhere"}))
        with pytest.raises(lr.AgentError, match="no program '/no/such'"):
            await play(lr.CommandAgent(["/no/such"]))

    async def test_a_program_that_cannot_be_executed(self, tmp_path: Path) -> None:
        file = tmp_path / "agent"
        file.write_text("print(1)")
        with pytest.raises(lr.AgentError, match="is not executable: chmod"):
            await play(lr.CommandAgent([str(file)]))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        with pytest.raises(lr.AgentError, match="could not be started: Exec format error"):
            await play(lr.CommandAgent([str(file)]))

    async def test_arguments_beyond_the_systems_limit(self) -> None:
        with pytest.raises(
            lr.AgentError, match=r"Argument list too long; its arguments have 3\d+ bytes: pass {task_file}"
        ):
            await play(sh("true", "{task}"), "x" * 300_000)

    async def test_a_key_that_the_task_lacks(self) -> None:
        with pytest.raises(
            lr.AgentError, match=r"argument 4 of the command '{task.q}' needs task.q, .* has \['query'\]"
        ):
            await play(sh("true", "{task.q}"), {"query": 1})

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (dict(command=[]), "the command is empty"),
            (dict(command=[""]), "the command is empty"),
            (dict(command="node agent.js"), "give a list of words, or shell=True"),
            (dict(command=["a"], shell=True), "with shell=True the command is one text"),
            (dict(command=["a", "{question}"]), "argument 1 of the command"),
            (dict(command=["a"], env={"X": "{y}"}), r"env\['X'\] '{y}' has the placeholder"),
            (dict(command=["a"], cwd="/no/such/folder"), "cwd='/no/such/folder' is no folder"),
            (dict(command=["a"], in_place=True), "in_place=True needs cwd="),
            (dict(command=["a"], reward="score"), "reward='score'; it is one of auto, exit, file, http, stdout"),
            (dict(command=["a"], inherit_env="PATH"), "inherit_env='PATH' must be"),
            (dict(command=["a"], timeout_seconds=0), "timeout_seconds=0 must be above 0"),
        ],
    )
    def test_what_cannot_be_is_told_when_the_agent_is_made(self, arguments: Any, said: str) -> None:
        with pytest.raises(lr.AgentError, match=said):
            lr.CommandAgent(**arguments)


async def test_the_end_and_the_output_are_recorded_as_a_span() -> None:
    played = await play(sh("echo out; echo err >&2; exit 3", reward="exit"))
    assert played.program.pop("duration_s") > 0 and played.program.pop("max_rss_bytes") > 100_000
    found = {key: played.program[key] for key in ("exit_code", "timed_out", "stdout", "stderr")}
    assert found == {"exit_code": 3, "timed_out": False, "stdout": "out\n", "stderr": "err\n"}
    [row] = [row for row in played.trace.spans if row["name"] == PROGRAM_SPAN]
    assert row["status"]["status_code"] == "ERROR" and row["status"]["description"].startswith("exited with code 3")
    assert row["end_time"] > row["start_time"]


async def test_a_long_output_is_read_to_its_end_and_kept_within_bounds() -> None:
    code = "import sys; sys.stdout.write('a' * 10 + 'x' * 5_000_000 + 'z' * 10 + '\\n0.5')"
    played = await play(python(code, reward="stdout"))
    assert played.result == 0.5 and played.stdout.startswith("aaaaaaaaaaxxx") and played.stdout.endswith("zzz\n0.5")
    assert f"[... {5_000_024 - 65536} bytes cut ...]" in played.stdout and len(played.stdout) < 66_000


async def test_outside_of_a_rollout_a_program_runs_untraced() -> None:
    from tests.command_agents import attempted

    assert await sh("exit 0", reward="exit").rollout_async(None, {}, attempted()) == 1.0


async def test_an_agent_travels_to_its_runner() -> None:
    agent = cloudpickle.loads(cloudpickle.dumps(sh("echo 1", reward=lambda task, outcome: 0.5)))
    assert (await play(agent)).result == 0.5 and agent.is_async() and agent.__name__.startswith("sh -c")


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
async def test_a_node_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "agent.js").write_text(
        """
        const report = (path, body) => fetch(process.env.LIGHTNING_REPORT_URL + path, {
            method: 'POST', body: JSON.stringify(body),
            headers: {authorization: 'Bearer ' + process.env.LIGHTNING_REPORT_TOKEN}});
        const said = await report('/message', {message: process.argv[2]});
        await report('/reward', {reward: said.status == 204 ? 0.75 : 0});
    """.replace("const report", "(async () => { const report")
        + "})()"
    )
    monkeypatch.chdir(tmp_path)
    played = await play(lr.CommandAgent(["node", "agent.js", "{task.question}"]), {"question": "Why?"})
    assert played.result is None and played.rewards == [0.75]
    assert played.trace.spans[0]["attributes"]["agentlightning.message.body"] == "Why?"
