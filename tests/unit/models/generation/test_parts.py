"""The parts of the generation engine that need no model, by hand and by property."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmcot.models.generation.attention import Partial, Scoring, attend, attend_partly, merge
from lmcot.models.generation.requests import Request, SampleRequest, ScoreRequest, unfit
from lmcot.models.generation.sampling import pick, uniforms
from lmcot.models.generation.suffixes import SuffixCache, visible_from
from lmcot.models.generation.tree import SHORTEST_SHARED, PrefixTree, TreeNode
from lmcot.records import FailureKind

CPU = torch.device("cpu")
INF = math.inf
NAN = math.nan


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# --- attention.py -------------------------------------------------------------------------------


def _softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, bias: Tensor | None = None
) -> Tensor:
    """Attention written out in float64: [queries, width], key [keys, width]."""
    scores = query.double() @ key.double().T * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if bias is not None:
        scores = scores + bias.double()
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ value.double()


def _merged(parts: Sequence[Partial]) -> Tensor:
    """Parts [queries, width] of the same queries, merged: every query takes one slot of each."""
    queries = parts[0].total.shape[0]
    joined = Partial(
        *(torch.cat([part[field].unsqueeze(1) for part in parts]) for field in (0, 1, 2))
    )
    slots = torch.arange(len(parts) * queries).view(len(parts), queries).T
    return merge(joined, slots).squeeze(1)


def test_attend_partly_by_hand() -> None:
    """Scores ln 1 and ln 3 weigh the values 1 : 3."""
    key = torch.tensor([[0.0], [math.log(3.0)]])
    value = torch.tensor([[4.0, 0.0], [0.0, 8.0]])
    part = attend_partly(torch.tensor([[2.0]]), key, value, Scoring(0.5))
    torch.testing.assert_close(part.greatest, torch.tensor([math.log(3.0)]))
    torch.testing.assert_close(part.mass, torch.tensor([4 / 3]))
    torch.testing.assert_close(part.total, torch.tensor([[4 / 3, 8.0]]))
    torch.testing.assert_close(part.normalised(), torch.tensor([[1.0, 6.0]]))


def test_softcap_by_hand() -> None:
    """A score of 1000 under a cap of ln 2 is ln 2: it weighs twice as much as a score of 0."""
    key = torch.tensor([[1000.0], [0.0]])
    value = torch.tensor([[3.0], [0.0]])
    part = attend_partly(torch.tensor([[1.0]]), key, value, Scoring(1.0, math.log(2.0)))
    torch.testing.assert_close(part.normalised(), torch.tensor([[2.0]]))


def test_a_part_in_which_everything_is_hidden_weighs_nothing() -> None:
    query, key, value = _random(3, 4), _random(5, 4, seed=1), _random(5, 2, seed=2)
    hidden = attend_partly(query, key, value, Scoring(1.0), torch.full((3, 5), -INF))
    assert hidden.mass.tolist() == [0.0] * 3
    assert hidden.total.abs().max() == 0
    assert hidden.greatest.isfinite().all()
    seen = attend_partly(query, key, value, Scoring(1.0))
    expected = _softmax_attention(query, key, value, Scoring(1.0)).float()
    for parts in ([hidden, seen], [seen, hidden], [hidden, seen, hidden]):
        torch.testing.assert_close(_merged(parts), expected)


@settings(derandomize=True, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    keys=st.integers(1, 12),
    cuts=st.sets(st.integers(1, 11), max_size=4),
    scale=st.sampled_from([0.3, 1.0, 30.0]),
    softcap=st.sampled_from([None, 2.0, 50.0]),
    masked=st.booleans(),
)
def test_parts_merge_into_the_whole(
    seed: int, keys: int, cuts: set[int], scale: float, softcap: float | None, masked: bool
) -> None:
    """However the keys are split, with a part or two in which a query sees nothing at all."""
    query, key, value = (_random(n, 4, seed=seed + i) for i, n in enumerate((3, keys, keys)))
    scoring = Scoring(scale, softcap)
    bias: Tensor | None = None
    if masked:
        bias = _random(3, keys, seed=seed + 3)
        bias = bias.masked_fill(_random(3, keys, seed=seed + 4) > 0, -INF)
        bias[:, seed % keys] = 0.5  # nobody sees nothing in the whole
    ends = [*sorted(cut for cut in cuts if cut < keys), keys]
    parts = []
    for begin, end in zip([0, *ends], ends, strict=False):
        seen = None if bias is None else bias[:, begin:end]
        parts.append(attend_partly(query, key[begin:end], value[begin:end], scoring, seen))
    expected = _softmax_attention(query, key, value, scoring, bias).float()
    torch.testing.assert_close(_merged(parts), expected, atol=2e-5, rtol=1e-4)


def test_merge_takes_each_rows_own_slots_for_every_head() -> None:
    """Two rows, two heads, slots in any order; a row's slots are nobody else's."""
    total = torch.tensor([[[2.0], [4.0]], [[6.0], [1.0]], [[9.0], [9.0]]])
    mass = torch.tensor([[1.0, 2.0], [3.0, 1.0], [3.0, 1.0]])
    greatest = torch.tensor([[0.0, 0.0], [0.0, math.log(2.0)], [7.0, -7.0]])
    merged = merge(Partial(total, greatest, mass), torch.tensor([[1, 0], [2, 2]]))
    # head 0: (2 + 6) / (1 + 3); head 1: (4 / 2 + 1) / (2 / 2 + 1); a slot with itself: its own
    torch.testing.assert_close(merged, torch.tensor([[[2.0], [1.5]], [[3.0], [9.0]]]))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("how", ["all", "causal", "bias", "bias of each head"])
def test_attend_equals_softmax_written_out(how: str, heads: int, softcap: float | None) -> None:
    """With two key heads: query heads 0 to n/2-1 share the first of them."""
    queries, keys = 5, 5 if how == "causal" else 7
    query = _random(heads, queries, 4)
    key, value = _random(2, keys, 4, seed=1), _random(2, keys, 4, seed=2)
    scoring = Scoring(0.7, softcap)
    bias: Tensor | None = None
    if how.startswith("bias"):
        shape = (queries, keys) if how == "bias" else (heads, queries, keys)
        bias = _random(*shape, seed=3)
        bias = bias.masked_fill(_random(*shape, seed=4) > 0.5, -INF)
        bias[..., 2] = 0.25
    output = attend(query, key, value, scoring, causal=how == "causal", bias=bias)
    assert output.shape == (heads, queries, 4)
    for head in range(heads):
        own = None if bias is None else bias if bias.dim() == 2 else bias[head]
        if how == "causal":
            own = torch.full((queries, keys), -INF).triu(1)
        shared = head // (heads // 2)
        expected = _softmax_attention(query[head], key[shared], value[shared], scoring, own)
        torch.testing.assert_close(output[head], expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 6])
def test_a_prompt_that_continues_a_prefix_is_read_by_the_fused_kernel(
    heads: int, dtype: torch.dtype
) -> None:
    """With one bias for all heads, or with one for each; other kernels are not allowed here."""
    query = _random(6, 5, 8).to(dtype)
    key, value = _random(2, 40, 8, seed=1).to(dtype), _random(2, 40, 8, seed=2).to(dtype)
    bias = torch.zeros(heads, 5, 40).masked_fill(_random(heads, 5, 40, seed=4) > 0.5, -INF)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        attend(query, key, value, Scoring(0.7), causal=False, bias=bias)


# --- sampling.py --------------------------------------------------------------------------------

JUST_BELOW_ONE = 1 - 2.0**-53
VOCABULARIES = (1, 2, 255, 256, 257, 300, 512, 1000)


def _pick(
    logits: Tensor, uniform: Sequence[float], temperature: float | Sequence[float] = 1.0
) -> tuple[list[int], Tensor, list[bool]]:
    given = [temperature] * len(logits) if isinstance(temperature, float) else temperature
    tokens, logprobs, valid = pick(
        logits, torch.tensor(given), torch.tensor(uniform, dtype=torch.float64)
    )
    return tokens.tolist(), logprobs, valid.tolist()


def test_pick_by_hand() -> None:
    """Probabilities 1/2, 1/4, 0, 1/4: the first token whose running sum exceeds the number."""
    row = torch.tensor([0.5, 0.25, 0.0, 0.25]).log()
    numbers = [0.0, 0.49, 0.5, 0.74, 0.75, 0.99]
    tokens, logprobs, valid = _pick(row.expand(6, -1), numbers)
    assert tokens == [0, 0, 1, 1, 3, 3]
    expected = torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.25]).log()
    torch.testing.assert_close(logprobs, expected)
    assert all(valid)


@settings(derandomize=True, max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.sampled_from(VOCABULARIES),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    holes=st.sampled_from([0.0, 0.5, 0.95]),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
    uniform=st.one_of(st.sampled_from([0.0, 0.5, JUST_BELOW_ONE]), st.floats(0, JUST_BELOW_ONE)),
)
def test_pick_inverts_the_cumulative_distribution(
    seed: int, vocabulary: int, spread: float, holes: float, temperature: float, uniform: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocabulary, generator=generator) * spread
    hole = torch.rand(1, vocabulary, generator=generator) < holes
    hole[0, seed % vocabulary] = False
    logits = logits.masked_fill(hole, -INF)
    (token,), logprobs, valid = _pick(logits, [uniform], temperature)
    assert valid == [True]
    probabilities = (logits[0].double() / temperature).softmax(-1)
    assert probabilities[token] > 0, "what has no probability is never drawn"
    ends = probabilities.cumsum(-1)
    # Up to the rounding of the exponentials, in float32.
    assert float(ends[token] - probabilities[token]) <= uniform + 1e-6
    assert uniform <= float(ends[token]) + 1e-6
    inverted = int(torch.searchsorted(ends, torch.tensor([uniform]).double(), right=True))
    at_a_border = float((ends - uniform).abs().min()) < 1e-6
    assert token == inverted or at_a_border
    torch.testing.assert_close(
        float(logprobs), float(probabilities[token].log()), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_ends_of_the_interval_draw_the_first_and_the_last_possible_token(
    vocabulary: int,
) -> None:
    first, last = vocabulary // 3, vocabulary - 1 - vocabulary // 4
    logits = torch.full((2, vocabulary), -INF)
    logits[:, first : last + 1] = 0.0
    assert _pick(logits, [0.0, JUST_BELOW_ONE])[0] == [first, last]


def test_greedy_takes_the_likeliest_at_temperature_one() -> None:
    """Also beside rows that are not greedy, whatever their number is."""
    row = torch.tensor([1.0, 3.0, 2.0])
    expected = row.log_softmax(-1)
    tokens, logprobs, _ = _pick(row.expand(2, -1), [0.0, JUST_BELOW_ONE], 0.0)
    assert tokens == [1, 1]
    torch.testing.assert_close(logprobs, expected[[1, 1]])
    tokens, logprobs, _ = _pick(row.expand(3, -1), [0.0] * 3, [0.0, 1.0, 0.5])
    assert tokens == [1, 0, 0]
    colder = (row / 0.5).log_softmax(-1)
    torch.testing.assert_close(logprobs, torch.stack([expected[1], expected[0], colder[0]]))


@pytest.mark.parametrize(
    ("vocabulary", "temperature"),
    [
        (300, 0.0),
        (256, 0.0),
        (256, 1.0),
        (512, 0.5),
        (3, 1.0),
        (255, 1.0),
        (300, 1.0),
        (300, 0.5),
    ],
)
def test_rows_without_a_distribution_leave_the_others_alone(
    vocabulary: int, temperature: float
) -> None:
    good = _random(2, vocabulary)
    bad = _random(3, vocabulary, seed=1)
    bad[0, 1], bad[1, 2] = NAN, INF
    bad[2] = -INF
    logits = torch.stack([bad[0], good[0], bad[1], good[1], bad[2]])
    numbers = [0.3, 0.4, 0.5, 0.6, 0.7]
    tokens, logprobs, valid = _pick(logits, numbers, temperature)
    assert valid == [False, True, False, True, False]
    alone, expected, _ = _pick(good, [0.4, 0.6], temperature)
    assert [tokens[1], tokens[3]] == alone
    assert logprobs[[1, 3]].tolist() == expected.tolist()


def test_frequencies_are_the_probabilities() -> None:
    """Of 20,000 draws with fixed seeds, within four standard deviations."""
    probabilities = torch.tensor([0.05, 0.5, 0.0, 0.2, 0.25])
    numbers = torch.cat([uniforms(seed, 200) for seed in range(100)])
    count = len(numbers)
    logits = probabilities.log().expand(count, -1)
    tokens, _, _ = pick(logits, torch.ones(count), numbers)
    found = torch.bincount(tokens, minlength=5) / count
    bound = 4 * (probabilities * (1 - probabilities) / count).sqrt()
    assert bool(((found - probabilities).abs() <= bound).all()), found
    assert found[2] == 0


def test_uniforms_are_a_function_of_the_seed() -> None:
    """A shorter row of numbers is the beginning of a longer one."""
    numbers = uniforms(5, 1000)
    assert numbers.dtype == torch.float64
    assert 0 <= float(numbers.min()) < 0.01
    assert 0.99 < float(numbers.max()) < 1
    assert uniforms(5, 10).tolist() == numbers[:10].tolist()
    assert uniforms(6, 10).tolist() != numbers[:10].tolist()
    assert len(uniforms(2**63 - 1, 3)) == 3


# --- tree.py ------------------------------------------------------------------------------------


def _fill(leaf: TreeNode, tokens: Sequence[int]) -> None:
    """What a pass does: keys that tell a token and its position, values of the opposite sign."""
    for node in leaf.path():
        if node.done < len(node.tokens):
            positions = range(node.start, node.start + len(node.tokens))
            at = torch.tensor([[float(tokens[p]), float(p)] for p in positions])
            node.keys, node.values = [at.unsqueeze(0)], [-at.unsqueeze(0)]
            node.done = len(node.tokens)


def _check_path(leaf: TreeNode, tokens: Sequence[int]) -> None:
    """A leaf's path spells its prompt, and so do the keys and values along it."""
    path = leaf.path()
    assert path[-1] is leaf
    assert [token for node in path for token in node.tokens] == list(tokens)
    assert [node.start for node in path] == [
        sum(len(above.tokens) for above in path[:index]) for index in range(len(path))
    ]
    expected = torch.tensor([[float(token), float(p)] for p, token in enumerate(tokens)])
    assert torch.equal(torch.cat([node.keys[0][0] for node in path]), expected)
    assert torch.equal(torch.cat([node.values[0][0] for node in path]), -expected)


