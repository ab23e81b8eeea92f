"""Runs in processes of their own: killed, two at once, and lm-eval's own command beside ours."""

import json
import os
import time
from pathlib import Path

from namex_hf import Recipe, patch_checkpoint
from tests.helpers.commands import Command
from tests.helpers.process import run_pair, script_process
from tests.helpers.zero_shot import SCRIPT, TASKS, said, samples

ALONE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
}


def requests_of(journal: Path) -> list[str]:
    """Hashes of the requests that a log has answers to; other keys are those of batch sizes."""
    entries = map(json.loads, journal.read_text().splitlines())
    return [entry["key"] for entry in entries if len(entry.get("key", "")) == 64]


def test_a_killed_run_goes_on_to_the_same_report(zero_shot: Command, tmp_path: Path) -> None:
    arguments = [
        "--models",
        "tiny",
        "--tasks",
        "namex_sums",
        "namex_word_problems",
        "--limit",
        "10",
        "--batch_size",
        "2",
    ]
    assert zero_shot(*arguments, "--output_path", tmp_path / "whole").status == 0

    out = tmp_path / "killed"
    journal = out / "tiny" / "namex_sums" / "answers" / "answers-0.jsonl"
    command = ["--device", "cpu", *arguments, "--output_path", str(out)]
    process = script_process(SCRIPT, command, tmp_path / "log", environment=ALONE)
    while process.is_alive() and not (journal.exists() and journal.read_bytes().count(b'"key"') >= 4):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (out / "report.json").exists(), "the run was over before it was killed"
    answered = journal.read_bytes()

    assert zero_shot(*arguments, "--output_path", out).status == 0
    assert journal.read_bytes().startswith(answered[: answered.rindex(b"\n") + 1])  # nothing is asked twice
    keys = requests_of(journal)
    assert len(keys) == len(set(keys))
    assert (out / "report.json").read_text() == (tmp_path / "whole" / "report.json").read_text()
    for task in ("namex_sums", "namex_word_problems"):
        name = f"samples_{task}.jsonl"
        assert (out / "tiny" / task / name).read_bytes() == (tmp_path / "whole" / "tiny" / task / name).read_bytes()


def test_two_processes_share_the_requests(zero_shot: Command, tmp_path: Path) -> None:
    tasks = ("namex_sums", "namex_word_problems", "namex_text")
    arguments = ["--models", "tiny", "--tasks", *tasks, "--limit", "5", "--batch_size", "4", "--dtype", "float32"]
    command = ["--device", "cpu", *arguments, "--output_path", str(tmp_path / "two")]
    # As `accelerate launch --multi_gpu` begins them, on CPUs too.
    run_pair(SCRIPT, command, tmp_path, **ALONE)
    assert zero_shot(*arguments, "--output_path", tmp_path / "one").status == 0

    def asked(out: Path, task: str) -> list[str]:
        return sorted(key for path in (out / "tiny" / task / "answers").glob("*") for key in requests_of(path))

    for task in tasks:
        files = sorted(path.name for path in (tmp_path / "two" / "tiny" / task / "answers").glob("*"))
        assert files == ["answers-0.jsonl", "answers-1.jsonl"]
        assert asked(tmp_path / "two", task) == asked(tmp_path / "one", task)  # each once: none twice, none left out
    reports = [json.loads((tmp_path / name / "report.json").read_text())["scores"] for name in ("one", "two")]
    for one, two in zip(*reports, strict=True):
        assert (one["task"], one["metric"], one["items"]) == (two["task"], two["metric"], two["items"])
        assert abs(one["value"] - two["value"]) < 1e-5
    one, two = (samples(tmp_path / name / "tiny", "namex_word_problems") for name in ("one", "two"))
    # lm-eval hands a process that has fewer items its last one again: it is answered twice, though asked once.
    assert [sample["filtered_resps"] for sample in one] == [sample["filtered_resps"] for sample in two]


def test_lm_evals_own_command_gives_the_same_scores(zero_shot: Command, tmp_path: Path) -> None:
    patched = tmp_path / "patched"
    patch_checkpoint("tiny", patched, Recipe())
    arguments = [
        *("run", "--model", "hf", "--model_args", f"pretrained={patched},trust_remote_code=True"),
        *("--tasks", "namex_sums,namex_word_problems", "--include_path", str(TASKS), "--limit", "6"),
        *("--batch_size", "4", "--device", "cpu", "--num_fewshot", "0", "--log_samples"),
        *("--output_path", str(tmp_path / "plain")),
    ]
    process = script_process("lm_eval", arguments, tmp_path / "log", environment=ALONE)
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-2000:]
    answer = zero_shot(
        *("--models", patched, "--tasks", "namex_sums", "namex_word_problems", "--limit", "6", "--batch_size", "4"),
        *("--output_path", tmp_path / "ours"),
    )
    assert answer.status == 0, answer.err
    for task in ("namex_sums", "namex_word_problems"):
        (path,) = (tmp_path / "plain").rglob(f"samples_{task}_*.jsonl")
        plain = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        # lm-eval writes its log-likelihoods as text.
        theirs = [
            [[tuple(map(str, r)) if isinstance(r, list) else r for r in one] for one in s["resps"]] for s in plain
        ]
        ours = [
            [[tuple(map(str, r)) if isinstance(r, list) else r for r in one] for one in item]
            for item in said(tmp_path / "ours" / "patched", task)
        ]
        assert ours == theirs
