"""The page allocator and the scheduler: a thousand random schedules, and no page is leaked, lost or owned twice."""

import random
from collections import Counter

import pytest

from nanoredi.common.errors import UserError
from nanoredi.sampler.pages import Pages
from nanoredi.sampler.scheduler import Request, Scheduler


class Run:
    """A scheduler driven as the sampler drives it. The cache's content is simulated: for each slot of each page the
    token that it was computed from and all tokens before that, so that reading anything else is noticed."""

    def __init__(self, rng):
        self.rng = rng
        page_size, num_pages = rng.choice([1, 2, 4, 16]), rng.randint(6, 60)
        room = page_size * num_pages
        pages = Pages(num_pages, page_size)
        self.scheduler = Scheduler(
            pages, rng.randint(1, 8), rng.randint(1, 20), context=50, budget=rng.choice([3, 10, 100])
        )
        heads = [[rng.randrange(9) for _ in range(rng.randint(0, 12))] for _ in range(2)]
        prompts = [rng.choice(heads) + [rng.randrange(9) for _ in range(rng.randint(1, 25))] for _ in range(6)]
        self.requests = [Request(p, k) for p in prompts for k in range(rng.randint(1, 4))]
        self.requests = [r for r in self.requests if len(r.prompt) + self.scheduler.limit(r) - 1 <= room]
        self.scheduler.check(self.requests, 9)
        self.scheduler.waiting.extend(self.requests)
        self.cache, self.tables, self.texts = {}, {}, {}
        self.ended, self.num_preempted, self.num_computed = [], 0, 0

    def write(self, row, pages, t):
        text = tuple(self.texts[id(row)][: t + 1])
        size = self.scheduler.page_size
        self.cache[pages[t // size], t % size] = text

    def read(self, row, pages, end):
        size = self.scheduler.page_size
        for t in range(end):
            assert self.cache[pages[t // size], t % size] == tuple(self.texts[id(row)][: t + 1])

    def step(self):
        scheduler = self.scheduler
        prefill = scheduler.admit()
        for row, start, end in prefill.chunks:
            self.texts[id(row)] = list(row.tokens)
            for t in range(start, end):
                self.write(row, row.pages, t)
            self.num_computed += end - start
            self.read(row, row.pages, end)
        for source, target in prefill.copies:
            for slot in range(scheduler.page_size):
                self.cache[target, slot] = self.cache.get((source, slot))
        for row in prefill.rows:
            self.texts[id(row)] = list(row.tokens)
        while (new := scheduler.append_pages()) is None:
            scheduler.preempt()
            self.num_preempted += 1
        for slot, number, page in new:
            assert scheduler.rows[slot].pages[number] == page
        for row in scheduler.decoding():
            text = self.texts[id(row)]
            assert row.num_cached == len(text) - 1
            self.write(row, row.pages, len(text) - 1)
            self.read(row, row.pages, len(text))
            text.append(self.rng.randrange(9))
            row.tokens.append(text[-1])
            row.num_cached += 1
            if row not in scheduler.decoding() or self.rng.random() < 0.05:
                row.request.tokens = text[len(row.request.prompt) :]
                scheduler.release(row)
                self.ended.append(row.request)
        self.check()

    def check(self):
        """A page's refcount is the number of rows that use it, and the free pages are those that none uses."""
        pages = self.scheduler.pages
        used = Counter(page for row in self.scheduler.rows.values() for page in row.pages)
        assert all(len(set(row.pages)) == len(row.pages) for row in self.scheduler.rows.values())
        assert [used[page] for page in range(len(pages.refcounts))] == pages.refcounts
        assert pages.num_free == pages.refcounts.count(0)


def test_a_thousand_random_schedules():
    total = Counter()
    for seed in range(1000):
        run = Run(random.Random(seed))
        for _ in range(5000):
            if not (run.scheduler.waiting or run.scheduler.rows):
                break
            run.step()
        assert sorted(map(id, run.ended)) == sorted(map(id, run.requests))
        assert run.scheduler.pages.num_free == len(run.scheduler.pages.refcounts)
        total["preempted"] += run.num_preempted
        total["computed"] += run.num_computed
        total["prompts"] += sum(len(r.prompt) - 1 for r in run.requests)
    # The schedules are hard enough to mean something: rows are preempted, and prompts shared.
    assert total["preempted"] > 1000, total
    assert total["computed"] < 0.8 * total["prompts"], total


def test_the_lowest_free_page_is_allocated():
    pages = Pages(6, 4)
    assert [pages.allocate() for _ in range(5)] == [0, 1, 2, 3, 4]
    for page in (3, 1):
        pages.release(page)
    pages.share(1)
    pages.release(1)  # it was free, and is free again
    pages.share(3)
    assert [pages.num_free, pages.allocate(), pages.allocate(), pages.num_free] == [2, 1, 5, 0]


def test_a_prefix_is_found_by_all_its_tokens_until_its_page_is_allocated():
    pages = Pages(4, 2)
    held = [pages.allocate() for _ in range(3)]
    tokens = [1, 2, 3, 4, 5]
    for number in range(3):
        pages.register(tokens, held, number)
    assert pages.find_prefix(tokens) == ([0, 1], 2)
    assert pages.find_prefix([1, 2, 3, 4]) == ([0, 1], None)
    assert pages.find_prefix([1, 2, 3, 4, 6]) == ([0, 1], None)
    assert pages.find_prefix([3, 4]) == ([], None)  # without the page before it, this is another prefix
    for page in held:
        pages.release(page)
    assert pages.find_prefix(tokens) == ([0, 1], 2)  # free, but still registered
    assert pages.allocate() == 0
    assert pages.find_prefix(tokens) == ([], None)
    pages.register([7, 8], [0], 0)
    assert pages.find_prefix([7, 8, 3, 4]) == ([0], None)  # page 1 followed another page 0


@pytest.mark.parametrize(
    "prompt, words",
    [
        ([], "math500: problem 3 has no tokens"),
        ([1] * 50, "math500: problem 3 has 50 tokens with its template and fills the context of 50"),
        ([1] * 20, r"problem 3 has 20 tokens .* and may become 29 long; the cache has room for 24: give .*--cache_gb"),
    ],
)
def test_what_can_never_be_completed_is_refused_by_name(prompt, words):
    scheduler = Scheduler(Pages(6, 4), 2, max_tokens=10, context=50, budget=10)
    scheduler.check([Request([1] * 15, name="math500: problem 1")], 9)
    with pytest.raises(UserError, match=words):
        scheduler.check([Request([1], name="math500: problem 1"), Request(prompt, name="math500: problem 3")], 9)


def test_samples_of_a_prompt_cost_one_prefill():
    scheduler = Scheduler(Pages(100, 4), 8, max_tokens=10, context=50, budget=100)
    scheduler.waiting.extend(Request(list(range(15)), k) for k in range(8))
    prefill = scheduler.admit()
    assert [(start, end) for _, start, end in prefill.chunks] == [(0, 14)] and len(prefill.rows) == 8
    assert scheduler.pages.num_free == 100 - 3 - 8  # three whole pages, and each sample's own end
    assert {source for source, _ in prefill.copies} == {prefill.rows[0].pages[3]}