def _nodes(tree: PrefixTree) -> list[TreeNode]:
    found, waiting = [], list(tree.root.children)
    while waiting:
        found.append(waiting.pop())
        waiting.extend(found[-1].children)
    return found


def _check_counts(tree: PrefixTree, leaves: Sequence[TreeNode]) -> None:
    nodes = _nodes(tree)
    assert tree.tokens == sum(len(node.tokens) for node in nodes)
    assert tree.idle_tokens == sum(len(node.tokens) for node in nodes if node.users == 0)
    for node in nodes:
        assert node.users == sum(node in leaf.path() for leaf in leaves)
        assert all(child.parent is node for child in node.children)


def _prompts(seed: int, count: int) -> list[tuple[int, ...]]:
    """Prompts that begin alike in all manners: few tokens, few stems, cut anywhere."""
    rng = random.Random(seed)
    stems = [[rng.randrange(3) for _ in range(120)] for _ in range(3)]
    prompts = []
    for _ in range(count):
        stem = rng.choice(stems)[: rng.choice([0, 3, 31, 32, 33, 40, 64, 100, rng.randrange(120)])]
        tail = [rng.randrange(3) for _ in range(rng.choice([0, 0, 1, 5, 40]))]
        prompts.append(tuple([*stem, *tail] or [1]))
    return prompts


