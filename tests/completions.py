"""Shared by the tests of other engines' completions: two problems, and how rows that answer them are graded."""

import contextlib
import io
import json

from nanoredi.evaluation.completions import grade_file

PROBLEMS = [("What is 1+1?", "2"), ("What is 1+1? And 2+2?", "4")]
TEXTS = [[r"</think>\boxed{2}", r"</think>\boxed{3}"], [r"</think>\boxed{4}", "Wait"]]
RIGHT, WRONG = r"</think>\boxed{2}", r"</think>\boxed{3}"
ALL_RIGHT = [(i, 0, True) for i in range(12)]  # of the fixture `many`


def rows_of(layout):
    """The same two problems with two completions each."""
    for (problem, gold), texts in zip(PROBLEMS, TEXTS):
        prompt = f"<|im_start|>user\nSolve: {problem}<|im_end|>\n<|im_start|>assistant<think>\n"
        if layout == "vllm":
            outputs = [
                {"index": i, "text": t, "token_ids": [5] * 9, "finish_reason": "stop"} for i, t in enumerate(texts)
            ]
            yield {"request_id": "1", "prompt": prompt, "outputs": outputs}
        elif layout == "run-batch":
            choices = [{"index": i, "message": {"content": t}, "finish_reason": "stop"} for i, t in enumerate(texts)]
            yield {"custom_id": problem, "response": {"status_code": 200, "body": {"choices": choices}}, "error": None}
        elif layout == "rllm":
            messages = [{"role": "user", "content": problem}]
            yield {"data_source": "", "prompt": messages, "responses": texts, "reward_model": {"ground_truth": gold}}
        elif layout == "lighteval":
            doc = {"query": f"Solve: {problem}", "choices": [gold], "gold_index": 0}
            yield {"doc": doc, "model_response": {"text": texts, "output_tokens": [[1] * 9] * 2}, "metric": {}}
        elif layout == "older lighteval":
            yield {"example": problem, "full_prompt": prompt, "predictions": texts, "gold": [gold]}
        else:
            for i, text in enumerate(texts):
                yield {"prompt": problem, "completion": text, "finish_reason": "stop", "tokens": 9, "sample": i}


def written(tmp_path, rows):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def graded(tmp_path, rows, *benchmarks, thinking=True, limit=0):
    """(problem, sample, correct) of each sample, and the notes that were printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found = grade_file(written(tmp_path, rows), "m", list(benchmarks), thinking, limit)
    return [
        (s["problem"], s["sample"], s["correct"]) for samples in found for s in samples
    ], said.getvalue().splitlines()


def answer(text=r"</think>\boxed{2}", **more):
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], **more}


def batch(custom_id, text=r"</think>\boxed{2}", **more):
    return {"custom_id": custom_id, "response": {"status_code": 200, "body": answer(text)}, "error": None, **more}
