"""What is refused: in one line, with status 2, before anything is loaded or written."""

import json
import re
import shutil
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.errors import CheckpointError, MissingExtraError, TaskError
from namex_hf.evaluation.candidates import bytes_in, candidates, resolve_model
from namex_hf.evaluation.checks import check_answers, check_fits, free_bytes
from namex_hf.evaluation.tasks import load_tasks
from tests.helpers.checkpoints import forget_files
from tests.helpers.commands import Command
from tests.helpers.zero_shot import ROOT, TASKS, module_of, recipe

SUMS = ("--models", "tiny", "--tasks", "namex_sums", "--limit", "2")


def refused(zero_shot: Command, out: Path, *arguments: str | Path) -> str:
    answer = zero_shot(*arguments, "--output_path", out)
    assert answer.status == 2, answer
    (line,) = [line for line in answer.err.splitlines() if line.startswith("zero_shot.py: error: ")]
    assert "Traceback" not in answer.err
    assert not out.exists()
    return line


def copied(tmp_path: Path, **changes: object) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(PACKAGED / "tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--models", "tinny"),
            "MODEL tinny: no such folder; accepted: a folder, a packaged model (tiny, tiny-deepseek, tiny-qwen3)",
        ),
        (("--tasks", "mmmlu_hard"), "task mmmlu_hard is not known"),
        (("--tasks", "namex_sum"), "task namex_sum is not known; near it: namex_sums"),
        (("--tasks", "namex_sums", "--data", "nowhere"), "--data nowhere is no folder"),
        (("--text", "nowhere.txt"), "--texts nowhere.txt cannot be read (No such file or directory)"),
        (("--limit", "0"), "argument --limit: '0'; accepted: a whole number from 1"),
        (("--batch_size", "many"), "argument --batch_size/--batch-size: 'many'; accepted: a whole number from 1"),
        (("--seed", "4294967296"), "argument --seed: '4294967296'; accepted: a whole number from 0 to 4294967295"),
        (("--limit", 5000 * "9"), "accepted: a whole number from 1"),
        (("--num_fewshot", "-1"), "accepted: a whole number from 0"),
        (("--models", "tiny", "--revision", "main"), "--revision main belongs to a Hub id; tiny is a local folder"),
        (("--models", "me/nothing"), "me/nothing"),
        (("--recipe", "nowhere.yaml"), "nowhere.yaml"),
        (("--device", "abacus"), "--device abacus is no device of this machine"),
    ],
)
def test_arguments(zero_shot: Command, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(zero_shot, tmp_path / "out", *arguments)


def test_data_that_cannot_be_had(zero_shot: Command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    line = refused(zero_shot, tmp_path / "out", "--models", "tiny", "--tasks", "gsm8k", "--data", tmp_path / "data")
    assert "task gsm8k: its data cannot be had" in line
    assert f"--data DIR with a copy under the data set's Hub name, such as {tmp_path}/data/openai/gsm8k" in line


def test_text_that_is_none(zero_shot: Command, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "is empty; at least one line" in refused(zero_shot, tmp_path / "o", "--text", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "is not UTF-8 text: unexpected end of data at byte 3" in refused(
        zero_shot, tmp_path / "o", "--text", tmp_path / "latin.txt"
    )


def test_a_recipe_for_a_patched_model(zero_shot: Command, tmp_path: Path) -> None:
    patch_checkpoint("tiny", tmp_path / "patched", Recipe())
    smoe = recipe(tmp_path, "smoe", method="smoe")
    line = refused(zero_shot, tmp_path / "out", "--models", tmp_path / "patched", "--recipe", smoe)
    assert "this model is patched already" in line


def test_a_model_without_a_tokenizer(zero_shot: Command, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer; without one no text" in refused(zero_shot, tmp_path / "out", "--models", folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "has no tokenizer that transformers can open ("),
        ({"model_max_length": "many"}, "model_max_length in tokenizer_config.json is 'many'; accepted: a number of"),
    ],
)
def test_a_tokenizer_that_cannot_be_opened(zero_shot: Command, tmp_path: Path, change: dict, says: str) -> None:
    folder = copied(tmp_path)
    if change:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        (folder / "tokenizer.json").write_text("{}")
    assert says in refused(zero_shot, tmp_path / "out", *SUMS[2:], "--models", folder)


def test_answers_longer_than_the_context(zero_shot: Command, tmp_path: Path) -> None:
    folder = copied(tmp_path, max_position_embeddings=3)
    said = refused(zero_shot, tmp_path / "out", "--tasks", "namex_word_problems", "--limit", "2", "--models", folder)
    assert "task namex_word_problems: an answer of " in said
    assert "tokens; model attends to 3, and at least one is the question's" in said
    said = refused(zero_shot, tmp_path / "out", "--tasks", "namex_definitions", "--limit", "2", "--models", folder)
    assert "task namex_definitions: document 0 has an answer of " in said
    tasks = load_tasks(["namex_definitions", "namex_word_problems"], include=TASKS)
    check_answers(resolve_model("tiny"), tasks, None, False)


def test_tasks_that_run_code(tmp_path: Path) -> None:
    for name in ("packaged_sets.py", "data"):
        (tmp_path / name).symlink_to(TASKS / name)
    for unsafe in ("", "unsafe_code: true\n"):
        text = (TASKS / "namex_sums.yaml").read_text().replace("task: namex_sums", f"task: code{len(unsafe)}")
        (tmp_path / f"code{len(unsafe)}.yaml").write_text(text + unsafe)
    assert load_tasks(["code0"], include=tmp_path)
    with pytest.raises(TaskError, match=r"task code18 runs code that the model writes \(unsafe_code\)"):
        load_tasks(["code18"], include=tmp_path)


@pytest.mark.parametrize("task", ["namex_sums", "namex_word_problems", "namex_text"])
def test_tokens_beyond_the_embedding(zero_shot: Command, tmp_path: Path, task: str) -> None:
    folder = copied(tmp_path, vocab_size=100)
    tensors = load_file(folder / "model.safetensors")
    cut = {
        name: t[:100].clone() if name in ("model.embed_tokens.weight", "lm_head.weight") else t
        for name, t in tensors.items()
    }
    save_file(cut, folder / "model.safetensors", {"format": "pt"})
    answer = zero_shot(
        "--models", folder, "--tasks", task, "--limit", "2", "--batch_size", "2", "--output_path", tmp_path / "o"
    )
    assert answer.status == 2
    (line,) = [line for line in answer.err.splitlines() if line.startswith("zero_shot.py: error: ")]
    assert re.search(r"the tokenizer gives token id \d{3,}; the embedding has 100 rows", line)
    assert "Traceback" not in answer.err


def test_outputs_that_no_folder_can_have(zero_shot: Command, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    answer = zero_shot(*SUMS, "--output_path", tmp_path / "loop" / "out")
    assert answer.status == 2
    assert "loop/out: Too many levels of symbolic links" in answer.err


def test_remote_code_that_is_missing(zero_shot: Command, tmp_path: Path) -> None:
    patch_checkpoint("tiny", tmp_path / "patched", Recipe())
    (tmp_path / "patched" / "modeling_namex_qwen2_moe.py").unlink()
    forget_files(tmp_path / "patched")
    line = refused(zero_shot, tmp_path / "out", "--models", tmp_path / "patched", "--trust_remote_code")
    assert "auto_map names modeling_namex_qwen2_moe.py, which the folder lacks" in line
    # Without it the class that is installed serves.
    answer = zero_shot(*SUMS[2:], "--models", tmp_path / "patched", "--output_path", tmp_path / "out")
    assert answer.status == 0, answer.err


def test_code_that_is_named_in_another_form_is_nobodys(zero_shot: Command, tmp_path: Path) -> None:
    folder = copied(tmp_path, model_type="foreign", auto_map=["code.Config"])
    line = refused(zero_shot, tmp_path / "out", "--models", folder)
    assert "model_type 'foreign' is known neither to transformers nor to namex_hf, and there is no auto_map" in line


def test_code_of_others_is_not_run_unasked(zero_shot: Command, tmp_path: Path) -> None:
    folder = copied(tmp_path, model_type="foreign", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise SystemExit('run')")
    line = refused(zero_shot, tmp_path / "out", "--models", folder)
    assert "model_type 'foreign' comes with code of its own (code.py); read it, then say --trust_remote_code" in line


def test_a_type_that_nobody_knows(zero_shot: Command, tmp_path: Path) -> None:
    line = refused(zero_shot, tmp_path / "out", "--models", copied(tmp_path, model_type="foreign"))
    assert "model_type 'foreign' is known neither to transformers nor to namex_hf" in line


def test_a_model_that_is_too_large(tmp_path: Path) -> None:
    tiny = resolve_model("tiny")
    assert bytes_in(tiny, "auto") == tiny.size == bytes_in(tiny, "bfloat16")
    assert bytes_in(tiny, "float32") == 2 * tiny.size
    free, _ = free_bytes("cpu", False)
    assert 0 < free <= psutil.virtual_memory().total
    # Headers alone are looked at: a file of any size may stand behind them, here one with a hole in it.
    folder = copied(tmp_path, vocab_size=1 << 31)
    header, end = {}, 0
    for name, span in tiny.spans.items():
        rows = 1 << 31 if name in ("model.embed_tokens.weight", "lm_head.weight") else span.shape[0]
        begin, end = end, end + span.size // span.shape[0] * rows
        header[name] = {"dtype": "BF16", "shape": [rows, *span.shape[1:]], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with pytest.raises(
        CheckpointError, match=r"model: its weights take 1099\.52 GB in auto, and .* GB are free of memory"
    ):
        check_fits(candidates([str(folder)], []), "cpu", "auto")


def test_a_folder_of_others_is_not_removed(zero_shot: Command, tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "tiny" / "namex_sums"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("years of work")
    answer = zero_shot(*SUMS, "--output_path", tmp_path / "out", "--overwrite")
    assert answer.status == 2
    assert "holds something else; --overwrite replaces results of this script alone" in answer.err
    assert (foreign / "thesis.txt").exists()


def test_gsm8k_files_that_are_none(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    script = module_of(ROOT / "eval" / "make_local_gsm8k.py")

    def said() -> str:
        monkeypatch.setattr("sys.argv", ["make", "--source", str(tmp_path), "--out", str(tmp_path / "data")])
        assert script.main() == 2
        assert not (tmp_path / "data").exists()
        return capsys.readouterr().err

    assert "train.jsonl cannot be read (No such file or directory)" in said()
    (tmp_path / "train.jsonl").write_text('{"question": "?"}\n')
    assert "train.jsonl, line 1: needed: a JSON object with 'question' and 'answer'" in said()


def test_what_needs_the_extra_says_so(zero_shot: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = refused(zero_shot, tmp_path / "out")
    assert "eval/zero_shot.py needs packages of an extra: pip install 'namex-hf[eval]'" in line
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"eval/make_local_gsm8k.py needs packages of an extra"):
        module_of(ROOT / "eval" / "make_local_gsm8k.py").write(tmp_path, tmp_path / "data")