@settings(derandomize=True, max_examples=120)
@given(
    seed=st.integers(0, 2**32),
    orders=st.lists(st.one_of(st.none(), st.integers(0, 20)), min_size=1, max_size=40),
    keep=st.sampled_from([0, 0, 50, 200]),
    wanted=st.sampled_from([1, 1, 20]),
)
def test_tree_keeps_every_prompt_in_any_order(
    seed: int, orders: list[int | None], keep: int, wanted: int
) -> None:
    """None inserts the next prompt, a number releases one of those that are held."""
    tree = PrefixTree(keep)
    prompts = iter(_prompts(seed, len(orders)))
    held: list[tuple[TreeNode, tuple[int, ...]]] = []
    for order in orders:
        if order is None:
            prompt = next(prompts)
            shareable = max(len(prompt) - wanted, 0)
            foretold = tree.shared(prompt, shareable)
            before = tree.tokens
            leaf = tree.insert(prompt, shareable)
            assert leaf.start == foretold <= shareable
            assert tree.tokens == before + len(prompt) - foretold
            _fill(leaf, prompt)
            held.append((leaf, prompt))
        elif held:
            leaf, _ = held.pop(order % len(held))
            tree.release(leaf)
            assert tree.idle_tokens <= keep
        for leaf, prompt in held:
            _check_path(leaf, prompt)
        _check_counts(tree, [leaf for leaf, _ in held])
    for leaf, _ in held:
        tree.release(leaf)
    assert tree.tokens == tree.idle_tokens <= keep
    tree.clear()
    assert tree.tokens == tree.idle_tokens == 0
    assert tree.root.children == []


