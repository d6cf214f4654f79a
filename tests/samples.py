"""A row of samples.jsonl."""


def sample(problem, number, correct, answer="1", tokens=10, finish_reason="stop", waits=0, **more):
    return {
        "problem": problem,
        "sample": number,
        "correct": correct,
        "correct_deepscaler": correct,
        "answer": answer,
        "tokens": tokens,
        "finish_reason": finish_reason,
        "waits": waits,
        **more,
    }
