"""These checks run lm-eval on small local tasks: loglikelihoods over completions, and generation over both APIs.

The tokenizer is the server's own, through `/tokenizer_info`, `/tokenize` and `/detokenize`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from checks import MODEL, run_checks
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

DOCUMENTS = [
    {"question": "Two and two are", "choices": ["four", "a very cold winter's day"], "answer": 0},
    {"question": "The capital of Italy is", "choices": ["Rome", "Paris, which is in France"], "answer": 0},
]
SHARED: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
CHOICES = {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
PERPLEXITY = {
    "task": "perplexity",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}],
}
GENERATION = {
    "task": "generation",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match"}],
}


def evaluate(model: str, url: str, task: dict[str, Any], **options: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
        data = {"dataset_kwargs": {"data_files": {"test": str(Path(folder) / "data.jsonl")}}}
        # JSON is YAML, too.
        (Path(folder) / f"{task['task']}.yaml").write_text(json.dumps({**SHARED, **data, **task}))
        manager = TaskManager(include_path=folder, include_defaults=False)
        arguments = {"model": MODEL, "base_url": url, "max_retries": 1, "num_concurrent": 2}
        result = simple_evaluate(
            model,
            model_args=arguments,
            tasks=[task["task"]],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            **options,
        )
    assert result is not None
    assert len(result["samples"][task["task"]]) == len(DOCUMENTS)
    return dict(result)


def loglikelihoods_of_completions(url: str) -> None:
    result = evaluate("local-completions", f"{url}/v1/completions", CHOICES)
    for sample in result["samples"]["choices"]:
        scores = [float(response[0]) for response in sample["filtered_resps"]]
        assert all(score < 0 for score in scores), scores
        assert scores[0] > scores[1], "the sentence of many more tokens is less likely"


def rolling_loglikelihoods_of_completions(url: str) -> None:
    result = evaluate("local-completions", f"{url}/v1/completions", PERPLEXITY)
    assert result["results"]["perplexity"]["word_perplexity,none"] > 1


def generation_over_completions(url: str) -> None:
    evaluate("local-completions", f"{url}/v1/completions", GENERATION)


def generation_over_chats(url: str) -> None:
    evaluate("local-chat-completions", f"{url}/v1/chat/completions", GENERATION, apply_chat_template=True)


if __name__ == "__main__":
    run_checks(
        loglikelihoods_of_completions,
        rolling_loglikelihoods_of_completions,
        generation_over_completions,
        generation_over_chats,
    )