@pytest.mark.parametrize("common", [0, 1, SHORTEST_SHARED - 1, SHORTEST_SHARED, 45, 59, 60])
def test_sharing_needs_so_many_tokens(common: int) -> None:
    tree = PrefixTree()
    one = tuple(range(60))
    other = (*one[:common], *range(1000, 1020))
    _fill(tree.insert(one, 59), one)
    expected = common if common >= SHORTEST_SHARED else 0
    assert tree.shared(other, len(other) - 1) == expected
    leaf = tree.insert(other, len(other) - 1)
    assert leaf.start == expected
    _fill(leaf, other)
    _check_path(leaf, other)
    assert tree.tokens == 60 + len(other) - expected


def test_a_short_prompt_is_not_shared_by_a_longer_one() -> None:
    """Three tokens in common are fewer than the shortest that pays, also if one is all there is."""
    tree = PrefixTree()
    _fill(tree.insert((1, 2, 3), 2), (1, 2, 3))
    assert tree.shared((1, 2, 3, 4, 5), 4) == 0


def test_no_more_is_shared_than_may_be() -> None:
    """The last token of an identical prompt is read again: what comes out of it is asked for."""
    tree = PrefixTree()
    prompt = tuple(range(50))
    first = tree.insert(prompt, 49)
    second = tree.insert(prompt, 49)
    assert (second.start, second.tokens) == (49, (49,))
    assert tree.tokens == 51
    third = tree.insert(prompt, 40)
    assert (third.start, third.tokens) == (40, prompt[40:])
    for leaf in (first, second, third):
        assert [token for node in leaf.path() for token in node.tokens] == list(prompt)


