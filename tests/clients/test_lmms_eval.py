"""If this fails, lmms-eval does not find LLaVA-STF, scores something else than its answers, or ends in a traceback."""

import json
import warnings

import pytest
from datasets import Dataset, Image
from support.clients import QUESTION, ask, make_folder, readme
from support.processes import python
from tiny_llava import make_image

from llava_integration import clients
from llava_integration.lmms_eval import LlavaStf

TASK = """
task: {name}
dataset_path: {data}
dataset_kwargs: {{cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""
UTILS = "def visual(doc):\n    return [doc['image'].convert('RGB')]\n"


def evaluate(folder, tmp_path):
    """The README's command, on a local task and a CPU."""
    _, (command,) = readme("lmms-eval")
    words = (
        command.removeprefix("python ")
        .replace("pretrained=llava-stf", f"pretrained={folder},device=cpu")
        .replace("pope", "local")
        .split()
    )
    words += ["--include_path", str(tmp_path / "task"), "--output_path", str(tmp_path / "out")]
    return python(*words, timeout=300, HF_HOME=str(tmp_path / "home"))


def test_a_local_task_scores_the_answers_of_generate(folder, tmp_path):
    """Four pictures; the true answer to two of them is what the model says."""
    images = [make_image().rotate(90).resize((60 + 10 * i, 80)) for i in range(4)]
    answers = [ask(folder, 4, image)[0] if i < 2 else "nothing of the kind" for i, image in enumerate(images)]
    assert len(answers[0].split()) == 4
    data = {"image": images, "question": [QUESTION] * 4, "answer": answers}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(data).cast_column("image", Image()).to_parquet(tmp_path / "data" / "test.parquet")
    (tmp_path / "task").mkdir()
    task = TASK.format(name="local", data=tmp_path / "data", cache=tmp_path / "cache")
    (tmp_path / "task" / "local.yaml").write_text(task)
    (tmp_path / "task" / "utils.py").write_text(UTILS)
    result = evaluate(folder, tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["local"]["exact_match,none"] == 0.5


def test_a_stock_folder_is_named_in_one_sentence(tmp_path):
    """tests/clients/test_trl.py has the other folders that are refused."""
    make_folder(tmp_path / "stock", stock=True)
    with pytest.raises(ValueError, match=r"got model_type 'llava'; python -m llava_integration.convert llava"):
        LlavaStf(pretrained=str(tmp_path / "stock"), device="cpu")


def test_another_version_is_warned_of(monkeypatch):
    with warnings.catch_warnings(action="error"):
        clients.check_version("lmms-eval")
    monkeypatch.setitem(clients.TESTED, "lmms-eval", "0.6.0")
    with pytest.warns(UserWarning, match=r"lmms-eval 0.6.0, this is 0.7.3; .* pip install lmms-eval==0.6.0"):
        clients.check_version("lmms-eval")
