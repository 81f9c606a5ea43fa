"""Lists of prompts: each result once, the same for any number of workers, after any interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import free_port
from PIL import Image
from typer.testing import CliRunner

from llm_dit.cli import app
from llm_dit.generate import GenerateOptions
from llm_dit.prompts import LOCKS, MANIFEST, Folder, Prompt, read_prompts, run_prompts, tasks_of

ROOT = Path(__file__).parent.parent
LIST = 'a red circle\n\n{"prompt": "a blue square", "seed": 7, "width": 128, "steps": 1}\na green dot\na circle\n'
SMALL = {"height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "list.txt").write_text(LIST)
    return read_prompts(tmp_path / "list.txt")


def options(tiny, folder, **others):
    return GenerateOptions(str(tiny("z-image")), "", folder, **{"call": SMALL, "seed": 5, "device": "cpu", **others})


def manifest(folder):
    return [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]


def pictures(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """What one worker makes of the list, in int8."""
    folder = tmp_path_factory.mktemp("lists") / "one"
    (folder.parent / "list.txt").write_text(LIST)
    ran = run_prompts(read_prompts(folder.parent / "list.txt"), options(tiny, folder, load={"quantization": "int8"}))
    assert (ran.made, ran.failed) == (4, {})
    return folder


def test_a_list_of_lines_and_objects(whole):
    assert Image.open(whole / "0001.png").size == (64, 64)
    assert Image.open(whole / "0002.png").size == (128, 64)
    rows = manifest(whole)
    assert [(row["number"], row["prompt"], row["seed"]) for row in rows] == [
        (1, "a red circle", 5),
        (2, "a blue square", 7),
        (3, "a green dot", 7),
        (4, "a circle", 8),
    ]
    assert all(row["methods"]["transformer"] == "int8" and row["rank"] == 0 and row["seconds"] > 0 for row in rows)
    assert [row["file"] for row in rows] == sorted(pictures(whole))


def test_done_is_done(whole, tiny, prompts):
    before = (whole / MANIFEST).read_bytes()
    ran = run_prompts(prompts, options(tiny, whole, load={"quantization": "int8"}))
    assert (ran.pipe, ran.made) == (None, 0)
    assert (whole / MANIFEST).read_bytes() == before


def test_a_prompt_may_hold_what_looks_like_the_end_of_a_line(tmp_path, tiny):
    (tmp_path / "list.txt").write_text("\ufeffone\u2028half\r\nanother", encoding="utf-8")
    prompts = read_prompts(tmp_path / "list.txt")
    assert [line.prompt for line in prompts] == ["one\u2028half", "another"]
    folder = Folder(tmp_path, tasks_of(prompts, options(tiny, tmp_path)))
    folder.record({**folder.tasks[0].asked, "ended": 0.0})
    folder.record({**folder.tasks[1].asked, "ended": 0.0})
    assert [row["prompt"] for row in folder.rows().values()] == ["one\u2028half", "another"]


def test_of_two_requests_that_begin_at_once_one_is_refused(tiny, prompts, tmp_path):
    first, second = (Folder(tmp_path, tasks_of(prompts, replace(options(tiny, tmp_path), seed=seed))) for seed in (0, 100))
    first.record({**first.tasks[0].asked, "ended": 0.0})
    with pytest.raises(ValueError, match="whose prompt 1 has another seed"):
        second.open_tasks()


def test_a_file_in_the_place_of_the_folder(tiny, prompts, tmp_path):
    (tmp_path / "out.png").touch()
    with pytest.raises(ValueError, match="is a file, and a list of prompts is written into a folder"):
        run_prompts(prompts, options(tiny, tmp_path / "out.png"))


def test_another_request_is_refused(whole, tiny, prompts):
    for others, what in (
        ({}, "quantization, or another argument of loading"),
        ({"load": {"quantization": "int8"}, "seed": 6}, "seed"),
    ):
        with pytest.raises(ValueError, match=f"whose prompt 1 has another {what}: give another folder"):
            run_prompts(prompts, options(tiny, whole, **others))


def started(tiny, folder, *launcher):
    """The command line on the list in `folder`, as a process."""
    (folder / "list.txt").write_text(LIST)
    words = ["--prompts", "list.txt", "--model", tiny("z-image"), "--quantization", "int8", "--height", "64", "--width", "64"]
    words += ["--steps", "2", "--seed", "5", "--device", "cpu", "-o", "out"]
    command = [sys.executable, *launcher, str(ROOT / "pipelines/z_image.py"), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_workers_together_make_what_one_makes(whole, tiny, tmp_path):
    torchrun = ("-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
    run = started(tiny, tmp_path, *torchrun)
    text, errors = run.communicate()
    assert run.returncode == 0, errors
    assert text.count("4 of 4 prompts done") == 1  # process 0 speaks for all
    assert pictures(tmp_path / "out") == pictures(whole)
    assert [row["number"] for row in manifest(tmp_path / "out")] == [1, 2, 3, 4]


def test_a_killed_worker_loses_nothing(whole, tiny, prompts, tmp_path):
    out, worker = tmp_path / "out", started(tiny, tmp_path)
    while not (out / MANIFEST).exists() and worker.poll() is None:
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    before = manifest(out)
    assert 1 <= len(before) < 4
    ran = run_prompts(prompts, options(tiny, out, load={"quantization": "int8"}))
    assert ran.made == 4 - len(before)
    assert manifest(out)[: len(before)] == before
    assert pictures(out) == pictures(whole)


def test_what_a_dead_process_held_can_be_taken(tiny, prompts, tmp_path):
    tasks = tasks_of(prompts, options(tiny, tmp_path))
    folder = Folder(tmp_path, tasks)
    place = str(tmp_path / LOCKS / "0001")
    code = (
        f"import filelock, time; lock = filelock.FileLock({place!r}); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with folder.take() as task:
        assert task.number == 2
    holder.kill()
    holder.communicate()
    with folder.take() as task:
        assert task.number == 1


def test_a_prompt_that_fails_does_not_stop_the_others(tiny, tmp_path):
    (tmp_path / "0001.png").mkdir()  # where a picture cannot be written
    asked = [Prompt(prompt="a circle"), Prompt(prompt="a square")]
    ran = run_prompts(asked, options(tiny, tmp_path))
    assert ran.made == 1
    assert list(ran.failed) == [1]
    assert "0001.png" in ran.failed[1]
    assert run_prompts(asked, options(tiny, tmp_path)).failed == ran.failed  # tried again
    (tmp_path / "0001.png").rmdir()
    assert run_prompts(asked, options(tiny, tmp_path)).made == 1
    assert sorted(pictures(tmp_path)) == ["0001.png", "0002.png"]


def test_a_size_that_cannot_be_made_is_refused_before_anything_is_read(tiny, tmp_path):
    asked = [Prompt(prompt="a circle"), Prompt(prompt="a square", height=63)]
    with pytest.raises(ValueError, match="prompt 2: Z-Image makes pictures whose height is a multiple of 16, not 63: 64 is the"):
        run_prompts(asked, options(tiny, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "holds no prompt"),
        ('a\n{"prompt": "b", "sead": 1}', "line 2: unknown field 'sead': did you mean 'seed'"),
        ('{"prompt": "b", "height": 0}', "line 1: height: Input should be greater than or equal to 1"),
        ('{"prompt": "b", "seed": "x"}', "line 1: seed: Input should be a valid integer"),
        ('{"promt": "b"}', "unknown field 'promt': did you mean 'prompt'"),
        ('{"prompt": ""}', "line 1: prompt"),
        ('{"seed": 1}', "line 1: prompt: Field required"),
        ("{a", "line 1 starts with a brace and is not JSON"),
    ],
)
def test_lines_that_cannot_be_read(text, error, tmp_path):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=error):
        read_prompts(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("a circle", "--prompts", "list.txt"), "give a prompt, or --prompts FILE, one of the two"),
        ((), "give a prompt, or --prompts FILE, one of the two"),
        (("--prompts", "none.txt"), "there is no file 'none.txt' of prompts"),
        (("--prompts", "list.txt", "--context-parallel", "ring"), "leave one out"),
    ],
)
def test_the_command_line_refuses(words, error, tiny):
    result = CliRunner().invoke(app, ["generate", *words, "--model", str(tiny("z-image"))])
    assert isinstance(result.exception, ValueError)
    assert error in str(result.exception)