def test_a_split_in_the_middle_of_reading_says_what_is_done() -> None:
    """Of 100 tokens 45 are read when others take the first 40, and then 35 more."""
    tree = PrefixTree()
    one = tuple(range(100))
    leaf = tree.insert(one, 99)
    _fill(leaf, one)
    leaf.done = 45
    other = tree.insert((*one[:40], 7, 7, 7), 42)
    above = other.parent
    assert above is not None
    assert (above.done, leaf.done, other.done) == (40, 5, 0)
    _check_path(leaf, one)
    further = tree.insert((*one[:75], 8, 8, 8), 77)
    middle = further.parent
    assert middle is not None
    assert (len(middle.tokens), middle.done, leaf.done) == (35, 5, 0)
    _check_path(leaf, one)


def test_the_least_recently_used_goes_first() -> None:
    tree = PrefixTree(keep_tokens=100)
    prompts = [tuple(range(100 * n, 100 * n + 40)) for n in range(3)]
    leaves = [tree.insert(prompt, 39) for prompt in prompts]
    for leaf, prompt in zip(leaves, prompts, strict=True):
        _fill(leaf, prompt)
    for index in (1, 0):
        tree.release(leaves[index])
    assert (tree.tokens, tree.idle_tokens) == (120, 80)
    # Prompt 1 is used again; now prompt 0 is the one that was let go the longest ago.
    again = tree.insert((*prompts[1], 7), 40)
    assert (again.start, tree.idle_tokens) == (40, 40)
    _fill(again, (*prompts[1], 7))
    tree.release(again)
    tree.release(leaves[2])
    assert [tree.shared((*prompt, 7), 40) for prompt in prompts] == [0, 40, 40]
    assert tree.tokens == tree.idle_tokens == 81


