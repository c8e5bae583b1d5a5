"""What --small asserts: what is trained on, what stops an answer, what the files look like; not what a tiny model can solve."""

import json
from pathlib import Path


def check(data: Path, output: Path, cfg) -> None:
    """Raises AssertionError that says what does not hold."""
    lines = [json.loads(line) for line in (data / "metaladder.jsonl").read_text().splitlines()]
    for line in lines:
        question = line["prompt"].removeprefix("### Instruction:\n").removesuffix("\n\n### Response: Let's think step by step.")
        assert f"\n\nOriginal Problem:\n{question}\n\nSolution to the Original Problem:\n" in line["response"], "restated word for word"
        assert line["response"].endswith(f"The answer is {line['answer']}.")
    _targets_are_responses(cfg, lines)
    answers = output / cfg.name / "answers/round-0-unseen_instances-shortcut.json"
    for answer in json.loads(answers.read_text())["answers"]:
        assert "Similar Problem:" not in answer["text"].partition("\n\nOriginal Problem:\n")[0], "stopped before the similar problem"
        assert answer["tokens"] <= cfg.metaladder.max_new + 1
    rounds = json.loads((output / cfg.name / "results.json").read_text())
    assert len(rounds) == 2 and rounds[1]["examples"] == rounds[0]["examples"] + rounds[0]["added"]
    print("mechanics: formats, targets, stops and rounds are as they should be")


def _targets_are_responses(cfg, lines: list[dict]) -> None:
    """The targets of the training data are the responses and their ends, and nothing else."""
    from llmtrain.data.batch import NO_TARGET
    from llmtrain.data.metaladder.build import rungs_of
    from llmtrain.data.tokenizer import load
    from llmtrain.layout.steps import StepPlan
    from llmtrain.stages import pretrain
    from llmtrain.stages.metaladder import round_config

    of_round = round_config(cfg, 0, rungs_of(cfg.metaladder.data))
    dataset = pretrain.inputs(of_round).dataset_of(StepPlan.from_config(of_round).phases[0])
    tokenizer, known = load(cfg.tokenizer.path), {line["response"] for line in lines}
    targets = dataset.batch(0, len(dataset)).targets
    text = tokenizer.decode([t for t in targets.flatten().tolist() if t not in (NO_TARGET, tokenizer.eod_id, tokenizer.eos_id)])
    assert "### Instruction" not in text and "### Response" not in text, "prompts are no targets"
    assert any(response in text for response in known), "responses are"
