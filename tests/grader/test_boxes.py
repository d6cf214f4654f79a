"""Which boxes of a response are its answer."""

import pytest

from nanoredi.grader import MAX_BOX, extract_answer, grade

EXTRACTIONS = [
    (r"So \boxed{5}.", "5"),
    (r"\boxed{1} and then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{\sqrt{2}}} is the answer", r"\frac{1}{\sqrt{2}}"),
    (r"\fbox{7}", "7"),
    (r"\boxed {8}", "8"),
    (r"\boxed 9$", "9"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace needs no partner
    (r"\boxed{x = \boxed{3}}", "3"),
    (r"\boxed{4}, as asked in \boxed form", "4"),
    (r"\boxed{}", ""),
    (r"\boxed{4}. The answer stands in a \boxed{}.", "4"),  # an empty box that is only mentioned
    (r"\boxed{4}. I use \boxed{ } as asked; thus $\boxed{}$ it is.", "4"),
    (r"\boxed{4}. In the required format: \boxed{}", ""),  # one that is given as the answer
    (r"\framebox{7}", "7"),
    (r"\framebox[2cm][c]{7}", "7"),
    (r"<think>\boxed{1}</think>\boxed{2}", "2"),
    (r"no opening tag \boxed{1}</think>\boxed{2}", "2"),
    (r"<think>a</think>\boxed{2}</think>none here", "2"),
    (r"<think>\boxed{1}</think>nothing", None),
    (r"<think>\boxed{1}", None),
    ("the answer is 5", None),
    (r"\boxed{1} \boxed{2", None),
    (r"\boxed{\frac{1}{2}", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "answer"), EXTRACTIONS)
def test_extracts_the_last_box_after_the_thinking(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


def test_a_box_longer_than_any_answer_is_none() -> None:
    assert extract_answer("\\boxed{" + "1" * (MAX_BOX - 1) + "}") == "1" * (MAX_BOX - 1)
    assert extract_answer("\\boxed{" + "1" * MAX_BOX + "}") is None


def test_grade_takes_any_gold_of_a_list() -> None:
    response = r"<think>\boxed{3}</think>It is \boxed{\frac{4}{2}}."
    assert grade(response, "2") and grade(response, ["5", "2"])
    assert not grade(response, "3") and not grade(response, ["3", "5"]) and not grade(response, [])
    assert not grade(r"\boxed{ }", "")  # an empty box is no answer


@pytest.mark.parametrize(
    "response, gold, right",
    [
        (r"$\boxed{1}$ or $x=\boxed{2}$", "1, 2", False),
        (r"The roots are $\boxed{1}$ and $\boxed{2}$.", "1, 2", True),
        (r"The roots are $\boxed{1}$, $\boxed{2}$, and $\boxed{3}$.", "3, 2, 1", True),
        (r"\(\boxed{1}\) \text{ or } \(\boxed{2}\)", r"\{1, 2\}", True),
        (r"$\boxed{1},\quad\boxed{2}$", "1, 2", True),
        (r"The roots are $\boxed{1}$ and $\boxed{2}$.", "2", True),  # the last box alone comes first
        (r"The roots are $\boxed{1}$ and $\boxed{2}$.", "1", False),
        (r"First $\boxed{1}$. Then $\boxed{2}$.", "1, 2", False),
        (r"$\boxed{1}$ and so $\boxed{2}$.", "1, 2", False),
        (r"$\boxed{1}$ $\boxed{2}$", "1, 2", False),
    ],
)
def test_boxes_joined_in_a_sentence_are_one_list(response: str, gold: str, right: bool) -> None:
    assert grade(response, gold) == right
    if right and gold != "2":
        assert not grade(response, gold, style="deepscaler")