def test_what_others_are_behind_outlives_what_nobody_is() -> None:
    tree = PrefixTree(keep_tokens=0)
    stem = tuple(range(40))
    leaves = [tree.insert((*stem, 100 + n, 7), 41) for n in range(2)]
    for n, leaf in enumerate(leaves):
        _fill(leaf, (*stem, 100 + n, 7))
    tree.release(leaves[0])
    assert tree.tokens == 42
    _check_path(leaves[1], (*stem, 101, 7))
    tree.release(leaves[1])
    assert tree.tokens == 0


def test_a_prompt_given_up_half_way_is_not_kept() -> None:
    tree = PrefixTree(keep_tokens=1000)
    leaf = tree.insert(tuple(range(50)), 49)
    leaf.done = 20
    tree.release(leaf)
    assert tree.tokens == tree.idle_tokens == 0
    assert tree.shared(tuple(range(50)), 49) == 0


# --- suffixes.py --------------------------------------------------------------------------------


class _Model:
    """A suffix cache beside plain lists that tell what it should hold."""

    def __init__(self, layers: int = 2) -> None:
        self.cache = SuffixCache()
        self.layers = layers
        self.expected: list[list[float]] = []
        self._count = 0.0

    def add(self, rows: int) -> None:
        self.cache.add(rows)
        self.expected.extend([] for _ in range(rows))

    def remove(self, row: int) -> None:
        self.cache.remove(row)
        last = self.expected.pop()
        if row < len(self.expected):
            self.expected[row] = last

    def step(self, spoilt: Sequence[int] = ()) -> None:
        """One token more in each row: not finite in some; then looks at all that is held."""
        for held in self.expected:
            self._count += 1
            held.append(self._count)
        for row in spoilt:
            self.expected[row][-1] = NAN
        self.cache.begin_step(CPU)
        last = torch.tensor([held[-1] for held in self.expected])
        for layer in range(self.layers):
            shift = 1000.0 * layer
            key = (last + shift).view(-1, 1, 1).expand(-1, 2, 3)
            keys, values = self.cache.write(layer, key, -key[..., :2])
            longest = max(len(held) for held in self.expected)
            assert keys.shape == (len(self.expected), 2, longest, 3)
            assert values.shape == (len(self.expected), 2, longest, 2)
            for row, held in enumerate(self.expected):
                expected = torch.tensor(held) + shift
                for head in range(2):
                    for tensor, sign in ((keys, 1), (values, -1)):
                        found = tensor[row, head, : len(held)]
                        wanted = (sign * expected).unsqueeze(-1).expand_as(found)
                        assert torch.equal(found.nan_to_num(-5), wanted.nan_to_num(-5))
                        assert tensor[row, head, len(held) :].isfinite().all(), "hidden, not gone"
        self.cache.end_step()
        assert self.cache.lengths == [len(held) for held in self.expected]
        assert self.cache.rows == len(self.expected)


@settings(derandomize=True, max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 9)),
            st.tuples(st.just("remove"), st.integers(0, 100)),
            st.tuples(st.just("spoil"), st.integers(0, 100)),
            st.tuples(st.just("step"), st.integers(1, 3)),
        ),
        max_size=30,
    )
)
def test_suffixes_keep_each_rows_own_tokens(orders: list[tuple[str, int]]) -> None:
    """Rows come and go in any order; more of them, and longer ones, than there was room for."""
    model = _Model()
    for what, number in orders:
        if what == "add":
            model.add(number)
            model.step()
        elif what == "step" and model.expected:
            for _ in range(number):
                model.step()
        elif what == "spoil" and model.expected:
            row = number % len(model.expected)
            model.step(spoilt=[row])
            model.remove(row)
        elif what == "remove" and model.expected:
            model.remove(number % len(model.expected))
    while model.expected:
        model.remove(0)
    assert model.cache.rows == 0
    assert model.cache.lengths == []


@pytest.mark.parametrize("row", [0, 8, 9])
def test_a_row_may_leave_before_its_first_step(row: int) -> None:
    """As one does whose first token, drawn from the prompt's logits, is its last."""
    model = _Model()
    model.add(1)
    model.step()
    model.add(9)
    model.remove(row)
    model.step()


