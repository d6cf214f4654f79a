"""Search for false positives of the grader among the gold answers of the paper's five benchmarks.

    python bench/grader.py ../shared/data/benchmarks

It prints two lists for a person to read: pairs of different golds that the grader takes as equal, and golds with one
character changed that it still accepts, by what makes them equal. The mutations are drawn with a fixed seed.
"""

import itertools
import random
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from nanoredi.data.benchmarks import PAPER, load  # noqa: E402
from nanoredi.grader import equal  # noqa: E402
from nanoredi.grader.compare import same  # noqa: E402
from nanoredi.grader.parse import read  # noqa: E402
from nanoredi.grader.readings import readings  # noqa: E402

MUTATIONS = 5_000


def main(folder: str) -> None:
    benchmarks = [load(name, folder) for name in PAPER]
    golds = sorted({gold for one in benchmarks for several in one.golds for gold in several})
    trees = [(gold, read(gold)) for gold in golds]
    pairs = itertools.combinations(trees, 2)
    twins = [(a, b) for (a, x), (b, y) in pairs if any(same(p, q) for p, _ in x for q, _ in y) and equal(a, b)]
    print(f"{len(golds)} golds, {len(twins)} pairs count as equal:")
    for a, b in twins:
        print(f"    {a}  ==  {b}")

    rng = random.Random(0)
    characters = sorted(set("".join(golds)))
    accepted = defaultdict(list)
    for _ in range(MUTATIONS):
        gold = rng.choice(golds)
        at = rng.randrange(len(gold))
        new = gold[:at] + rng.choice(["", rng.choice(characters)]) + gold[at + rng.randrange(2) :]
        if new != gold and equal(new, gold):
            plain = [{text.replace(" ", "") for text, _ in readings(text)} for text in (new, gold)]
            kinds = {tree.kind for tree, _ in read(new)} | {tree.kind for tree, _ in read(gold)}
            accepted["the same plain string" if plain[0] & plain[1] else " or ".join(sorted(kinds))].append((new, gold))
    print(f"{MUTATIONS} mutations, {sum(map(len, accepted.values()))} are still accepted:")
    for reason, cases in accepted.items():
        print(f"  {reason}: {len(cases)}")
        for new, gold in cases:
            print(f"    {new}  ==  {gold}")


if __name__ == "__main__":
    main(*sys.argv[1:])