def test_suffixes_grow_beyond_their_first_room() -> None:
    """From 3 rows of up to 150 tokens to 40 rows."""
    model = _Model(layers=1)
    model.add(3)
    for _ in range(70):
        model.step()
    model.add(37)
    for _ in range(80):
        model.step()
    assert sorted(set(model.cache.lengths)) == [80, 150]
    model.remove(1)
    model.remove(0)
    model.step()


@pytest.mark.parametrize(
    ("spoilt", "leaving"), [([2], [2]), ([1, 2], [1, 1]), ([2], [1, 1]), ([0], [0]), ([0], [1, 0])]
)
def test_a_row_that_was_not_finite_leaves_nothing_behind(
    spoilt: list[int], leaving: list[int]
) -> None:
    """Its place, or the one that it moved to, is taken by others, and hidden by a mask only."""
    model = _Model()
    model.add(3)
    model.step()
    model.step(spoilt=spoilt)
    for row in leaving:
        model.remove(row)
    model.add(3)
    model.step()


def test_visible_from_hides_what_lies_behind() -> None:
    assert visible_from([3, 3], 3, CPU) is None
    bias = visible_from([1, 3], 3, CPU)
    assert bias is not None
    assert bias.shape == (2, 1, 1, 3)
    assert bias.flatten().tolist() == [0.0, -INF, -INF, 0.0, 0.0, 0.0]


# --- requests.py --------------------------------------------------------------------------------


def _sample(
    prompt: int = 3, seeds: Sequence[int] = (1,), new: int = 4, temperature: float = 1.0
) -> SampleRequest:
    return SampleRequest([5] * prompt, seeds, new, temperature)


def _score(prompt: int, *continuations: int) -> ScoreRequest:
    return ScoreRequest([5] * prompt, [[6] * length for length in continuations])


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_sample(prompt=0), "prompt is empty"),
        (_score(0, 1), "prompt is empty"),
        (_score(3), "continuation is empty"),
        (_score(3, 2, 0), "continuation is empty"),
        (_sample(seeds=[]), "no samples"),
        (_sample(new=0), "max_new_tokens is 0"),
        (_sample(new=-1), "max_new_tokens is -1"),
        (_sample(temperature=-1.0), "temperature is -1"),
        (_sample(temperature=NAN), "temperature is nan"),
        (_sample(temperature=INF), "temperature is inf"),
        (_sample(temperature=-INF), "temperature is -inf"),
        (_sample(temperature=1e-9), "temperature is 1e-09"),
        (_sample(temperature=1e9), "temperature is 1000000000.0"),
        (_sample(seeds=[1, -1]), "seed -1"),
        (_sample(seeds=[2**63]), f"seed {2**63}"),
        (_sample(prompt=17, new=4), "17 tokens and 4 tokens"),
        (_score(17, 1, 4), "17 tokens and 4 tokens"),
        (SampleRequest([5, 100], [1], 4), "not among the model's 100"),
        (ScoreRequest([5], [[6], [7, -1]]), "not among the model's 100"),
    ],
)
def test_unfit_says_what_is_wrong(request_: Request, reason: str) -> None:
    failure = unfit(request_, 100, 20, encoder_decoder=False)
    assert failure is not None
    assert failure.kind is FailureKind.PERMANENT
    assert reason in failure.reason


@pytest.mark.parametrize(
    "request_",
    [
        _sample(),
        _sample(prompt=16, new=4),
        _sample(seeds=[0, 2**63 - 1], temperature=0.0),
        _sample(temperature=1e-3),
        _sample(temperature=1e3),
        _score(16, 4, 1, 4),
    ],
)
def test_what_is_fit(request_: Request) -> None:
    assert unfit(request_, 100, 20, encoder_decoder=False) is None


def test_the_window_of_an_encoder_decoder_counts_each_side_by_itself() -> None:
    assert unfit(_sample(prompt=20, new=20), 100, 20, encoder_decoder=True) is None
    assert unfit(_sample(prompt=21, new=1), 100, 20, encoder_decoder=True) is not None
    assert unfit(_sample(prompt=1, new=21), 100, 20, encoder_decoder=True) is not None
    assert unfit(_sample(prompt=10**6), 100, None, encoder_decoder=False) is None
